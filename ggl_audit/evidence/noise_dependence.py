"""Is noise drawn anew for every release, tensor and value?

The tests for pairs of values hold whatever was added to the noise, as long as that does not depend
on it: half the squared differences of independent normal values are a chi-squared sum, and by
Anderson's inequality (1955) it is small with no higher probability if the values are shifted. Where
such a sum is too small, and the products of the values are as much too large, they correlate; where
that is so with the signs of one half reversed, they correlate negatively.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import next_fast_len
from scipy.special import bdtrc, betainc, chdtri, fdtrc

from ggl_audit.evidence.noise_residuals import AWAY_FROM_ZERO, Fault, Residuals, Violation
from ggl_audit.messages import Message

CHAINED = 6.0
"""The sum of squared weights of pairs in which values occur twice is at most 1.5 times their
number; Laurent and Massart (2000), lemma 1, bounds the lower tail by exp(-lack^2 / 6 count)."""

WHOLE = "the whole gradient"

MOST_SHIFTED = 2**22
"""Values that are compared at every shift; of larger gradients fewer releases are."""

HEADS = 4096
"""Values at the ends of tensors that are compared between tensors."""

MOST_LOOKED_AT = 4.0
"""Standard deviations, up to which a value that occurs twice is looked for."""

FEWEST_FREQUENCIES = 16
FEWEST_CALLS = 4
RANK = 1e-9
"""Relative, of an eigenvalue that is none."""

MEDIAN = float(chdtri(1, 0.5))
"""The median of the square of a standard normal value."""

CERTAIN = 7.0
"""Standard deviations of an estimated variance, beyond which it never is."""

FEWEST_PAIRS = 8
"""The fewest pairs of values that are said to correlate."""

NEARLY_ALL = 0.99
SMALLEST_CORRELATION = 0.9
"""A share of the strongest: what is weaker may follow from that one."""

DRAW_AS_MANY = (
    "Draw as many values as the tensor has; look for `repeat`, `expand`, broadcasting and filters."
)
REPEATS = Message(
    "contradiction/repeats",
    "the noise repeats along {name}: every value is the one {count} places before it, with a "
    "correlation of {rho:.2f} over {pairs:,} pairs",
    advice=DRAW_AS_MANY,
)
CORRELATES = Message(
    "contradiction/correlates",
    "the noise of values of {name} that are {count} apart has a correlation of {rho:.3f} over "
    "{pairs:,} pairs; fresh noise has none",
    advice=DRAW_AS_MANY,
)
MIRRORED = Message(
    "contradiction/mirrored",
    "the noise along {name} is mirrored about place {place:g}, with a correlation of {rho:.2f} "
    "over {pairs:,} pairs",
    advice=DRAW_AS_MANY,
)
BETWEEN_TENSORS = Message(
    "contradiction/between-tensors",
    "{first} and {second} {begin_with} {the_same_noise} (correlation {rho:.2f} over {count:,} "
    "values){and_more}",
    advice="Draw the noise of all tensors from one generator, without seeding it in between.",
)
SEED_ONCE = (
    "Seed the generator once, from the system, and never again; draw anew for each release. Noise "
    "that is meant to correlate between rounds (DP-FTRL, matrix factorization) needs an "
    "accounting of its own, which is not made here."
)
SAME_IN_RELEASES = Message(
    "contradiction/same-in-releases",
    "{the_noise} {is_the_same} in releases {first} and {second}; {count:,} of {pairs:,} pairs of "
    "releases share noise",
    advice=SEED_ONCE,
)
CORRELATED_RELEASES = Message(
    "contradiction/correlated-releases",
    "the noise of {name} in releases that are {count} apart has a correlation of {rho:.3f}; fresh "
    "noise has none",
    advice=SEED_ONCE,
)
SHIFTED = Message(
    "contradiction/shifted",
    "the noise of releases {first} and {second} is the same, {shifted} (correlation {rho:.2f} "
    "over {count:,} values)",
    advice=SEED_ONCE,
)
DRAWN_TWICE = Message(
    "contradiction/drawn-twice",
    "{share:.1%} of the values of the noise occur twice {in_a_release}, up to {width:.1g} "
    "standard deviations; of fresh noise at most {fresh:.1%}",
    advice="Look for noise that is drawn from a table, or reused in another order.",
)
LOOK_FOR_PROJECTIONS = (
    "Look for projections and products of narrow matrices in what draws the noise."
)
FEW_DIMENSIONS = Message(
    "contradiction/few-dimensions",
    "{the_noise} has {rank} dimensions, where {count} fresh vectors have {count}",
    advice=LOOK_FOR_PROJECTIONS,
)
AS_FEW_DIMENSIONS = Message(
    "contradiction/as-few-dimensions",
    "{the_noise} correlates as if it had {count:.3g} dimensions in place of {size:,}",
    advice=LOOK_FOR_PROJECTIONS,
)
OFFSET = Message(
    "contradiction/offset",
    "{share:.2%} of the energy of the noise of {name} is the same in all {releases} "
    "releases{with_alternating_signs}; of fresh noise {fresh:.2%}",
    advice="Look for a constant that is added (weight decay is a gradient of its own), and for "
    "noise that is partly kept.",
)
NOT_WHITE = Message(
    "contradiction/not-white",
    "the noise along {name} is not white: {count:,} of {frequencies:,} frequencies hold too much "
    "or too little, that of {waves} waves {times:.3g} times the mean",
    advice=DRAW_AS_MANY,
)


@dataclass(frozen=True)
class Pairs:
    """Sums over pairs of values, one for each of many ways to pair them.

    Attributes:
        products: of the two values.
        squares: half of the sum of both squares.
        counts: of pairs.
        disjoint: whether no value is in two pairs.
    """

    products: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    disjoint: bool = True

    def p_values(self) -> np.ndarray:
        """The p-value of each way, by its correlation's sign; 1 where there are too few pairs."""
        counts = np.maximum(self.counts, 1)
        left = np.maximum(self.squares - np.abs(self.products), 0.0)
        lack = counts - left
        if self.disjoint:
            ratio = np.clip(left / counts, 1e-300, 1.0)
            p_values = np.exp(-counts / 2 * (ratio - 1 - np.log(ratio)))
        else:
            p_values = np.exp(-(np.maximum(lack, 0) ** 2) / (CHAINED * counts))
        explained = np.abs(self.products) >= lack / 2
        enough = self.counts >= FEWEST_PAIRS
        return np.where(enough & (lack > 0) & explained, p_values, 1.0)

    def correlation(self, way: tuple[int, ...]) -> float:
        """The correlation of the pairs of one way."""
        return float(self.products[way] / max(self.squares[way], 1e-300))

    def strongest(self, level: float) -> tuple[tuple[int, ...], int] | None:
        """The one with most pairs of the ways that correlate most, and how many correlate.

        Args:
            level: the largest probability with which any is found where there is none.
        """
        found = self.p_values() * 2 * self.counts.size <= level
        if not found.any():
            return None
        strength = np.where(found, np.abs(self.products) / np.maximum(self.squares, 1e-300), -1)
        counts = np.where(strength >= SMALLEST_CORRELATION * strength.max(), self.counts, -1)
        at = np.unravel_index(int(counts.argmax()), counts.shape)
        return tuple(int(i) for i in at), int(found.sum())


def along_tensors(residuals: Residuals, level: float) -> list[Violation]:
    """Values of a tensor beside others of it: so many places apart, or mirrored."""
    parts = residuals.values
    if len(parts) > 1:
        parts = {**parts, WHOLE: residuals.flat}
    found: list[tuple[int, Violation]] = []
    for name, values in parts.items():
        if values.shape[1] < 2:
            continue
        lags, mirrored = _pairs_along(values)
        apart = lags.strongest(level / (2 * len(parts)))
        if apart is not None:
            (way,), _ = apart
            rho, pairs = lags.correlation((way,)), int(lags.counts[way])
            how = REPEATS if rho > NEARLY_ALL else CORRELATES
            said = how(name=name, count=way + 1, rho=rho, pairs=pairs)
            found.append((pairs, Violation(_fault(rho), said, abs(rho))))
        about = mirrored.strongest(level / (2 * len(parts)))
        if about is not None:
            (way,), _ = about
            rho, pairs = mirrored.correlation((way,)), int(mirrored.counts[way])
            said = MIRRORED(name=name, place=way / 2, rho=rho, pairs=pairs)
            found.append((pairs, Violation(_fault(rho), said, abs(rho))))
    # The whole says less of what a tensor shows by itself.
    return [one for _, one in sorted(found, key=lambda pair: (WHOLE in pair[1].detail, -pair[0]))]


def _fault(rho: float) -> Fault:
    return "repeated" if abs(rho) > NEARLY_ALL else "correlated"


def _pairs_along(values: torch.Tensor) -> tuple[Pairs, Pairs]:
    """The pairs of values (n, size), by all distances and by all places to mirror them about."""
    releases, size = values.shape
    length = next_fast_len(2 * size, real=True)
    power, mirror = torch.zeros(2, length // 2 + 1, dtype=torch.complex128)
    for row in values:
        spectrum = torch.fft.rfft(row, n=length)
        power += spectrum * spectrum.conj()
        mirror += spectrum * spectrum
    products = torch.fft.irfft(power, n=length)[1:size].numpy()
    energy = values.square().sum(0).numpy()
    until = np.concatenate([[0.0], energy.cumsum()])
    distance = np.arange(1, size)
    squares = (until[size - distance] + until[size] - until[distance]) / 2
    lags = Pairs(products, squares, releases * (size - distance), disjoint=False)
    about = np.arange(2 * size - 1)
    first, last = np.maximum(0, about - size + 1), np.minimum(about, size - 1)
    middle = np.where(about % 2 == 0, energy[about // 2], 0.0)
    convolved = torch.fft.irfft(mirror, n=length)[: 2 * size - 1].numpy()
    pairs = (last - first + 1) // 2
    mirrored = Pairs(
        (convolved - middle) / 2,
        (until[last + 1] - until[first] - middle) / 2,
        releases * pairs,
    )
    return lags, mirrored


def between_tensors(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Tensors beside each other: from their beginnings, from their ends, and one reversed."""
    names = [*residuals.values]
    if len(names) < 2:
        return
    heads, tails, sizes = [], [], []
    for values in residuals.values.values():
        size = min(values.shape[1], HEADS)
        padding = (0, HEADS - size)
        heads.append(torch.nn.functional.pad(values[:, :size], padding))
        tails.append(torch.nn.functional.pad(values.flip(1)[:, :size], padding))
        sizes.append(size)
    longest = max(sizes)
    head, tail = (torch.stack(part)[:, :, :longest] for part in (heads, tails))
    shorter = np.minimum.outer(sizes, sizes)
    upper = np.triu(np.ones((len(names), len(names)), bool), 1)
    for how, one, other, ways in (
        ("begin with", head, head, upper),
        ("end with", tail, tail, upper),
        ("begin and end, reversed, with", head, tail, upper | upper.T),
    ):
        until = [
            torch.cat([torch.zeros(len(names), 1), part.square().sum(1).cumsum(1)], dim=1).numpy()
            for part in (one, other)
        ]
        rows = np.arange(len(names))
        own = until[0][rows[:, None], shorter]
        theirs = until[1][rows[None, :], shorter]
        products = (one.flatten(1) @ other.flatten(1).T).numpy()
        counts = np.where(ways, residuals.releases * shorter, 0)
        pairs = Pairs(products, (own + theirs) / 2, counts)
        found = pairs.strongest(level / 3)
        if found is None:
            continue
        (first, second), many = found
        rho = pairs.correlation((first, second))
        more = f", and so do {many - 1} more pairs of tensors" if many > 1 else ""
        noise = "the same noise" if rho > NEARLY_ALL else "noise that correlates"
        yield Violation(
            _fault(rho),
            BETWEEN_TENSORS(
                first=names[first],
                second=names[second],
                begin_with=how,
                the_same_noise=noise,
                rho=rho,
                count=int(pairs.counts[first, second]),
                and_more=more,
            ),
            abs(rho),
        )


def between_releases(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Releases beside each other: value by value, in one tensor or all, or shifted."""
    if residuals.releases < 2:
        return
    parts = {"the gradient": residuals.flat, **residuals.values}
    for name, values in parts.items():
        yield from _between(name, values, level / (2 * len(parts)))
    yield from _shifted(residuals.flat, level / 2)


def _between(name: str, values: torch.Tensor, level: float) -> Iterator[Violation]:
    releases, size = values.shape
    gram = (values @ values.T).numpy()
    energy = np.diagonal(gram)
    upper = np.triu(np.ones_like(gram, bool), 1)
    squares = (energy[:, None] + energy[None, :]) / 2
    pairs = Pairs(gram, squares, np.where(upper, size, 0))
    found = pairs.strongest(level / 2)
    if found is not None:
        (first, second), many = found
        rho = pairs.correlation((first, second))
        whose = "the noise" if name == "the gradient" else f"the noise of {name}"
        how = "is the same" if rho > NEARLY_ALL else f"has a correlation of {rho:.2f}"
        yield Violation(
            _fault(rho),
            SAME_IN_RELEASES(
                the_noise=whose,
                is_the_same=how,
                first=first + 1,
                second=second + 1,
                count=many,
                pairs=releases * (releases - 1) // 2,
            ),
            abs(rho),
        )
        return
    apart = np.arange(1, releases)
    chains = Pairs(
        np.array([np.trace(gram, k) for k in apart]),
        np.array([(energy[:-k].sum() + energy[k:].sum()) / 2 for k in apart]),
        (releases - apart) * size,
        disjoint=False,
    )
    found = chains.strongest(level / 2)
    if found is not None:
        way, _ = found
        rho = chains.correlation(way)
        yield Violation(
            "correlated",
            CORRELATED_RELEASES(name=name, count=way[0] + 1, rho=rho),
            abs(rho),
        )


def _shifted(values: torch.Tensor, level: float) -> Iterator[Violation]:
    """Consecutive releases, and each beside the first, at every shift and reversed."""
    releases, size = values.shape
    length = next_fast_len(2 * size, real=True)
    transformed = [torch.fft.rfft(row, n=length) for row in values]
    until = np.concatenate([np.zeros((releases, 1)), values.square().cumsum(1).numpy()], axis=1)
    ways = [(i, i + 1) for i in range(releases - 1)] + [(0, i) for i in range(2, releases)]
    ways = ways[: max(1, MOST_SHIFTED // size)]
    shift = np.arange(-(size - 1), size)
    overlap = size - np.abs(shift)
    for first, second in ways:
        one, other = until[first], until[second]
        circular = torch.fft.irfft(
            transformed[first].conj() * transformed[second], n=length
        ).numpy()
        ahead = np.where(shift >= 0, one[overlap], one[size] - one[size - overlap])
        behind = np.where(shift >= 0, other[size] - other[size - overlap], other[overlap])
        shifted = Pairs(circular[shift], (ahead + behind) / 2, np.where(shift == 0, 0, overlap))
        convolved = torch.fft.irfft(transformed[first] * transformed[second], n=length).numpy()
        about = np.arange(2 * size - 1)
        start, stop = np.maximum(0, about - size + 1), np.minimum(about, size - 1) + 1
        squares = (one[stop] - one[start] + other[stop] - other[start]) / 2
        reverse = Pairs(convolved[: 2 * size - 1], squares, stop - start)
        for how, pairs in (("shifted", shifted), ("reversed", reverse)):
            found = pairs.strongest(level / (2 * len(ways)))
            if found is None:
                continue
            way, _ = found
            rho = pairs.correlation(way)
            by = f" by {abs(int(shift[way[0]]))} values" if how == "shifted" else ""
            yield Violation(
                _fault(rho),
                SHIFTED(
                    first=first + 1,
                    second=second + 1,
                    shifted=how + by,
                    rho=rho,
                    count=int(pairs.counts[way]),
                ),
                abs(rho),
            )
            return


def drawn_twice(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Values that occur again elsewhere, in the same release or in any, or with the other sign.

    Neighbours among the sorted values that are hardly apart are counted. Their expected number is
    at most that of such pairs, whatever was added to the noise; changing one value changes the
    number by two at most (McDiarmid 1989). What the share may be off only widens the search.
    """
    grain = residuals.grain_up_to(MOST_LOOKED_AT)
    ways = [*itertools.product((False, True), (False, True))]
    widths = [*itertools.product((1e-7, 1e-6, 1e-5), (0.0, 2 * residuals.worst_rounding))]
    for together, negated in ways:
        rows = residuals.flat.abs() if negated else residuals.flat
        values = rows.reshape(1, -1) if together else rows
        if (together and residuals.releases == 1) or values.shape[1] > 2**25:
            continue
        releases, size = values.shape
        ordered = values.sort(dim=1).values
        gaps = ordered.diff(dim=1)
        sizes = ordered[:, 1:].abs()
        gaps = gaps[(sizes > AWAY_FROM_ZERO) & (sizes < MOST_LOOKED_AT)]
        for width, slack in widths:
            counted = int((gaps <= width + slack).sum())
            pairs = releases * size * (size - 1) / 2 * (2 if negated else 1)
            expected = pairs * 2 * (width + slack + 2 * grain) * residuals.pair_density
            excess = counted - expected
            count = releases * size
            comparisons = len(ways) * len(widths)
            if excess > 0 and 2 * count * math.log(comparisons / level) < excess**2:
                where = "in all releases together" if together else "in a release"
                sign = ", up to sign" if negated else ""
                yield Violation(
                    "repeated",
                    DRAWN_TWICE(
                        share=counted / count,
                        in_a_release=where + sign,
                        width=width + slack,
                        fresh=expected / count,
                    ),
                    counted / count,
                )
                return


def subspaces(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise of fewer dimensions than it has values, over releases or within a matrix.

    Of n independent normal vectors the triangular factor of their Gram matrix has independent
    normal values below its diagonal and chi values on it (Bartlett 1933). The latter give the
    scale; half of the former are beyond their median, so that a few pairs that agree hardly count.
    """
    parts = {"the gradient": residuals.flat, **residuals.values}
    matrices = {
        name: values.reshape(len(values), residuals.shapes[name][0], -1)
        for name, values in residuals.values.items()
        if len(residuals.shapes[name]) > 1 and values.shape[1] == residuals.shapes[name].numel()
    }
    level /= len(parts) + len(matrices)
    for name, values in parts.items():
        if len(values) < FEWEST_CALLS:
            continue
        own = values if values.shape[0] <= values.shape[1] else values.T
        if len(own) < 2:
            continue
        yield from _subspace(f"the noise of {name} over releases", own[None], level)
    for name, matrix in matrices.items():
        rows = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.transpose(1, 2)
        if rows.shape[1] > 1:
            yield from _subspace(f"the noise in {name}", rows, level)


def _subspace(what: str, vectors: torch.Tensor, level: float) -> Iterator[Violation]:
    """The violations in m sets of n vectors each, (m, n, size)."""
    count, size = vectors.shape[1:]
    gram = vectors @ vectors.transpose(1, 2)
    eigenvalues = torch.linalg.eigvalsh(gram)
    rank = int((eigenvalues > RANK * eigenvalues[:, -1:]).sum(1).max())
    if rank < count:
        yield Violation("subspace", FEW_DIMENSIONS(the_noise=what, rank=rank, count=count))
        return
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return
    squares = factor.square()
    free = len(vectors) * (count * size - count * (count - 1) / 2)
    variance = float(squares.diagonal(dim1=1, dim2=2).sum()) / free
    surely = variance * (1 + CERTAIN * math.sqrt(2 / free))
    rows, columns = torch.tril_indices(count, count, -1)
    below = squares[:, rows, columns].flatten()
    beyond = int((below > MEDIAN * surely).sum())
    if bdtrc(beyond - 1, below.numel(), 0.5) <= level / 2:
        times = float(below.median()) / (MEDIAN * variance)
        yield Violation(
            "subspace",
            AS_FEW_DIMENSIONS(the_noise=what, count=size / times, size=size),
            1 - 1 / times if times > 1 else 0.0,
        )


def offsets(residuals: Residuals, level: float) -> Iterator[Violation]:
    """What all releases have in common, with the same sign or with alternating ones.

    The mean's sum of squares and the rest are independent chi-squared sums, so that their quotient
    has an F distribution, whatever the scale.
    """
    if residuals.releases < 2:
        return
    parts = {"the gradient": residuals.flat, **residuals.values}
    signs = torch.ones(2, residuals.releases, dtype=torch.double)
    signs[1, 1::2] = -1
    for name, values in parts.items():
        whole = float(values.square().sum())
        releases, size = values.shape
        for sign, how in zip(signs, ("", ", with alternating signs"), strict=True):
            mean = (sign @ values) / releases
            common = releases * float(mean.square().sum())
            quotient = (releases - 1) * common / max(whole - common, 1e-300)
            p_value = fdtrc(size, (releases - 1) * size, quotient)
            if p_value * 2 * len(parts) <= level:
                share = common / whole
                yield Violation(
                    "offset",
                    OFFSET(
                        share=share,
                        name=name,
                        releases=releases,
                        with_alternating_signs=how,
                        fresh=1 / releases,
                    ),
                    share,
                )
                return


def spectra(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Frequencies along the gradient or a tensor that hold too much or too little.

    The share of one frequency in the sum of all has a beta distribution.
    """
    parts = {WHOLE: residuals.flat, **residuals.values}
    parts = {name: v for name, v in parts.items() if v.shape[1] >= FEWEST_FREQUENCIES}
    for name, values in parts.items():
        releases, size = values.shape
        power = torch.zeros(size // 2 + 1, dtype=torch.double)
        for row in values:
            power += torch.fft.rfft(row, norm="ortho").abs().square()
        free = np.full(len(power), 2.0)
        free[0] = 1
        if size % 2 == 0:
            free[-1] = 1
        energy = power.numpy() * free
        total = energy.sum()
        own, rest = releases * free / 2, releases * (size - free) / 2
        share = np.clip(energy / total, 0, 1)
        most = betainc(rest, own, 1 - share)
        least = betainc(own, rest, share)
        p_values = np.minimum(most, least)
        at = int(p_values.argmin())
        if p_values[at] * 2 * len(power) * len(parts) <= level:
            times = share[at] * size / free[at]
            many = int((p_values * 2 * len(power) * len(parts) <= level).sum())
            yield Violation(
                "coloured",
                NOT_WHITE(name=name, count=many, frequencies=len(power), waves=at, times=times),
            )
            return
