"""A replica as a function of single values, where whole gradients are too many to be held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.func import vmap

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Aggregation, Defense, Step
from ggl_audit.defenses.capabilities import (
    ByValues,
    HasExactReplica,
    HasScalingReplica,
    HasValueWiseReplica,
)
from ggl_audit.defenses.chain import Chain

ByFactor = Callable[[torch.Tensor], torch.Tensor]
"""From the norms of gradients to what these are multiplied by."""


@dataclass(frozen=True)
class ValueWise:
    """Steps that treat each value by itself, and then steps that scale the whole.

    Attributes:
        steps: by values, in order.
        scalings: by a factor, after them.
    """

    steps: Sequence[ByValues]
    scalings: Sequence[ByFactor]

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
        for by_factor in self.scalings:
            whole = whole * by_factor(norm * whole)
        return whole


def value_wise(chain: Chain, count: int, *, exact: bool) -> ValueWise | None:
    """The replica of the first steps by single values, or None where there is none.

    Args:
        chain: the steps.
        count: how many of them are replicated.
        exact: whether candidates may be the very image.
    """
    if chain.aggregation.clients > 1 or not chain.acts_on_a_gradient():
        return None
    steps: list[ByValues] = []
    scalings: list[ByFactor] = []
    for index, step in enumerate(chain.equivalent[:count]):
        by_values, by_factor = _forms(step, chain.readable[index])
        if exact and isinstance(step, HasExactReplica):
            return None
        if by_values is not None and not scalings:
            steps.append(by_values)
        elif by_factor is not None:
            scalings.append(by_factor)
        elif not _is_identity(step):
            return None
    return ValueWise(steps, scalings)


def _is_identity(step: Step) -> bool:
    if isinstance(step, Aggregation):
        return step.is_mean
    return isinstance(step, Defense) and step.replica_kind == "identity"


def _forms(step: Step, readable: bool) -> tuple[ByValues | None, ByFactor | None]:
    kind = step.replica_kind if isinstance(step, Defense) else "whole"
    if kind == "values" and isinstance(step, HasValueWiseReplica):
        return step.by_values(readable), None
    if kind == "scaling" and isinstance(step, HasScalingReplica):
        return None, step.by_factor()
    return None, None
