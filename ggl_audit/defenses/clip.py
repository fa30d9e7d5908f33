"""Norm clipping."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ggl_audit.defenses.base import Context, Defense, Trace
from ggl_audit.gradient import Gradient, each, norm

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

    def contradiction(self, observed: Gradient) -> tuple[bool, str]:
        """Finds a norm above the bound."""
        if self.scope == "global":
            largest, where = float(norm(observed)), "the gradient"
        else:
            name = max(observed, key=lambda n: float(observed[n].norm()))
            largest, where = float(observed[name].norm()), name
        detail = f"the norm of {where} is {largest:.4g}; the bound is {self.bound:g}"
        return largest > self.bound * (1 + ROUNDING), detail

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
