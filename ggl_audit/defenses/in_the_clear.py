"""What is sent beside the gradient, and whether the steps act on it as well."""

from __future__ import annotations

from collections.abc import Sequence

from ggl_audit.basics.gradient import Gradient, added, each
from ggl_audit.defenses.base import Step
from ggl_audit.defenses.capabilities import MayCoverStatistics
from ggl_audit.inputs.model import ClientModel

CLEAR_ROUNDING = 1e-10
"""The rounding, squared and relative, of what is sent without noise and computed elsewhere."""


class InTheClear:
    """Running statistics that are sent, and no step acts on.

    Args:
        steps: as declared.
        model: whose statistics are sent; None where none are.
        clients: in the cohort.

    Attributes:
        is_over_everything: whether the steps act on running statistics as on the gradient.
        names: of what is sent in the clear.
        rounding: what may be off in it, squared and relative.
    """

    def __init__(self, steps: Sequence[Step], model: ClientModel | None, clients: int) -> None:
        statistics = None if model is None else model.statistics
        self.is_over_everything = any(
            isinstance(step, MayCoverStatistics) and step.over == "everything" for step in steps
        )
        covered = self.is_over_everything or statistics is None
        self.names: tuple[str, ...] = () if covered or statistics is None else statistics.names
        self.rounding = max(CLEAR_ROUNDING, 0.0 if statistics is None else statistics.rounding)
        self._clients = clients

    def parted(self, gradient: Gradient) -> tuple[Gradient, Gradient]:
        """What the steps act on, and what is sent in the clear."""
        clear = {name: gradient[name] for name in self.names if name in gradient}
        return {n: tensor for n, tensor in gradient.items() if n not in clear}, clear

    def mean(self, sent: Sequence[Gradient]) -> Gradient:
        """What clients add to the cohort's mean, by what each sends in the clear."""
        return each(lambda tensor: tensor / self._clients, added(sent))
