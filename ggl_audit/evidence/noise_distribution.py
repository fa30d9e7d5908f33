"""Has noise the declared distribution, everywhere?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betainc, chdtr, chdtrc, fdtrc, ndtr, ndtri, stdtr

from ggl_audit.evidence.noise_residuals import (
    AWAY_FROM_ZERO,
    Residuals,
    Violation,
    more_than_declared,
)
from ggl_audit.messages import Message

NO_NOISE = (1e-6, 1e-5, 1e-4, 1e-3)
"""Standard deviations, within which values without noise are."""

GRID = (1e-6, 1e-5, 1e-4, 1e-3)
"""Standard deviations, within which a value that occurs again and again does."""

SIZES = (1.0, math.inf)
"""Standard deviations, up to which values are looked at for a grid."""

TAILS = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
"""The probabilities beyond which values are counted, on each side."""

QUANTILES = (0.1, 0.5, 0.9, 0.99, 0.999)
"""The quantiles of the share's magnitudes between which its noise is compared."""

LARGEST = (1, 3, 10)
"""How many of the largest values of each release's share have their noise compared."""

FEWEST_RELEASES = 8
SMALLEST_BLOCK = 16
MUCH_WEAKER = 2.0
"""Times less noise than declared, which no heavy tails explain."""

LARGELY = 0.2
FEWEST_TO_FOLLOW = 8
HARDLY = 1e-3
TINY = 1e-6
PERCENT = 0.1

WITHOUT_NOISE = Message(
    "contradiction/without-noise",
    "{count:,} of {total:,} values of {name} ({share}) have no noise: they are within {width:.1g} "
    "standard deviations of {zero}, where noise leaves {most:.2g} at most on average{the_same_of}",
    advice="Look for values, layers or masks that the noise skips.",
)
GRID_VALUES = Message(
    "contradiction/grid-values",
    "the noise takes the same values again and again, as on a grid: of {total:,} values {count:,} "
    "are at {place:.4g} standard deviations, within {size:.1g}, where a continuous distribution "
    "has about {most:.2g} at most",
    advice="Draw and add the noise in single precision; look for rounding, clamping and tables. "
    "If what is sent is rounded afterwards, declare that step.",
)
STRENGTH = Message(
    "contradiction/strength",
    "the noise of {name} has {times:.3g} times the declared standard deviation, over {count:,} "
    "values{more_than_declared}{such_parts}",
    advice="Look for a scale by layer, by batch size or by what the gradient is there: `values "
    "without a share`, `values with small shares`, `values with shares above SHARE of the others` "
    "and `the COUNT largest shares of each release` are places by the size of the gradient.",
)
DECLARE_WHAT_IS_DRAWN = (
    "Declare the distribution that is drawn (`gaussian` or `laplace`), or draw the declared one; "
    "look for truncation."
)
BODY = Message(
    "contradiction/body",
    "{share:.2%} of the noise is below {place:.3g} standard deviations, where the declared "
    "distribution has {declared:.2%} (Kolmogorov's distance {distance:.2g} over {total:,} values)",
    advice=DECLARE_WHAT_IS_DRAWN,
)
TAIL = Message(
    "contradiction/tail",
    "{count:,} of {total:,} values of the noise are {above} {place:.3g} standard deviations; the "
    "declared distribution has {declared:,.3g} there",
    advice=DECLARE_WHAT_IS_DRAWN,
)
LARGEST_VALUE = Message(
    "contradiction/largest-value",
    "the largest of {total:,} values of the noise is {place:.3g} standard deviations away from "
    "zero",
    advice=DECLARE_WHAT_IS_DRAWN,
)
LOOK_FOR_SIGNS = (
    "Look for `rand` in place of `randn`, absolute values, and noise that is multiplied with the "
    "gradient."
)
MEAN = Message(
    "contradiction/mean",
    "the mean of the noise of {name} is {mean:.3g} standard deviations, over {count:,} values; "
    "that of declared noise is zero",
    advice=LOOK_FOR_SIGNS,
)
HAS_SIGNS = Message(
    "contradiction/has-signs",
    "the noise has a correlation of {rho:.3g} with the signs of the gradient that it is added to; "
    "independent noise has none",
    advice=LOOK_FOR_SIGNS,
)
COMPARE_THE_SHARE = (
    "Not the noise is wrong but what it is added to: compare the clip, its bound and its unit, "
    "the loss' scale, the model's mode and weight decay in the client's code with the declaration."
)
SHARE = Message(
    "contradiction/share",
    "the share that is sent beside the noise is about {times:.3g} times the declared one, over "
    "{count} releases",
    advice=COMPARE_THE_SHARE,
)
IN_COMMON = Message(
    "contradiction/in-common",
    "two releases of the same images have more in common than the declared share, by about "
    "{size:.3g} standard deviations of the noise in norm",
    advice=COMPARE_THE_SHARE,
)


def missing(residuals: Residuals, level: float) -> tuple[list[Violation], set[str]]:
    """Values to which no noise was added: nearer to zero than noise is, too often.

    Whatever was added to it, symmetric unimodal noise is within t of zero with the probability of
    noise alone at most (Anderson 1955), so that the number is at most binomial: with the mean of
    the values' probabilities (Hoeffding 1956), as each has its own rounding. What the share may be
    off only widens the search.

    Returns:
        What was found, and the tensors that largely lack noise.
    """
    groups = {"the gradient": [*residuals.values], **{name: [name] for name in residuals.values}}
    comparisons = 2 * len(groups) * len(NO_NOISE)
    grains = {name: _grain_near_share(residuals, name) for name in residuals.values}
    found: dict[str, tuple[int, int, float, float]] = {}
    for name, members in groups.items():
        off = max(residuals.rounding[member] for member in members)
        values = torch.cat([residuals.values[member].flatten() for member in members]).abs()
        own = torch.cat(
            [grains[member].expand_as(residuals.values[member]).flatten() for member in members]
        )
        beyond, usual, total = values - own, float(own.mean()), values.numel()
        for width, slack in itertools.product(NO_NOISE, (0.0, off)):
            near = int((beyond <= width + slack).sum())
            before = int((beyond <= width / 10 + slack).sum())
            expected = 2 * (width + slack + 2 * usual) * residuals.density
            p_value = float(at_least(near, total, expected)) if near > total * expected + 1 else 1.0
            if p_value * comparisons <= level and before >= near / 2:
                found[name] = near, total, width + slack + usual, expected
                break
    if not found:
        return [], set()
    bare = {name for name, (near, total, _, _) in found.items() if near > LARGELY * total}
    bare.discard("the gradient")
    where = "the gradient"
    if bare or where not in found:
        where = max(found, key=lambda name: found[name][0] / found[name][1])
    near, total, width, expected = found[where]
    others = sorted(bare - {where})
    more = f"; the same of {', '.join(others)}" if others else ""
    beside = "the declared share" if residuals.exact else "zero"
    said = WITHOUT_NOISE(
        count=near,
        total=total,
        name=where,
        share=percent(near / total),
        width=width,
        zero=beside,
        most=expected * total,
        the_same_of=more,
    )
    return [Violation("missing", said, near / total)], bare


def _grain_near_share(residuals: Residuals, name: str) -> torch.Tensor:
    """The rounding of what is sent where that is the share, or nearly so."""
    largest = torch.tensor(NO_NOISE[-1], dtype=torch.double)
    if residuals.shares is not None:
        largest = residuals.shares[name].abs() + largest
    return torch.as_tensor(residuals.grain(name, largest))


def discrete(residuals: Residuals, level: float) -> Iterator[Violation]:
    """A value that noise takes again and again, though its distribution is continuous.

    Beside each value, whatever was added, the number of others so near to it is at most binomial.
    """
    values = residuals.ordered
    values = values[values.abs() > AWAY_FROM_ZERO]
    total = values.numel()
    if total < 2:
        return
    for width, slack in itertools.product(GRID, (0.0, residuals.worst_rounding)):
        size = width + slack
        cells = (values / size).floor()
        places, counts = torch.unique_consecutive(cells, return_counts=True)
        for limit in SIZES:  # the rounding of small values is small
            within = places.abs() * size <= limit
            most = int(torch.where(within, counts, 0).max())
            grain = residuals.grain_up_to(min(limit, float(values.abs().max())) + size)
            near = 2 * (size + grain) * residuals.density
            if total * at_least(most - 1, total - 1, near) * 2 * len(SIZES) * len(GRID) > level:
                continue
            place = float(places[torch.where(within, counts, 0).argmax()]) * size
            yield Violation(
                "discrete",
                GRID_VALUES(total=total, count=most, place=place, size=size, most=total * near / 2),
                most / total,
            )
            return


@dataclass(frozen=True)
class Groups:
    """Sums of squares over groups of values.

    Attributes:
        squares: of each group.
        counts: of their values.
        name: what a group is called, given its number.
    """

    squares: np.ndarray
    counts: np.ndarray
    name: Callable[[int], str]


def scales(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise of another strength than declared: in all, in a tensor, or by the gradient's size.

    The sum of squares of normal noise is a chi-squared variable; with anything added to the noise
    it is small with no higher probability (Anderson 1955), so that then only too little is found.
    """
    yield from _strengths(residuals, [*_tensors(residuals)], level)


def parts(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise of another strength in part of a tensor, of the releases, or in single values."""
    yield from _strengths(residuals, [*_places(residuals), *_times(residuals)], level)


def _strengths(residuals: Residuals, kinds: list[Groups], level: float) -> Iterator[Violation]:
    worst = None
    spread = math.sqrt(max(2.0, float(residuals.flat.square().var(correction=0))))
    for groups in kinds:
        counts = np.maximum(groups.counts, 1)
        slack = residuals.worst_rounding * np.sqrt(counts)
        root = np.sqrt(groups.squares)
        p_values = chdtr(counts, (root + slack) ** 2)
        if residuals.exact:
            p_values = np.minimum(p_values, chdtrc(counts, np.maximum(root - slack, 0) ** 2))
        p_values = np.where(groups.counts > 0, p_values, 1.0)
        # What heavy tails alone do to sums of squares is no matter of strength; they hardly
        # make one that small.
        usual = 2 * ndtr((slack**2 - np.abs(groups.squares - counts)) / (spread * np.sqrt(counts)))
        heavy = groups.squares > counts / MUCH_WEAKER**2
        p_values = np.where(heavy, np.maximum(p_values, usual), p_values)
        found = p_values * 2 * len(p_values) * len(kinds) <= level
        away = np.abs(groups.squares - counts) / np.sqrt(2 * counts)
        at = int(np.where(found, away, -1).argmax())
        if found.any() and (worst is None or away[at] > worst[0]):
            worst = away[at], groups, at, int(found.sum())
    if worst is None:
        return
    _, groups, at, many = worst
    ratio = math.sqrt(groups.squares[at] / groups.counts[at])
    more = f"; {many:,} of {len(groups.counts):,} such parts are off" if many > 1 else ""
    whole = groups.counts[at] == groups.counts.sum() and len(groups.counts) == 1
    yield Violation(
        "excess" if whole and ratio > 1 else "scale",
        STRENGTH(
            name=groups.name(at),
            times=ratio,
            count=int(groups.counts[at]),
            more_than_declared=more_than_declared(ratio),
            such_parts=more,
        ),
    )


def _tensors(residuals: Residuals) -> Iterator[Groups]:
    names = [*residuals.values]
    squares = {name: values.square().sum(0) for name, values in residuals.values.items()}
    sums = np.array([float(tensor.sum()) for tensor in squares.values()])
    counts = residuals.releases * np.array([len(tensor) for tensor in squares.values()])
    yield Groups(sums.sum()[None], counts.sum()[None], lambda _: "the gradient")
    yield Groups(sums, counts, names.__getitem__)
    if residuals.shares is not None:
        yield _by_share(residuals)


def _places(residuals: Residuals) -> Iterator[Groups]:
    squares = {name: values.square().sum(0) for name, values in residuals.values.items()}
    found: list[tuple[float, int, str]] = []
    for name, places in squares.items():
        shape = residuals.shapes[name]
        if len(shape) > 1 and shape.numel() == len(places):
            for axis, what in ((0, "output"), (1, "input")):
                rows = places.reshape(shape).transpose(0, axis).flatten(1)
                for i, row in enumerate(rows.sum(1).tolist()):
                    found.append((row, rows.shape[1], f"{what} {i} of {name}"))
        size = len(places) // 2
        while size >= SMALLEST_BLOCK:
            blocks = places[: len(places) // size * size].reshape(-1, size).sum(1)
            for i, block in enumerate(blocks.tolist()):
                found.append((block, size, f"values {i * size} to {(i + 1) * size - 1} of {name}"))
            size //= 2
    if found:
        each, sizes, names = zip(*found, strict=True)
        yield Groups(np.array(each), residuals.releases * np.array(sizes), names.__getitem__)


def _times(residuals: Residuals) -> Iterator[Groups]:
    releases = residuals.releases
    if releases == 1:
        return
    squares = {name: values.square() for name, values in residuals.values.items()}
    names = [*squares]
    table = torch.stack([tensor.sum(1) for tensor in squares.values()], dim=1).numpy()
    sizes = np.array([tensor.shape[1] for tensor in squares.values()])
    yield Groups(
        table.sum(1), np.full(releases, sizes.sum()), lambda at: f"all of release {at + 1}"
    )
    yield Groups(
        table.flatten(),
        np.tile(sizes, releases),
        lambda at: f"{names[at % len(names)]} in release {at // len(names) + 1}",
    )
    if releases >= FEWEST_RELEASES:
        each = torch.cat([tensor.sum(0) for tensor in squares.values()]).numpy()
        until = sizes.cumsum()

        def place(at: int) -> str:
            which = int(np.searchsorted(until, at, "right"))
            return f"value {at - until[which] + sizes[which]} of {names[which]} over all releases"

        yield Groups(each, np.full(len(each), releases), place)


def _by_share(residuals: Residuals) -> Groups:
    """Values whose declared share is zero, small, large or the largest of their release."""
    assert residuals.shares is not None
    magnitudes = residuals.flat_shares.abs()
    names = ["values without a share", "values with small shares"]
    names += [f"values with shares above {q:.1%} of the others" for q in QUANTILES]
    sums, counts = np.zeros(len(names)), np.zeros(len(names), int)
    ranks = [f"the {most} largest shares of each release" for most in LARGEST]
    among, ranked = np.zeros(len(ranks)), np.zeros(len(ranks), int)
    for row, square in zip(magnitudes, residuals.flat.square(), strict=True):
        largest = row.topk(min(LARGEST[-1], len(row)))
        sent = square[largest.indices[largest.values > 0]]
        for i, most in enumerate(LARGEST):
            among[i] += float(sent[:most].sum())
            ranked[i] += len(sent[:most])
        nonzero = row[row > 0].sort().values
        group = torch.zeros(len(row), dtype=torch.long)
        if len(nonzero):
            at = nonzero[[int(q * len(nonzero)) for q in QUANTILES]]
            group = torch.where(row > 0, torch.bucketize(row, at, right=True) + 1, 0)
        sums += torch.bincount(group, weights=square, minlength=len(names)).numpy()
        counts += torch.bincount(group, minlength=len(names)).numpy()
    named = [*names, *ranks]
    return Groups(np.append(sums, among), np.append(counts, ranked), named.__getitem__)


def distributions(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise of another distribution, in its body or its tails.

    The body by Kolmogorov's distance, with the inequality of Dvoretzky, Kiefer and Wolfowitz in
    Massart's form (1990); the tails by exact binomial probabilities of the counts beyond quantiles.
    """
    values = residuals.ordered.numpy()
    off, total = residuals.worst_rounding, len(values)
    below = ndtr(values)
    steps = np.arange(total + 1) / total
    distance = max(float((steps[1:] - below).max()), float((below - steps[:-1]).max()))
    counted = max(distance - off * residuals.density, 0.0)
    if 2 * math.exp(-2 * total * counted**2) * 2 <= level:
        at = int(np.abs(steps[1:] - below).argmax())
        yield Violation(
            "distribution",
            BODY(
                share=steps[at + 1],
                place=values[at],
                declared=below[at],
                distance=distance,
                total=total,
            ),
        )
    worst = None
    comparisons = 4 * len(TAILS)
    for sided in (values, -values[::-1]):
        for tail in TAILS:
            limit = -float(ndtri(tail))
            surely, perhaps = (
                total - int(np.searchsorted(sided, limit + sign * off, "right")) for sign in (1, -1)
            )
            few = float(betainc(total - perhaps, perhaps + 1, 1 - tail)) if perhaps < total else 1.0
            p_value = min(float(at_least(surely, total, tail)), few)
            away = abs(math.log((surely + 1) / (total * tail + 1)))
            if p_value * 2 * comparisons <= level and (worst is None or away > worst[0]):
                side = "above" if sided is values else "below"
                worst = away, side, limit, surely, total * tail
    if worst is not None:
        _, side, limit, counted_beyond, expected = worst
        yield Violation(
            "distribution",
            TAIL(
                count=counted_beyond,
                total=total,
                above=side,
                place=limit if side == "above" else -limit,
                declared=expected,
            ),
        )
    largest = max(abs(float(values[0])), abs(float(values[-1]))) - off
    if total * 2 * float(ndtr(-largest)) * 4 <= level:
        yield Violation(
            "distribution",
            LARGEST_VALUE(total=total, place=largest),
        )


def biases(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise whose mean is not zero, in all or in a tensor."""
    sums = [float(values.sum()) for values in residuals.values.values()]
    counts = [values.numel() for values in residuals.values.values()]
    names = ["the gradient", *residuals.values]
    totals, numbers = np.array([sum(sums), *sums]), np.array([sum(counts), *counts])
    off = residuals.worst_rounding
    reach = np.maximum(np.abs(totals) - off * numbers, 0) / np.sqrt(numbers)
    at = int(reach.argmax())
    if 2 * ndtr(-reach[at]) * len(names) <= level:
        yield Violation(
            "bias",
            MEAN(name=names[at], mean=totals[at] / numbers[at], count=numbers[at]),
        )


def signs(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise that has the signs of the gradient, or the opposite ones."""
    if residuals.shares is None:
        return
    flat, share = residuals.flat, residuals.flat_shares
    direction = torch.nn.functional.normalize(share, dim=1)
    # Whatever part of the share itself is left must not count.
    own = share.sign() - (share.sign() * direction).sum(1, keepdim=True) * direction
    sizes = own.norm(dim=1)
    along = ((flat * own).sum(1) / sizes.clamp(min=TINY))[sizes > TINY]
    off = residuals.worst_rounding * math.sqrt(flat.shape[1])
    if _follows(along, off) <= level:
        rho = float((flat * share.sign()).sum() / (flat.norm() * share.sign().norm()))
        yield Violation(
            "dependent",
            HAS_SIGNS(rho=rho),
            abs(rho),
        )


def _follows(along: torch.Tensor, off: float) -> float:
    """The p-value of what should be standard normal in every release, whatever its strength."""
    count, mean = len(along), abs(float(along.mean())) if len(along) else 0.0
    reach = max(mean - off, 0) * math.sqrt(count)
    p_value = 2 * float(ndtr(-reach))
    if count >= FEWEST_TO_FOLLOW:
        student = reach / max(float(along.std()), 1e-30)
        p_value = max(p_value, 2 * float(stdtr(count - 1, -student)))
    return p_value


def shares(residuals: Residuals, level: float) -> Iterator[Violation]:
    """What is sent beside the noise is not the declared share.

    What is left of a release goes along with its share (Student's t over releases, as the noise may
    be of any strength), or two releases of the same images agree (the F test of sums against
    differences; the second half of the releases is of the images of the first).
    """
    if residuals.shares is None:
        return
    flat = residuals.flat
    share = residuals.flat_shares
    sizes = share.norm(dim=1)
    along = ((flat * share).sum(1) / sizes.clamp(min=1e-30))[sizes > 0]
    if len(along) < FEWEST_TO_FOLLOW:
        return
    times = float((flat * share).sum() / share.square().sum())
    p_value = _follows(along, residuals.worst_rounding * math.sqrt(flat.shape[1]))
    if 2 * p_value <= level and abs(times) > HARDLY:
        yield Violation(
            "share",
            SHARE(times=1 + times, count=len(along)),
        )
        return
    half = residuals.releases // 2
    if not residuals.paired or half < 2:
        return
    first, second = flat[:half], flat[half : 2 * half]
    quotient = float((first + second).square().sum() / (first - second).square().sum())
    number = half * flat.shape[1]
    if 2 * fdtrc(number, number, quotient) <= level:
        common = float((first * second).sum(1).clamp(min=0).mean().sqrt())
        yield Violation(
            "share",
            IN_COMMON(size=common),
        )


def at_least(found: int, total: int, probability: float) -> float:
    """The probability of so many or more among independent events of a probability each."""
    if found <= 0:
        return 1.0
    if found > total:
        return 0.0
    return float(betainc(found, total - found + 1, min(probability, 1.0)))


def percent(share: float) -> str:
    """A share in percent, with two digits where it is small."""
    return f"{share:.0%}" if share > PERCENT else f"{100 * share:.2g} %"
