"""Secure aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from ggl_audit.basics.gradient import Gradient, added, each
from ggl_audit.defenses.base import Context, Defense, NoiseBound, ReplicaKind, Trace


class Aggregation(Defense):
    """A step that joins what several clients send.

    What each sends is lifted to statistics that add up; the mean of these is all that is seen.
    """

    clients: int = Field(default=1, ge=1, description="in the cohort")

    def lift(self, gradient: Gradient, earlier: Sequence[Gradient] = ()) -> Gradient:
        """What a client adds to the aggregate."""
        return gradient

    def finish(self, mean: Gradient) -> Gradient:
        """What is seen of the mean over all clients."""
        return mean

    @property
    def acts_on_a_gradient(self) -> bool:
        """Only for a cohort of one."""
        return self.clients == 1 and super().acts_on_a_gradient

    def share(
        self, gradients: Sequence[Gradient], earlier: Sequence[Sequence[Gradient]] = ()
    ) -> Gradient:
        """What some of the clients add to the mean over all of them."""
        before = earlier or [()] * len(gradients)
        lifted = [self.lift(g, e) for g, e in zip(gradients, before, strict=True)]
        total = added(lifted)
        return total if self.clients == 1 else each(lambda tensor: tensor / self.clients, total)

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """As if all clients sent the same."""
        return self.finish(self.lift(gradient, context.earlier))

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """As if all clients sent the same."""
        return self.finish(self.lift(gradient))


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

    clients: int = Field(ge=1, description="in the cohort")

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing: a mean of the same."""
        return gradient

    def replica_kind(self, readable: bool) -> ReplicaKind:
        """Nothing is changed."""
        return "identity"

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Nothing in a mean tells of how many it is."""
        return False, f"a mean shows nothing of its {self.clients} clients; taken for granted"

    def norm_bound(self, before: float | None) -> float | None:
        """The share of one client."""
        return None if before is None else before / self.clients
