"""Uniform quantization."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.defenses.base import Context, Defense, Distribution, NoiseBound, Trace
from ggl_audit.defenses.noise import Noise
from ggl_audit.gradient import Gradient, each, flat


class Quantize(Defense):
    """Rounds each value to the nearest of 2^bits levels between the smallest and the largest.

    The grid spans the whole gradient (Jacob et al., Quantization and Training of Neural Networks,
    CVPR 2018, equation 1, without the constraint that zero is a level).
    """

    name: ClassVar[str] = "quantize"
    source: ClassVar[str] = "Jacob et al., CVPR 2018"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset()
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    bits: int = Field(ge=1, le=16, description="the gradient takes 2^bits levels")

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Rounds to the gradient's own grid."""
        return self._rounded(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, on the candidate's own grid."""
        return self._rounded(gradient)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Finds more levels than bits allow."""
        values = flat(observed).double()
        span = float(values.max() - values.min())
        # Other implementations round the same level differently in its last bits.
        grid = ((values - values.min()) / max(span, 1e-300) * 2**20).round()
        levels = len(grid.unique())
        return levels > 2**self.bits, f"{levels} levels; {self.bits} bits allow {2**self.bits}"

    def log_likelihood(self, before: Gradient, noise: Noise, observed: Gradient) -> torch.Tensor:
        """The sum of log P(value plus noise is rounded to what was observed), on its own grid."""
        _, step = self._grid(observed)
        parts = []
        for name, tensor in observed.items():
            residual = (tensor - before[name]).double()
            parts.append(noise.log_probability(residual - step / 2, residual + step / 2).sum())
        return torch.stack(parts).sum()

    def _grid(self, gradient: Gradient) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.stack([tensor.min() for tensor in gradient.values()]).min()
        high = torch.stack([tensor.max() for tensor in gradient.values()]).max()
        return low, ((high - low) / (2**self.bits - 1)).clamp(min=1e-30)

    def _rounded(self, gradient: Gradient) -> Gradient:
        low, step = self._grid(gradient)
        return each(lambda tensor: low + step * ((tensor - low) / step).round(), gradient)
