"""Encryption."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import (
    EVERY_TRACE,
    Context,
    Defense,
    Effect,
    NoiseBound,
    ReplicaKind,
    Trace,
)
from ggl_audit.messages import Message, Said

HOLDER_SEES = Message(
    "check/holder-sees",
    "{holder} holds the key and sees what is audited here",
    advice="Nothing.",
)


class Encryption(Defense):
    """Hides the gradient from all who lack the key, and nothing from who has it.

    Without the key there is nothing to attack and nothing to measure. What is audited is what the
    holder of the key sees; with additively homomorphic encryption (Phong et al., IEEE TIFS 2018)
    that is the aggregate: declare ``secure_aggregation`` before it.
    """

    name: ClassVar[str] = "encryption"
    source: ClassVar[str] = "Phong et al., IEEE TIFS 13(5), 2018"
    promise: ClassVar[str] = "everything against who lacks the key, nothing against who has it"
    broken_by: ClassVar[str] = "the holder of the key"
    trace: ClassVar[Trace] = "protocol"
    preserves: ClassVar[frozenset[Trace]] = EVERY_TRACE
    effect: ClassVar[Effect] = "none"
    replica_kind: ClassVar[ReplicaKind] = "identity"

    key_holder: str = Field(min_length=1, description="who can decrypt: a client, a server, ...")
    view: Literal["key_holder", "outsider"] = Field(
        default="key_holder", description="outsider: the capture is a ciphertext"
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Nothing, in the eyes of the key holder."""
        return gradient

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing."""
        return gradient

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Nothing that is decrypted tells of the encryption."""
        return False, HOLDER_SEES(holder=self.key_holder)

    def norm_bound(self, before: float | None) -> float | None:
        """Unchanged."""
        return before

    def sensitivity(self, before: float | None, of_mean: bool) -> float | None:
        """Unchanged."""
        return before
