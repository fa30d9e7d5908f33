"""Norm clipping."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from scipy.stats import chi2

from ggl_audit.defenses.base import FALSE_ACCUSATION, Context, Defense, Trace
from ggl_audit.gradient import Gradient, each, flat, norm

ROUNDING = 1e-4


class Clip(Defense):
    """Scales the gradient down to a bound on its l2 norm, and leaves it alone below the bound.

    Usual settings: a norm of 1 to 4, over the whole gradient or for each tensor (Abadi et al.,
    CCS 2016; Li et al., CVPR 2022, section 4.1).
    """

    name: ClassVar[str] = "clip"
    source: ClassVar[str] = "Abadi et al., CCS 2016"
    trace: ClassVar[Trace] = "norm"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros", "levels"})

    bound: float = Field(gt=0, description="largest l2 norm")
    scope: Literal["global", "layer"] = Field(
        default="global", description="over the whole gradient, or for each tensor"
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Scales by min(1, bound / norm)."""
        return self._clipped(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, with the declared bound."""
        return self._clipped(gradient)

    def contradiction(self, observed: Gradient, later_noise: float) -> tuple[bool, str]:
        """Finds a norm above the bound, or above what bound and later noise can reach together."""
        parts = {"the gradient": flat(observed)} if self.scope == "global" else observed
        confidence = 1 - FALSE_ACCUSATION / len(parts)

        def most(tensor: torch.Tensor) -> float:
            noise = later_noise * math.sqrt(chi2.ppf(confidence, tensor.numel()))
            return self.bound * (1 + ROUNDING) + noise

        where = max(parts, key=lambda name: float(parts[name].norm()) / most(parts[name]))
        largest, allowed = float(parts[where].norm()), most(parts[where])
        detail = f"the norm of {where} is {largest:.4g}; the bound is {self.bound:g}"
        if later_noise:
            detail += f", with the noise after it at most {allowed:.4g}"
        return largest > allowed, detail

    def norm_bound(self, before: float | None) -> float | None:
        """The bound, when it is over the whole gradient."""
        if self.scope == "layer":
            return before
        return self.bound if before is None else min(before, self.bound)

    def _clipped(self, gradient: Gradient) -> Gradient:
        def scaled(tensor: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
            return tensor * (self.bound / size.clamp(min=1e-30)).clamp(max=1)

        if self.scope == "global":
            whole = norm(gradient)
            return each(lambda tensor: scaled(tensor, whole), gradient)
        return each(lambda tensor: scaled(tensor, tensor.square().sum().sqrt()), gradient)
