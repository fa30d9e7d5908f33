"""One-bit quantization."""

from __future__ import annotations

from typing import ClassVar

import torch

from ggl_audit.defenses.base import Context, Defense, Trace
from ggl_audit.gradient import Gradient, each, flat

ROUNDING = 1e-5


class Sign(Defense):
    """Sends the sign of each value and nothing else: -1, 0 or 1.

    signSGD (Bernstein et al., ICML 2018).
    """

    name: ClassVar[str] = "sign"
    source: ClassVar[str] = "Bernstein et al., ICML 2018"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros"})

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Takes the sign; the sign of zero is zero."""
        return each(torch.sign, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same."""
        return each(torch.sign, gradient)

    def contradiction(self, observed: Gradient) -> tuple[bool, str]:
        """Finds two values of different magnitude."""
        magnitudes = flat(observed).abs()
        magnitudes = magnitudes[magnitudes > 0]
        least, most = float(magnitudes.min()), float(magnitudes.max())
        detail = f"the values that are not zero have magnitudes from {least:.4g} to {most:.4g}"
        return most > least * (1 + ROUNDING), detail
