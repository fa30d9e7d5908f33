"""Sparsification by a threshold."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses.base import NoiseBound, Trace
from ggl_audit.defenses.masking import Masking
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.messages import Message, Said

ROUNDING = 1e-6

SMALLEST_MAGNITUDE = Message(
    "contradiction/smallest-magnitude",
    "the smallest magnitude but zero is {least:.6g}; the threshold is {threshold:g}",
    advice="Correct the threshold, or capture after it.",
)
ALL_BELOW = Message(
    "check/all-below",
    "all values are zero; the threshold is {threshold:g}",
    advice="Nothing.",
)


class Threshold(Masking):
    """Sets the values to zero whose magnitude is below a threshold; the others stay as they are.

    The threshold is in the gradient's own units and the same for all tensors (Strom, Interspeech
    2015, who sends the threshold for each value above it; Dutta et al., AAAI 2020).
    """

    name: ClassVar[str] = "threshold"
    source: ClassVar[str] = "Strom, Interspeech 2015; Dutta et al., AAAI 2020"
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "values"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm", "zeros", "values"})
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    least: float = Field(gt=0, description="smallest magnitude that is kept")

    def foreseen(self, gradient: Gradient) -> Gradient:
        """The values that reach the threshold."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            return torch.where(tensor.abs() >= self.least, tensor, torch.zeros_like(tensor))

        return each(kept, gradient)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds a value below the threshold that is not zero."""
        magnitudes = flat(observed).abs()
        magnitudes = magnitudes[magnitudes > 0]
        if not len(magnitudes):
            return False, ALL_BELOW(threshold=self.least)
        least = float(magnitudes.min())
        said = SMALLEST_MAGNITUDE(least=least, threshold=self.least)
        return least < self.least * (1 - ROUNDING), said

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """Kept values by their density, removed ones by P(value plus noise is below)."""
        parts = []
        for name, tensor in observed.items():
            mean, seen = widened(before[name]), widened(tensor)
            removed = noise.log_probability(-self.least - mean, self.least - mean)
            parts.append(torch.where(seen == 0, removed, noise.log_densities(seen - mean)).sum())
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """A tensor of small values goes as a whole."""
        return False
