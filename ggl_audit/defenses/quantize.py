"""Uniform quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, flat
from ggl_audit.defenses.base import Context, Defense, NoiseBound, Trace
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.defenses.sign import WIDTH
from ggl_audit.messages import Message, Said

SMALLEST_STEP = 1e-30
MIDWAY = 1e-3

WIDEST = 0.5
"""A slope, in steps: nearly a straight line."""

LEVELS = Message(
    "contradiction/levels",
    "{name} has {count} levels; {bits} bits allow {levels}",
    advice="Correct `bits` and `scope`, or capture after the quantization and before anything "
    "else.",
)


class Quantize(Defense):
    """Rounds each value to the nearest of 2^bits levels between the smallest and the largest.

    The grid spans the whole gradient, or each tensor has its own (Jacob et al., Quantization and
    Training of Neural Networks, CVPR 2018, equation 1, without the constraint that zero is a
    level).
    """

    name: ClassVar[str] = "quantize"
    source: ClassVar[str] = "Jacob et al., CVPR 2018"
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset()
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    bits: int = Field(ge=1, le=16, description="each grid has 2^bits levels")
    scope: Literal["global", "layer"] = Field(
        default="global", description="one grid over the whole gradient, or one for each tensor"
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Rounds to the gradient's own grid."""
        return self._rounded(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, on the candidate's own grid.

        The capture's grid would be exact for the true image as well, but tell less: a grid shows
        the smallest and the largest value unrounded. A value midway between two levels, as zero is
        where the smallest is minus the largest, may be rounded either way: as was observed.
        """
        if observed is None:
            return self._rounded(gradient)
        rounded = {}
        for name, (low, step) in self._grids(gradient).items():
            nearer = ((observed[name] - gradient[name]) / step).clamp(-MIDWAY, MIDWAY)
            places = ((gradient[name] - low) / step + nearer).round()
            rounded[name] = torch.addcmul(low, step, places)
        return rounded

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Has slopes for the risers of the staircase, as wide as those of a smooth sign."""
        smoothed = {}
        for name, (low, step) in self._grids(gradient).items():
            tensor = gradient[name]
            width = (WIDTH * tensor.square().mean().sqrt() / step).clamp(1e-6, WIDEST)
            place = (tensor - low) / step
            below = place.detach().floor()
            rise = torch.tanh((place - below - 0.5) / width) / torch.tanh(0.5 / width)
            smoothed[name] = low + step * (below + (1 + rise) / 2)
        return smoothed

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds more levels than bits allow."""
        parts = {"the gradient": flat(observed)} if self.scope == "global" else observed
        counts = {name: _levels(tensor) for name, tensor in parts.items()}
        where = max(counts, key=lambda name: counts[name])
        count, allowed = counts[where], 2**self.bits
        return count > allowed, LEVELS(name=where, count=count, bits=self.bits, levels=allowed)

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """The sum of log P(value plus noise is rounded to what was observed), on its own grid.

        Where the grid is a single point nothing was rounded, and it is the density.
        """
        parts = []
        for name, (_, step) in self._grids(observed).items():
            residual = widened(observed[name] - before[name])
            rounded = noise.log_probability(residual - step / 2, residual + step / 2)
            as_it_was = noise.log_densities(residual)
            parts.append(torch.where(step > SMALLEST_STEP, rounded, as_it_was).sum())
        return torch.stack(parts).sum()

    def _grids(self, gradient: Gradient) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The lowest level and the step, for each tensor."""
        lows = {name: tensor.min() for name, tensor in gradient.items()}
        highs = {name: tensor.max() for name, tensor in gradient.items()}
        if self.scope == "global":
            lows = dict.fromkeys(gradient, torch.stack([*lows.values()]).min())
            highs = dict.fromkeys(gradient, torch.stack([*highs.values()]).max())
        steps = 2**self.bits - 1
        return {
            name: (low, ((highs[name] - low) / steps).clamp(min=SMALLEST_STEP))
            for name, low in lows.items()
        }

    def _rounded(self, gradient: Gradient) -> Gradient:
        return {
            name: low + step * ((gradient[name] - low) / step).round()
            for name, (low, step) in self._grids(gradient).items()
        }


def _levels(tensor: torch.Tensor) -> int:
    values = widened(tensor)
    span = float(values.max() - values.min())
    # Other implementations round the same level differently in its last bits.
    return len(((values - values.min()) / max(span, 1e-300) * 2**20).round().unique())
