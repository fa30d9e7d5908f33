"""What only some steps can do, or have done to them: whoever asks looks whether a step has it.

A step has a capability if it has the methods, wherever it inherits them from; a step of one's own
as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch

from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Drawn, NoiseBound, Step
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.messages import Said


@runtime_checkable
class Draws(Protocol):
    """Draws something before there is a gradient."""

    def draw(self, context: Context, images: int) -> Drawn:
        """What the client draws before it computes the gradient of so many images.

        A tensor named as one of the model's constants takes its place.
        """
        ...


@runtime_checkable
class DrawsForEachImage(Protocol):
    """Draws something for each image."""

    @property
    def drawn_for_each_image(self) -> frozenset[str]:
        """Which draws have a row for each image, or one row for all of them."""
        ...


@runtime_checkable
class HasGuesses(Protocol):
    """Draws something that the attacker can guess."""

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        """What the attacker takes the draw for: one or more, of which the best match counts.

        Args:
            observed: the capture, or None when later steps hide this step's trace in it.
        """
        ...


@runtime_checkable
class ChangesGradient(Protocol):
    """Changes the gradient that a client has computed."""

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """What the client does. Never changes its input."""
        ...


@runtime_checkable
class HasReplica(Protocol):
    """Is replicated by the attacker, on candidates' gradients."""

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """See :meth:`ggl_audit.defenses.Defense.replicate`."""
        ...


@runtime_checkable
class HasExactReplica(Protocol):
    """Is replicated in another way on a candidate that may be the very image.

    For the ceiling, where the candidates are images and not guesses at them, and all that they tell
    must count.
    """

    def exact_replica(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """What the attacker does to the gradient of an image; as for the replica."""
        ...


@runtime_checkable
class HasSmoothReplica(Protocol):
    """Has a replica made of plateaus, and something near to it that is not.

    For attacks that follow derivatives, which a plateau does not have.
    """

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """What comes in the place of the replica; with the same arguments."""
        ...


@dataclass(frozen=True)
class ByValues:
    """A replica that treats each value by itself.

    Attributes:
        readings: from the capture to what the replica of each value depends on besides the value:
            by name, a tensor of the shape of the capture's, or a scalar for all its values.
        on_values: the replica of any values of a tensor, which may be written over, by the readings
            for the same values, broadcast against them. What is zero stays zero.
    """

    readings: Callable[[Gradient], Gradient]
    on_values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@runtime_checkable
class HasValueWiseReplica(Protocol):
    """Has a replica that treats each value by itself; its ``replica_kind`` is ``values``."""

    def by_values(self, readable: bool) -> ByValues | None:
        """The replica by values, or None where values depend on each other.

        Args:
            readable: whether the capture shows this step's trace.
        """
        ...


@runtime_checkable
class HasScalingReplica(Protocol):
    """Has a replica that multiplies by one factor; its ``replica_kind`` is ``scaling``."""

    def by_factor(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What gradients are multiplied by, from their norm; None where it is not one factor."""
        ...


@runtime_checkable
class HasLikelihood(Protocol):
    """Has a likelihood where it comes last, after noise.

    Attributes:
        likelihood_after: for which distributions of the noise.
    """

    likelihood_after: ClassVar[frozenset[Distribution]]

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """How likely the capture is; a scalar.

        Args:
            before: a candidate's gradient as it is before the noise.
            noise: what was added to it before this step.
            observed: the capture.
        """
        ...


@runtime_checkable
class HasOwnLikelihood(Protocol):
    """Is random, with a likelihood where nothing else is and it comes last."""

    def log_likelihood_alone(self, before: Gradient, observed: Gradient) -> torch.Tensor:
        """How likely the capture is; a scalar.

        Args:
            before: a candidate's gradient after the replicas of the earlier steps.
            observed: the capture.
        """
        ...


@runtime_checkable
class AddsNoise(Protocol):
    """Adds independent noise to each value, and does nothing else."""

    @property
    def law(self) -> NoiseLaw:
        """The distribution of the noise."""
        ...


@runtime_checkable
class BoundsNorm(Protocol):
    """Says what it does to a bound on the norm."""

    def norm_bound(self, before: float | None) -> float | None:
        """A bound on the norm after this step, given one (or none) before it."""
        ...


@runtime_checkable
class BoundsSensitivity(Protocol):
    """Says how much one image or client may still change after it, where several are added up."""

    def sensitivity(self, before: float | None, of_mean: bool) -> float | None:
        """A bound on what one of them changes after this step, given one (or none) before it.

        Args:
            before: the bound on what goes into this step.
            of_mean: whether that is the mean over a cohort, and not a client's gradient.
        """
        ...


@runtime_checkable
class HasCheck(Protocol):
    """Can be compared with a capture, as far as later steps leave its trace."""

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said | str]:
        """Whether the capture cannot have come out of this step, and the measured figure.

        The figure is a message of the step, or just words, as a sentence without a full stop.

        A capture that did come out of it is accused with a probability of 1e-6 at most.

        Args:
            observed: the capture.
            later_noise: bounds the norm of the noise that later steps add. Only a step whose trace
                survives noise is asked about a capture with any.
        """
        ...


@runtime_checkable
class HasHint(Protocol):
    """Tells what a capture would fit that contradicts it."""

    def hint(self, observed: Gradient, factors: Factors) -> str:
        """What it would fit, where a known factor tells.

        Args:
            observed: the capture.
            factors: what the client multiplies and divides by.

        Returns:
            Words that follow the figure of the contradiction; empty where nothing tells.
        """
        ...


@runtime_checkable
class RemembersRounds(Protocol):
    """Mixes gradients of the client's earlier rounds into what it sends."""

    @property
    def earlier_rounds(self) -> int:
        """How many."""
        ...


@runtime_checkable
class MayEmptyTensors(Protocol):
    """May leave nothing of a tensor that holds something."""

    @property
    def keeps_every_tensor(self) -> bool:
        """Whether it never does, as it is declared."""
        ...


@runtime_checkable
class Scoped(Protocol):
    """Acts on the whole gradient, or on each tensor by itself.

    Attributes:
        scope: ``global`` or ``layer``.
    """

    @property
    def scope(self) -> str:
        """What it acts on."""
        ...


@runtime_checkable
class MayCoverStatistics(Protocol):
    """Acts on running statistics too, where these are sent and it is declared so.

    Attributes:
        over: ``everything`` that is sent, ``parameters`` alone, or None where that is not known.
    """

    @property
    def over(self) -> str | None:
        """What it acts on."""
        ...


@runtime_checkable
class Encrypts(Protocol):
    """Hides what is sent from all who lack a key.

    Attributes:
        key_holder: who can decrypt.
        view: ``key_holder``, or ``outsider`` where the capture is a ciphertext.
    """

    @property
    def key_holder(self) -> str:
        """Who has the key."""
        ...

    @property
    def view(self) -> str:
        """Whose view the capture is."""
        ...


def rounds_remembered(step: Step) -> int:
    """How many gradients of earlier rounds a step mixes into what the client sends."""
    return step.earlier_rounds if isinstance(step, RemembersRounds) else 0


def is_harmless(step: Step) -> bool:
    """Whether a step changes nothing of a gradient but by noise that is added to it."""
    return step.effect == "none" or isinstance(step, AddsNoise)
