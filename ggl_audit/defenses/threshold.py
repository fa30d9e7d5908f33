"""Sparsification by a threshold."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.defenses.base import Context, Distribution, NoiseBound, ReplicaKind, Trace
from ggl_audit.defenses.error_feedback import ErrorFeedback
from ggl_audit.defenses.noise import Noise
from ggl_audit.gradient import Gradient, each, flat

ROUNDING = 1e-6


class Threshold(ErrorFeedback):
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

    def compressed(self, gradient: Gradient, context: Context) -> Gradient:
        """Keeps the values that reach the threshold."""
        return self._restricted(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Keeps what the client kept, read off the capture; if hidden, what reaches the threshold.

        The observed mask is the better one: a candidate is asked for its values there also where
        they are too small.
        """
        if observed is None:
            return self._restricted(gradient)
        kept = {name: (tensor != 0).to(tensor.dtype) for name, tensor in observed.items()}
        return {name: tensor * kept[name] for name, tensor in gradient.items()}

    def replica_kind(self, readable: bool) -> ReplicaKind:
        """By the mask of the capture."""
        return "values" if readable else "whole"

    def readings(self, observed: Gradient) -> Gradient:
        """What was sent, which is not zero where the client kept a value."""
        return observed

    def on_values(self, values: torch.Tensor, readings: torch.Tensor) -> torch.Tensor:
        """Keeps what the client kept."""
        return values.mul_((readings != 0).to(values.dtype))

    @property
    def reads(self) -> Trace:
        """What was kept."""
        return "mask"

    def exact_replica(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Keeps what reaches the threshold: where that is tells the image as well."""
        if self.error_feedback:
            return self.replicate(gradient, observed)
        return self._restricted(gradient)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Finds a value below the threshold that is not zero."""
        magnitudes = flat(observed).abs()
        magnitudes = magnitudes[magnitudes > 0]
        if not len(magnitudes):
            return False, f"all values are zero; the threshold is {self.least:g}"
        least = float(magnitudes.min())
        detail = f"the smallest magnitude but zero is {least:.6g}; the threshold is {self.least:g}"
        return least < self.least * (1 - ROUNDING), detail

    def log_likelihood(self, before: Gradient, noise: Noise, observed: Gradient) -> torch.Tensor:
        """Kept values by their density, removed ones by P(value plus noise is below)."""
        parts = []
        for name, tensor in observed.items():
            mean, seen = before[name].double(), tensor.double()
            removed = noise.log_probability(-self.least - mean, self.least - mean)
            parts.append(torch.where(seen == 0, removed, noise.log_densities(seen - mean)).sum())
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """A tensor of small values goes as a whole."""
        return False

    def _restricted(self, gradient: Gradient) -> Gradient:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            return torch.where(tensor.abs() >= self.least, tensor, torch.zeros_like(tensor))

        return each(kept, gradient)
