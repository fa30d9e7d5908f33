"""What is left of releases beside the share that the declaration gives them: the noise.

Each value is divided by the declared standard deviation and, for Laplace noise, mapped to the
normal value of the same probability. If the declaration holds, every value is then an independent
draw of one standard normal distribution, up to the rounding of the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.special import ndtri_exp

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.defenses import Distribution, NoiseLaw
from ggl_audit.messages import Said

Fault = Literal[
    "missing",
    "repeated",
    "correlated",
    "discrete",
    "offset",
    "subspace",
    "coloured",
    "scale",
    "excess",
    "direction",
    "distribution",
    "bias",
    "dependent",
    "share",
]

ROUNDING = 2e-5
"""The rounding of a gradient in single precision, relative to the largest value of its tensor: ten
times what two ways to compute one differ by."""

MOST_ROUNDING = 0.05
"""The most rounding, as a share of a standard deviation, with which the noise can be told."""

MOST_KEPT = 2**18
"""The most values of a tensor; of a larger one its ends are tested, and blocks in between."""

BLOCKS = 32

MOST_SORTED = 2**24

AWAY_FROM_ZERO = 0.05
"""Standard deviations; values nearer to zero may be those without noise."""

LAPLACE_SLOPE = math.sqrt(math.pi)
"""The steepest that the map from Laplace to normal values is: where both are zero."""

NORMAL_DENSITY, LAPLACE_DENSITY = 1 / math.sqrt(2 * math.pi), 1 / math.sqrt(2)
NORMAL_PAIRS, LAPLACE_PAIRS = 1 / (2 * math.sqrt(math.pi)), math.sqrt(2) / 4
"""The largest density of a value in standard deviations, and of the difference of two."""


@dataclass(frozen=True)
class Violation:
    """One way in which noise is not what was declared.

    Attributes:
        fault: what kind it is.
        said: the measured figure beside what was declared.
        strength: of a correlation, or the share of the values; 1 for what is no matter of degree.
    """

    fault: Fault
    said: Said
    strength: float = 1.0

    @property
    def detail(self) -> str:
        """The figures in words, as a sentence without a full stop."""
        return self.said.text


@dataclass(frozen=True)
class Residuals:
    """The noise of n releases, in standard deviations.

    Attributes:
        values: by tensor, (n, size), in double precision.
        shapes: of the tensors.
        rounding: by tensor, the most that a value may be off, most of it the computed share.
        grains: by tensor, what of it depends on the noise: the rounding of what was sent, relative
            to its size, and absolute in standard deviations.
        exact: whether nothing but noise is left; else something unknown that does not depend on the
            noise was added to each value.
        density: the largest that one value has.
        pair_density: the largest that the difference of two values has.
        shares: that were taken out, in standard deviations; None where they are not known.
        paired: whether the second half of the releases is of the images of the first.
    """

    values: dict[str, torch.Tensor]
    shapes: dict[str, torch.Size]
    rounding: dict[str, float]
    grains: dict[str, tuple[float, float]]
    exact: bool
    density: float = NORMAL_DENSITY
    pair_density: float = NORMAL_PAIRS
    shares: dict[str, torch.Tensor] | None = None
    paired: bool = False

    @property
    def releases(self) -> int:
        """How many there are."""
        return len(next(iter(self.values.values())))

    @property
    def count(self) -> int:
        """The values of all of them together."""
        return sum(tensor.numel() for tensor in self.values.values())

    @property
    def worst_rounding(self) -> float:
        """The largest of all tensors."""
        return max(self.rounding.values())

    def grain(self, name: str, largest: float | torch.Tensor) -> float | torch.Tensor:
        """The most that the rounding of what is sent changes values of a tensor, up to a size."""
        relative, absolute = self.grains[name]
        return absolute + relative * (1 + relative) * largest

    def grain_up_to(self, largest: float) -> float:
        """The most of any tensor, where the noise itself is no larger."""
        most = 0.0
        for name in self.values:
            share = 0.0 if self.shares is None else float(self.shares[name].abs().max())
            most = max(most, float(self.grain(name, largest + share)))
        return most

    @property
    def is_normal(self) -> bool:
        """Whether the noise is normal, and not Laplace noise beside something unknown."""
        return self.density == NORMAL_DENSITY

    @functools.cached_property
    def flat(self) -> torch.Tensor:
        """All values of each release in one row, (n, size)."""
        return torch.cat([*self.values.values()], dim=1)

    @functools.cached_property
    def flat_shares(self) -> torch.Tensor:
        """The shares laid out in the same way; only where they are known."""
        assert self.shares is not None
        return torch.cat([self.shares[name] for name in self.values], dim=1)

    @functools.cached_property
    def ordered(self) -> torch.Tensor:
        """The values of all releases, sorted; of very many a part."""
        values = torch.cat([tensor.flatten() for tensor in self.values.values()])
        return values[:: -(-len(values) // MOST_SORTED)].sort().values

    def first(self) -> Residuals:
        """The first release alone."""
        values = {name: tensor[:1] for name, tensor in self.values.items()}
        return replace(self, values=values, shares=None, paired=False)

    def without(self, names: set[str]) -> Residuals:
        """The other tensors."""
        kept = {name: values for name, values in self.values.items() if name not in names}
        return replace(self, values=kept)

    def differences(self) -> Residuals:
        """The residuals of one half less the other, of the same images: what both share cancels."""
        half = self.releases // 2
        values = {
            name: (tensor[:half] - tensor[half : 2 * half]) / math.sqrt(2)
            for name, tensor in self.values.items()
        }
        rounding = {name: math.sqrt(2) * off for name, off in self.rounding.items()}
        grains = {n: (math.sqrt(2) * r, math.sqrt(2) * a) for n, (r, a) in self.grains.items()}
        shares = self.shares
        if shares is not None:
            shares = {name: tensor[:half] for name, tensor in shares.items()}
        return replace(
            self, values=values, rounding=rounding, grains=grains, shares=shares, paired=False
        )


def residuals_of(
    releases: Gradient,
    noise: NoiseLaw,
    shares: Gradient | None = None,
    factor: float = 1.0,
    images: int = 1,
    grain: float = torch.finfo(torch.float32).eps,
    floors: Mapping[str, float] | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
    paired: bool = False,
) -> Residuals | None:
    """Takes the declared shares out of releases.

    Args:
        releases: tensors with a leading dimension n, where the noise came last.
        noise: all of it, as one.
        shares: what the declaration gives without noise, laid out as the releases; None where that
            is not known.
        factor: what the noise has been multiplied by since.
        images: whose gradients were computed, each with its rounding.
        grain: of the releases' numbers, relative.
        floors: by tensor, what their numbers may be off besides.
        shapes: of whole tensors, where only :func:`kept_values` of them are given.
        paired: whether the second half of the releases is of the images of the first.

    Returns:
        None where the gradient's rounding hides the noise of every tensor.
    """
    std = factor * noise.std
    laplace = noise.distribution == "laplace"
    mapped = laplace and shares is not None
    values, rounding, grains, taken = {}, {}, {}, {}
    observed, expected = kept_values(releases), None if shares is None else kept_values(shares)
    for name, sent in observed.items():
        left = widened(sent)
        off = grain * float(left.abs().max()) + (floors or {}).get(name, 0.0)
        if expected is not None:
            share = widened(expected[name])
            off += images * ROUNDING * float(share.abs().max())
            left, taken[name] = left - share, share / std
        steepest = LAPLACE_SLOPE if mapped else 1.0
        off *= steepest / std
        if off <= MOST_ROUNDING:
            values[name] = normal_values(left / std, noise.distribution) if mapped else left / std
            rounding[name] = off
            grains[name] = steepest * grain, steepest * (floors or {}).get(name, 0.0) / std
    if not values:
        return None
    raw = laplace and not mapped
    return Residuals(
        values,
        dict(shapes or {name: tensor.shape[1:] for name, tensor in releases.items()}),
        rounding,
        grains,
        exact=shares is not None,
        density=LAPLACE_DENSITY if raw else NORMAL_DENSITY,
        pair_density=LAPLACE_PAIRS if raw else NORMAL_PAIRS,
        shares=None if shares is None else taken,
        paired=paired,
    )


def normal_values(values: torch.Tensor, distribution: Distribution) -> torch.Tensor:
    """The normal values of the same probability as noise of standard deviation 1."""
    if distribution == "gaussian":
        return values
    tail = torch.from_numpy(ndtri_exp((math.log(0.5) - math.sqrt(2) * values.abs()).numpy()))
    return -torch.sign(values) * tail


def kept_values(gradients: Gradient) -> Gradient:
    """What is tested of releases: every value, or of a large tensor both ends and random blocks.

    The blocks are half of what is kept, one in each of as many equal parts of the rest, and the
    same in every release.

    Args:
        gradients: tensors with a leading dimension n.

    Returns:
        Tensors (n, size), on the CPU.
    """

    def kept(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.detach().reshape(len(rows), -1)
        if rows.shape[1] > MOST_KEPT:
            rows = rows[:, _kept_places(rows.shape[1]).to(rows.device)]
        return rows.cpu()

    return each(kept, gradients)


@functools.lru_cache(maxsize=8)
def _kept_places(size: int) -> torch.Tensor:
    end = MOST_KEPT // 4
    block, part = MOST_KEPT // 2 // BLOCKS, (size - 2 * end) // BLOCKS
    draw = torch.Generator().manual_seed(size)
    inner = []
    for i in range(BLOCKS):
        within = int(torch.randint(part - block + 1, (), generator=draw))
        first = end + i * part + within
        inner.append(torch.arange(first, first + block))
    return torch.cat([torch.arange(end), *inner, torch.arange(size - end, size)])


def more_than_declared(ratio: float) -> str:
    """What a ratio of standard deviations above 1 means, as the end of a sentence."""
    return "" if ratio <= 1 else " (more than declared: the declaration is wrong)"


def grain_of(tensors: Sequence[torch.Tensor]) -> float:
    """The relative rounding of numbers, by the coarsest format that they all are of."""
    for kind in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(kind).to(t.dtype), t) for t in tensors):
            return torch.finfo(kind).eps
    return torch.finfo(torch.float32).eps
