"""A replica as a function of single values, where whole gradients are too many to be held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.func import vmap

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Defense


@dataclass(frozen=True)
class ValueWise:
    """Steps that treat each value by itself, and then steps that scale the whole.

    Attributes:
        steps: of the kind ``values``, in order.
        scalings: of the kind ``scaling``, after them.
    """

    steps: Sequence[Defense]
    scalings: Sequence[Defense]

    def readings(self, observed: Gradient) -> list[Gradient]:
        """What each step's replica depends on, for captures with a leading dimension."""
        return [vmap(step.readings)(observed) for step in self.steps]

    def on_values(self, values: torch.Tensor, readings: Sequence[torch.Tensor]) -> torch.Tensor:
        """The replica of any values of one tensor, before the whole is scaled.

        Args:
            values: of candidates' gradients; may be written over.
            readings: of the same values for each step, broadcast against them.
        """
        for step, reading in zip(self.steps, readings, strict=True):
            values = step.on_values(values, reading)
        return values

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        """What replicas of these norms are multiplied by in the end."""
        whole = torch.ones_like(norm)
        for step in self.scalings:
            whole = whole * step.factor(norm * whole)
        return whole
