"""Secure aggregation."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Aggregation, Effect, NoiseBound, Trace
from ggl_audit.messages import Message, Said

CLIENTS_UNSEEN = Message(
    "check/clients-unseen",
    "a mean shows nothing of its {clients} clients; taken for granted",
    advice="Nothing.",
)


class SecureAggregation(Aggregation):
    """Shows the server the mean over a cohort, and no client's own gradient.

    To a passive server it is the gradient of a batch of all clients' images (Bonawitz et al.,
    Practical Secure Aggregation, CCS 2017). A captured sum is divided by the number of clients
    before it is handed in.
    """

    name: ClassVar[str] = "secure_aggregation"
    source: ClassVar[str] = "Bonawitz et al., CCS 2017"
    promise: ClassVar[str] = "who sent what, against a passive server; not what was sent"
    broken_by: ClassVar[str] = (
        "a server that sends clients different models (Pasquini et al., CCS 2022); membership in "
        "the sum is not hidden (Ngo et al., 2024)"
    )
    trace: ClassVar[Trace] = "protocol"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm"})
    effect: ClassVar[Effect] = "exact"
    is_mean: ClassVar[bool] = True

    clients: int = Field(ge=1, description="in the cohort")

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Nothing in a mean tells of how many it is."""
        return False, CLIENTS_UNSEEN(clients=self.clients)

    def norm_bound(self, before: float | None) -> float | None:
        """The share of one client."""
        return None if before is None else before / self.clients

    def sensitivity(self, before: float | None, of_mean: bool) -> float | None:
        """The share of one client, as of the norm."""
        return None if of_mean else self.norm_bound(before)
