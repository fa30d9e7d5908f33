"""What the steps together do to a gradient, as far as whoever judges or attacks it must know."""

from __future__ import annotations

from ggl_audit.defenses.base import Aggregation
from ggl_audit.defenses.capabilities import (
    Encrypts,
    HasScalingReplica,
    MayEmptyTensors,
    Scoped,
    is_harmless,
)
from ggl_audit.defenses.chain import Chain


class WholeEffect:
    """The effect of all steps."""

    def __init__(self, chain: Chain) -> None:
        self._steps = chain.steps

    def ciphertext_of(self) -> str | None:
        """Who holds the key, where the capture is declared to be a ciphertext."""
        encrypting = (step for step in self._steps if isinstance(step, Encrypts))
        return next((step.key_holder for step in encrypting if step.view == "outsider"), None)

    def empties_tensors(self) -> bool:
        """Whether a step may leave nothing of a tensor for one image and something for another."""
        return any(
            isinstance(step, MayEmptyTensors) and not step.keeps_every_tensor
            for step in self._steps
        )

    def only_scales(self) -> bool:
        """Whether nothing is done but to scale the whole gradient down."""
        return all(
            isinstance(step, HasScalingReplica) and step.by_factor() is not None
            for step in self._steps
        )

    def acts_on_the_whole(self) -> bool:
        """Whether a step depends on all tensors together, as on the norm of the whole."""
        return any(isinstance(step, Scoped) and step.scope == "global" for step in self._steps)

    def keeps_images_apart(self) -> bool:
        """Whether no two images have the same values after the steps, that had others before."""
        return all(step.effect != "any" for step in self._steps)

    def keeps_magnitudes(self) -> bool:
        """Whether values stay as large as they are, or the mean over clients of what they are."""
        return all(
            is_harmless(step)
            or (isinstance(step, Aggregation) and step.is_mean)
            or step.leaves("values")
            for step in self._steps
        )
