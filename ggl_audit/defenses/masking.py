"""Compressions that send some of the values and zeros for the others."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Effect, ReplicaKind, Trace
from ggl_audit.defenses.capabilities import ByValues
from ggl_audit.defenses.error_feedback import ErrorFeedback


class Masking(ErrorFeedback):
    """Sets values to zero and leaves the others as they are: what was kept is there to be seen."""

    effect: ClassVar[Effect] = "exact"
    replica_kind: ClassVar[ReplicaKind] = "values"

    @abstractmethod
    def foreseen(self, gradient: Gradient) -> Gradient:
        """What is left of a candidate's gradient, as far as the declaration alone tells."""

    def compressed(self, gradient: Gradient, context: Context) -> Gradient:
        """As declared, unless chance has a part in it."""
        return self.foreseen(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Keeps what the client kept, read off the capture; if hidden, what is foreseen.

        The observed mask is the better one: a candidate is asked for its values there also where it
        would not have kept them.
        """
        if observed is None:
            return self.foreseen(gradient)
        kept = {name: (tensor != 0).to(tensor.dtype) for name, tensor in observed.items()}
        return {name: tensor * kept[name] for name, tensor in gradient.items()}

    def exact_replica(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Keeps what the candidate itself would have kept: where that is tells of the image too."""
        return self.replicate(gradient, observed if self.error_feedback else None)

    def by_values(self, readable: bool) -> ByValues | None:
        """Keeps what the client kept, which is not zero in what was sent."""
        return ByValues(readings=lambda observed: observed, on_values=_kept) if readable else None

    @property
    def reads(self) -> Trace:
        """What was kept."""
        return "mask"


def _kept(values: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    return values.mul_((sent != 0).to(values.dtype))
