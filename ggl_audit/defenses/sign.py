"""One-bit quantization."""

from __future__ import annotations

from typing import ClassVar

import torch

from ggl_audit.defenses.base import Context, Defense, Distribution, NoiseBound, Trace
from ggl_audit.defenses.noise import Noise
from ggl_audit.gradient import Gradient, each, flat

ROUNDING = 1e-5


class Sign(Defense):
    """Sends the sign of each value: -1, 0 or 1, times a step that is common to all.

    signSGD (Bernstein et al., ICML 2018).
    """

    name: ClassVar[str] = "sign"
    source: ClassVar[str] = "Bernstein et al., ICML 2018"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros"})
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Takes the sign; the sign of zero is zero."""
        return each(torch.sign, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, with the step that the capture shows."""
        if observed is None:
            return each(torch.sign, gradient)
        step = torch.stack([tensor.abs().max() for tensor in observed.values()]).max()
        return each(lambda tensor: step * torch.sign(tensor), gradient)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Finds two values of different magnitude."""
        magnitudes = flat(observed).abs()
        magnitudes = magnitudes[magnitudes > 0]
        least, most = float(magnitudes.min()), float(magnitudes.max())
        detail = f"the values that are not zero have magnitudes from {least:.4g} to {most:.4g}"
        return most > least * (1 + ROUNDING), detail

    def log_likelihood(self, before: Gradient, noise: Noise, observed: Gradient) -> torch.Tensor:
        """The sum of log P(sign of value plus noise); zeros say nothing of the noise."""
        parts = []
        for name, tensor in observed.items():
            agreement = before[name] * torch.sign(tensor)
            said = noise.log_cdf(agreement.double())
            parts.append(torch.where(tensor == 0, torch.zeros_like(said), said).sum())
        return torch.stack(parts).sum()
