"""How often right noise is accused, and how often each kind of wrong noise is found and named.

    python benchmarks/noise.py --right 1000 --wrong 20

Releases have the shapes of the digits' model; their shares are clipped to norm 1, the noise
multiplier is 1. A wrong client makes 64 releases as an audit does. Right ones are also judged at a
probability of false accusation that is large enough to be seen, where they must be accused no more
often than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from ggl_audit.basics.gradient import Gradient, each, take
from ggl_audit.defenses import FALSE_ACCUSATION, Context, Noise
from ggl_audit.evidence.noise_residuals import Fault, residuals_of
from ggl_audit.evidence.noise_tests import Violation, find_violations
from ggl_audit.experiments.noise import RELEASES

SHAPES = {
    "conv1.weight": (16, 1, 3, 3),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3),
    "conv2.bias": (32,),
    "hidden.weight": (32, 512),
    "hidden.bias": (32,),
    "head.weight": (10, 32),
    "head.bias": (10,),
}
SEEN = 0.05
"""A probability of false accusation that many trials can show."""

Draw = torch.Generator
Wrong = Callable[[Gradient, Gradient, Draw], Gradient]
"""From right noise, the shares and randomness to wrong noise; all with a leading dimension."""


@dataclass(frozen=True)
class Planted:
    """One kind of wrong noise.

    Attributes:
        name: what the table calls it.
        noise: makes it.
        faults: of which one names it.
    """

    name: str
    noise: Wrong
    faults: tuple[Fault, ...]


def right(shares: Gradient, noise: Noise, draw: Draw) -> Gradient:
    """Fresh noise for each release."""
    zeros = each(torch.zeros_like, shares)
    context = Context(draw)
    rows = [noise.apply(take(zeros, i), context) for i in range(len(next(iter(zeros.values()))))]
    return {name: torch.stack([row[name] for row in rows]) for name in shares}


def shares_of(releases: int, draw: Draw) -> Gradient:
    """Shares of norm 1 with zeros, those of the first half once more in the second."""
    half = max(1, releases // 2)
    rough = {
        name: torch.randn(half, *shape, generator=draw)
        * torch.randn(half, *shape, generator=draw).relu()
        for name, shape in SHAPES.items()
    }
    norms = torch.stack([t.flatten(1).norm(dim=1) for t in rough.values()]).norm(dim=0)

    def clipped(tensor: torch.Tensor) -> torch.Tensor:
        once = tensor / norms.view(-1, *[1] * (tensor.ndim - 1))
        return torch.cat([once, once])[:releases]

    return each(clipped, rough)


def each_release(noise: Gradient, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Gradient:
    """Changes the noise of each release, given its number."""
    return {n: torch.stack([change(t, i) for i in range(len(t))]) for n, t in noise.items()}


def cut(rows: torch.Tensor) -> Gradient:
    """Rows (n, size) as releases."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = zip(SHAPES.items(), rows.split(sizes, dim=1), strict=True)
    return {name: part.reshape(-1, *shape) for (name, shape), part in parts}


def joined(noise: Gradient) -> torch.Tensor:
    """Releases as rows (n, size)."""
    return torch.cat([tensor.flatten(1) for tensor in noise.values()], dim=1)


def tiled(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """64 values over and over."""
    short = torch.randn(len(noise["head.bias"]), 64, generator=draw)

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor[0].numel()
        return short.repeat(1, -(-size // 64))[:, :size].reshape(tensor.shape)

    return each(repeated, noise)


def seeded_alike(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Every tensor from the seed of the step."""
    seeds = torch.randint(2**31, (len(noise["head.bias"]),), generator=draw).tolist()
    return {
        name: torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
        for name, shape in SHAPES.items()
    }


def shared_by_two(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """The head's weights begin with the noise of the hidden bias."""
    head = noise["head.weight"].flatten(1).clone()
    head[:, :32] = noise["hidden.bias"]
    return {**noise, "head.weight": head.reshape(noise["head.weight"].shape)}


def reversed_in_another(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """The head has the end of the hidden weights' noise, from back to front."""
    head = noise["hidden.weight"].flatten(1)[:, -320:].flip(1)
    return {**noise, "head.weight": head.reshape(noise["head.weight"].shape)}


def without(share: float) -> Wrong:
    """A share of the values, drawn anew, has no noise."""

    def left_out(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
        return each(lambda t: t * (torch.rand(t.shape, generator=draw) >= share), noise)

    return left_out


def weaker(name: str, factor: float) -> Wrong:
    """The noise of one tensor has another strength."""
    return lambda noise, shares, draw: {**noise, name: factor * noise[name]}


def student(freedom: int) -> Wrong:
    """Student's t, of the declared variance."""

    def drawn(tensor: torch.Tensor, draw: Draw) -> torch.Tensor:
        squares = sum(torch.randn(tensor.shape, generator=draw) ** 2 for _ in range(freedom))
        scale = math.sqrt((freedom - 2) / freedom)
        return scale * tensor / torch.sqrt(torch.as_tensor(squares) / freedom)

    return lambda noise, shares, draw: each(lambda tensor: drawn(tensor, draw), noise)


def truncated(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Nothing beyond two standard deviations."""
    low = float(torch.special.ndtr(torch.tensor(-2.0)))

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(tensor.shape, generator=draw, dtype=torch.double)
        return torch.special.ndtri(low + (1 - 2 * low) * uniform).float()

    return each(drawn, noise)


def half_the_dimensions(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """In a random half of a rotated space, at the declared strength."""
    rows = joined(noise)
    size = rows.shape[1]
    signs = torch.randn(size, generator=draw).sign()
    kept = torch.rand(size // 2 + 1, generator=draw) < 0.5
    spectrum = torch.fft.rfft(rows * signs, dim=1) * kept
    projected = torch.fft.irfft(spectrum, n=size, dim=1) * signs
    return cut(projected / projected.square().mean().sqrt())


def few_dimensions(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Combinations of ten vectors."""
    weights = torch.randn(len(noise["head.bias"]), 10, generator=draw) / math.sqrt(10)
    size = joined(noise).shape[1]
    return cut(weights @ torch.randn(10, size, generator=draw))


def low_rank_matrix(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """The hidden weights' noise is a product of two narrow matrices, fresh in each release."""
    count = len(noise["head.bias"])
    outputs, inputs = SHAPES["hidden.weight"]
    narrow = torch.randn(count, outputs, 8, generator=draw)
    wide = torch.randn(count, 8, inputs, generator=draw)
    return {**noise, "hidden.weight": narrow @ wide / math.sqrt(8)}


def along_rows(rho: float) -> Wrong:
    """Neighbours in memory correlate."""

    def moving(tensor: torch.Tensor, draw: Draw) -> torch.Tensor:
        fresh = torch.randn(len(tensor), tensor[0].numel() + 1, generator=draw)
        mixed = (fresh[:, 1:] + rho * fresh[:, :-1]) / math.sqrt(1 + rho**2)
        return mixed.reshape(tensor.shape)

    return lambda noise, shares, draw: each(lambda tensor: moving(tensor, draw), noise)


def matrix_factorization(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Each release takes half of the last one's noise away again, as DP-FTRL does."""

    def banded(tensor: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(tensor[:1]), tensor[:-1]])
        return (tensor - before / 2) / math.sqrt(1.25)

    return each(banded, noise)


def shifted(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """One stream, read seven values further on in each release."""
    releases, size = joined(noise).shape
    stream = torch.randn(size + 7 * releases, generator=draw)
    return cut(torch.stack([stream[7 * i : 7 * i + size] for i in range(releases)]))


def mixture(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Half of the values have half of the noise, the others as much more."""

    def mixed(tensor: torch.Tensor) -> torch.Tensor:
        weak = torch.rand(tensor.shape, generator=draw) < 0.5
        return torch.where(weak, tensor / 2, math.sqrt(1.75) * tensor)

    return each(mixed, noise)


def by_gradient(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Wrong:
    """Noise that depends on the share which it is added to."""
    return lambda noise, shares, draw: {n: change(noise[n], shares[n]) for n in noise}


def above(share: torch.Tensor, quantile: float) -> torch.Tensor:
    """Which values of each release are among the largest."""
    sizes = share.flatten(1).abs()
    limit = sizes.quantile(quantile, dim=1)[:, None]
    return (sizes >= limit).reshape(share.shape)


def one_value(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """One weight never has noise."""
    hidden = noise["hidden.weight"].clone()
    hidden[:, 3, 7] = 0
    return {**noise, "hidden.weight": hidden}


def from_a_table(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """Drawn from 65,536 numbers that were drawn once."""
    table = torch.randn(2**16, generator=draw)
    return each(lambda t: table[torch.randint(2**16, t.shape, generator=draw)], noise)


def on_a_grid(bits: int) -> Wrong:
    """Rounded to multiples of a power of two."""
    return lambda noise, shares, draw: each(lambda t: (t * 2**bits).round() / 2**bits, noise)


def used_twice(share: float, sign: int) -> Wrong:
    """A share of the values of each release is that of others, in random places."""

    def copied(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
        rows = joined(noise).clone()
        for row in rows:
            places = torch.randperm(len(row), generator=draw)
            count = int(share * len(row) / 2)
            row[places[:count]] = sign * row[places[count : 2 * count]]
        return cut(rows)

    return copied


def offset(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """A tenth of the variance is the same in all releases."""

    def mixed(tensor: torch.Tensor) -> torch.Tensor:
        fixed = torch.randn(tensor.shape[1:], generator=draw)
        return math.sqrt(0.1) * fixed + math.sqrt(0.9) * tensor

    return each(mixed, noise)


def along_gradient(factor: float) -> Wrong:
    """The noise has another strength along the gradient that it is added to."""

    def scaled(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
        rows, units = joined(noise), torch.nn.functional.normalize(joined(shares), dim=1)
        return cut(rows + (factor - 1) * (rows * units).sum(1, keepdim=True) * units)

    return scaled


def without_directions(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """No noise in the three directions that the gradients vary along most."""
    rows = joined(noise)
    directions = torch.linalg.svd(joined(shares), full_matrices=False).Vh[:3]
    return cut(rows - rows @ directions.T @ directions)


def weak_where_largest(noise: Gradient, shares: Gradient, draw: Draw) -> Gradient:
    """The largest value of each gradient has a tenth of the noise."""
    rows = joined(noise)
    largest = joined(shares).abs().argmax(dim=1, keepdim=True)
    return cut(rows.scatter(1, largest, rows.gather(1, largest) / 10))


MISSING: tuple[Fault, ...] = ("missing",)
AGAIN: tuple[Fault, ...] = ("repeated", "correlated")
SHAPE: tuple[Fault, ...] = ("distribution", "scale")

PLANTED = [
    Planted(
        "the same in all releases",
        lambda n, s, d: each_release(n, lambda t, i: t[0]),
        ("repeated",),
    ),
    Planted(
        "the same in every second release",
        lambda n, s, d: each_release(n, lambda t, i: t[i if i % 2 else 0]),
        ("repeated",),
    ),
    Planted(
        "the negative in every second release",
        lambda n, s, d: each_release(n, lambda t, i: (-1) ** i * t[i // 2 * 2]),
        ("repeated",),
    ),
    Planted(
        "decided by the image",
        lambda n, s, d: each(lambda t: torch.cat([t[: len(t) // 2]] * 2), n),
        ("repeated",),
    ),
    Planted("one stream, shifted by 7 values", shifted, ("repeated",)),
    Planted("taken back by half in the next release (DP-FTRL)", matrix_factorization, AGAIN),
    Planted("a tenth of it fixed", offset, ("correlated", "offset")),
    Planted("64 values repeated", tiled, ("repeated",)),
    Planted("each tensor from the same seed", seeded_alike, ("repeated",)),
    Planted("two tensors of different size begin alike", shared_by_two, ("repeated",)),
    Planted("one tensor has another's, reversed", reversed_in_another, ("repeated",)),
    Planted("correlation 0.1 along rows", along_rows(0.1), AGAIN),
    Planted("correlation 0.02 along rows", along_rows(0.02), AGAIN),
    Planted("half of the dimensions", half_the_dimensions, ("subspace",)),
    Planted("ten dimensions", few_dimensions, ("subspace", "correlated")),
    Planted("a matrix of rank 8 in 32", low_rank_matrix, ("subspace",)),
    Planted("1 % of values without", without(0.01), MISSING),
    Planted("0.3 % of values without", without(0.003), MISSING),
    Planted("0.01 % of values without", without(1e-4), MISSING),
    Planted("one weight of 21,546 without", one_value, MISSING),
    Planted("none where the gradient is zero", by_gradient(lambda n, s: n * (s != 0)), MISSING),
    Planted("0.9 of the strength in a tensor of 4,608", weaker("conv2.weight", 0.9), ("scale",)),
    Planted("0.9 of the strength in a tensor of 144", weaker("conv1.weight", 0.9), ("scale",)),
    Planted("0.9 of the strength in a tensor of 10", weaker("head.bias", 0.9), ("scale",)),
    Planted("0.5 of the strength in a tensor of 10", weaker("head.bias", 0.5), ("scale",)),
    Planted(
        "half where the gradient is among the largest 1 %",
        by_gradient(lambda n, s: torch.where(above(s, 0.99), n / 2, n)),
        ("scale",),
    ),
    Planted("none along the gradient", along_gradient(0), ("direction",)),
    Planted("a tenth along the gradient", along_gradient(0.1), ("direction",)),
    Planted("twice along the gradient", along_gradient(2), ("direction",)),
    Planted("none along three fixed directions", without_directions, ("direction",)),
    Planted("a tenth at the gradient's largest value", weak_where_largest, ("scale",)),
    Planted("half the values weaker, half stronger", mixture, SHAPE),
    Planted("Student's t, 5 degrees of freedom", student(5), SHAPE),
    Planted("Student's t, 30 degrees of freedom", student(30), SHAPE),
    Planted("truncated at two deviations", truncated, SHAPE),
    Planted("cut off at three", lambda n, s, d: each(lambda t: t.clamp(-3, 3), n), ("discrete",)),
    Planted(
        "uniform",
        lambda n, s, d: each(lambda t: math.sqrt(12) * (torch.rand(t.shape, generator=d) - 0.5), n),
        SHAPE,
    ),
    Planted("Laplace", lambda n, s, d: right(n, Noise(std=1, distribution="laplace"), d), SHAPE),
    Planted("drawn in float16", lambda n, s, d: each(lambda t: t.half().float(), n), ("discrete",)),
    Planted(
        "rounded to three digits",
        lambda n, s, d: each(lambda t: t.round(decimals=3), n),
        ("discrete",),
    ),
    Planted("on a grid of 2^-15", on_a_grid(15), ("discrete", "repeated")),
    Planted("on a grid of 2^-17", on_a_grid(17), ("discrete", "repeated")),
    Planted("a quarter used twice", used_twice(0.25, 1), AGAIN),
    Planted("4 % used twice, with the other sign", used_twice(0.04, -1), AGAIN),
    Planted("from a table of 65,536", from_a_table, ("discrete", "repeated")),
    Planted(
        "with the gradient's sign",
        by_gradient(lambda n, s: n.abs() * s.sign()),
        ("dependent", "missing"),
    ),
    Planted("a mean of 0.05", lambda n, s, d: each(lambda t: t + 0.05, n), ("bias",)),
]


def judge(
    noise: Gradient, shares: Gradient, std: float, declared: Noise, level: float
) -> list[Violation]:
    """What the tests say of releases."""
    sent = {name: shares[name] + std * noise[name] for name in shares}
    residuals = residuals_of(sent, declared.law, shares, paired=True)
    assert residuals is not None
    return find_violations(residuals, level)


def accused(seed: int, releases: int, distribution: str, level: float) -> tuple[bool, bool]:
    """Whether right noise is accused: of a client's releases, and of one capture."""
    draw = torch.Generator().manual_seed(seed)
    declared = Noise.model_validate({"std": 1.0, "distribution": distribution})
    shares = shares_of(releases, draw)
    noise = right(shares, declared, draw)
    found = judge(noise, shares, 1.0, declared, level)
    first = {name: shares[name][:1] + noise[name][:1] for name in shares}
    capture = residuals_of(first, declared.law)
    assert capture is not None
    return bool(found), bool(find_violations(capture, level))


def found_in(planted: Planted, seed: int) -> tuple[bool, bool]:
    """Whether wrong noise is found, and named by the first thing that is said."""
    draw = torch.Generator().manual_seed(seed)
    declared = Noise(std=1.0)
    shares = shares_of(RELEASES, draw)
    noise = planted.noise(right(shares, declared, draw), shares, draw)
    found = judge(noise, shares, 1.0, declared, FALSE_ACCUSATION)
    return bool(found), bool(found) and found[0].fault in planted.faults


def main(
    right: Annotated[int, typer.Option(help="trials of right noise, of each distribution")] = 1000,
    wrong: Annotated[int, typer.Option(help="trials of each kind of wrong noise")] = 20,
    releases: Annotated[int, typer.Option(help="of a right client in a trial")] = 4,
) -> None:
    """Prints the rate of false accusation, and the power, as Markdown."""
    torch.set_num_threads(1)
    for distribution in ("gaussian", "laplace") if right else ():
        counts = {level: [0, 0] for level in (SEEN, FALSE_ACCUSATION)}
        for seed in range(right):
            for level, count in counts.items():
                found = accused(seed, releases, distribution, level)
                count[:] = (before + one for before, one in zip(count, found, strict=True))
                if not any(found):
                    break  # what is not accused here is not accused at a smaller probability
        for level, (clients, captures) in counts.items():
            typer.echo(
                f"{distribution}, at most {level:g}: accused {clients} of {right} clients and "
                f"{captures} of {right} captures"
            )
    typer.echo("\n| noise | found | named |\n| --- | --- | --- |")
    for planted in PLANTED if wrong else ():
        counts = [found_in(planted, seed) for seed in range(wrong)]
        found, named = (sum(column) for column in zip(*counts, strict=True))
        typer.echo(f"| {planted.name} | {found}/{wrong} | {named}/{wrong} |")


if __name__ == "__main__":
    typer.run(main)
