"""The protocol of a defense: what the client does, what the attacker does about it, and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient
from ggl_audit.inputs.model import ClientModel

if TYPE_CHECKING:
    from typing_extensions import Self

    from ggl_audit.defenses.noise import Noise

FALSE_ACCUSATION = 1e-6
"""The largest probability with which a correct capture is said to contradict its declaration."""

Trace = Literal["norm", "zeros", "mask", "levels", "values", "span", "noise", "protocol", "none"]
"""What a defense leaves in a gradient that can be read off it: a bound on its norm, so many zeros,
their very places (a mask), a few levels whatever their scale, values on their own scale, a span of
few dimensions, a floor of noise. Or what the protocol makes certain without looking; or nothing at
all."""

EVERY_TRACE: frozenset[Trace] = frozenset(
    {"norm", "zeros", "mask", "levels", "values", "span", "noise"}
)

ReplicaKind = Literal["identity", "values", "scaling", "whole"]
"""How a replica treats a gradient: it leaves it alone, changes each value by itself and zero not at
all, multiplies all values by one factor that depends on the norm, or does anything else."""

Drawn = dict[str, torch.Tensor]
"""What a client draws before it has a gradient, by name; or what an attacker takes it for."""

Distribution = Literal["gaussian", "laplace"]

NoiseBound = Callable[[int, float], float]
"""From a number of values and a confidence to a bound on the l2 norm of noise on them."""


@dataclass(frozen=True)
class Context:
    """What the client has besides the gradient.

    Attributes:
        generator: the client's randomness, on the gradient's device.
        images: (n, channels, height, width) in [0, 1], that the gradient is of; None where it is of
            no image, as in the null control.
        drawn: what it drew before it computed the gradient.
        earlier: undefended gradients of the client's earlier rounds, the oldest first, as many as
            :attr:`Defense.earlier_rounds` asks for.
    """

    generator: torch.Generator
    images: torch.Tensor | None = None
    drawn: Drawn = field(default_factory=dict)
    earlier: Sequence[Gradient] = ()


@dataclass(frozen=True)
class Check:
    """What the capture says about one step of the declared defense.

    Attributes:
        step: the step, as ``name(parameters)``.
        outcome: ``agrees``, ``contradicts``, or ``hidden`` when later steps cover its trace.
        detail: the measured figure beside the declared one, as a sentence without a full stop.
    """

    step: str
    outcome: Literal["agrees", "contradicts", "hidden"]
    detail: str


class Defense(BaseModel, ABC):
    """One step of what a client does to a gradient before it leaves.

    A subclass declares its parameters as fields. Its methods take one gradient, without a leading
    dimension; whoever has many maps over them (``torch.func.vmap``).

    Most steps change the gradient (:meth:`apply`). A step on the model's side adds to it
    (:meth:`wrap`), one on the data's side changes the images (:meth:`transform`); both may draw
    something first (:meth:`draw`), which the attacker has to guess (:meth:`guesses`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    source: ClassVar[str] = "not given"
    promise: ClassVar[str] = "none"
    broken_by: ClassVar[str] = "not known"
    trace: ClassVar[Trace] = "none"
    preserves: ClassVar[frozenset[Trace]] = frozenset()
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset()
    stochastic: ClassVar[bool] = False
    random_if_hidden: ClassVar[bool] = False
    treats_each_image_alone: ClassVar[bool] = False

    def wrap(self, module: nn.Module) -> nn.Module:
        """Adds to the client's model what this defense needs; before its weights are filled in.

        Raises:
            ValueError: the model has no place for it; the message says why.
        """
        return module

    def bind(self, model: ClientModel) -> Self:
        """This step for one model, whose parameters it may have to know by name.

        Raises:
            ValueError: it does not fit the model; the message says why.
        """
        return self

    def draw(self, context: Context, images: int) -> Drawn:
        """What the client draws before it computes the gradient of so many images.

        A tensor named as one of the model's constants takes its place.
        """
        return {}

    @property
    def drawn_for_each_image(self) -> frozenset[str]:
        """Which draws have a row for each image, or one row for all of them."""
        return frozenset()

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        """What the attacker takes the draw for: one or more, of which the best match counts.

        Args:
            observed: the capture, or None when later steps hide this step's trace in it.
        """
        return [{}]

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Changes a batch before the model sees it.

        Args:
            images: (n, channels, height, width) in [0, 1].
            targets: (n, classes), probabilities.
            drawn: by the client, or guessed by the attacker.
        """
        return images, targets

    def penalty(self, module: nn.Module) -> torch.Tensor | float:
        """What it adds to the client's loss, asked right after a forward pass of the module."""
        return 0.0

    @abstractmethod
    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """What the client does. Never changes its input."""

    @abstractmethod
    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """What the attacker does to a trial gradient, so that it compares with the observed one.

        Args:
            gradient: of a candidate, after the replicas of the earlier steps.
            observed: the capture, or None when later steps hide this step's trace in it.
        """

    def replica_kind(self, readable: bool) -> ReplicaKind:
        """What :meth:`replicate` may be evaluated by; ``whole`` is right for every step.

        A class that overrides ``replicate`` and not this has the kind ``whole``.

        Args:
            readable: whether the capture shows this step's trace.
        """
        return "whole"

    def readings(self, observed: Gradient) -> Gradient:
        """What the replica of each value depends on besides the value; only for ``values``.

        Args:
            observed: the capture.

        Returns:
            By name, a tensor of the shape of the capture's, or a scalar for all its values.
        """
        raise NotImplementedError

    def on_values(self, values: torch.Tensor, readings: torch.Tensor) -> torch.Tensor:
        """The replica of any values of a tensor; only for ``values``.

        Args:
            values: of candidates' gradients, which may be written over; what is zero stays zero.
            readings: of the same values (:meth:`readings`), broadcast against them.
        """
        raise NotImplementedError

    def factor(self, norm: torch.Tensor) -> torch.Tensor:
        """What gradients of these norms are multiplied by; only for ``scaling``."""
        raise NotImplementedError

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Whether the capture cannot have come out of this step, and the measured figure.

        A capture that did come out of it is accused with a probability of 1e-6 at most.

        Args:
            observed: the capture.
            later_noise: bounds the norm of the noise that later steps add. Only a step whose trace
                survives noise is asked about a capture with any.
        """
        return False, "it leaves nothing that could be checked"

    def hint(self, observed: Gradient, factors: Factors) -> str:
        """What a capture that contradicts this step would fit, where a known factor tells.

        Args:
            observed: the capture.
            factors: what the client multiplies and divides by.

        Returns:
            Words that follow the figure of the contradiction; empty where nothing tells.
        """
        return ""

    def exact_replica(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """What the attacker does to the gradient of a candidate that may be the very image.

        For the ceiling, where the candidates are images and not guesses at them, and all that they
        tell must count.

        Args:
            gradient: of a candidate, after the replicas of the earlier steps.
            observed: the capture, or None when later steps hide this step's trace in it.
        """
        return self.replicate(gradient, observed)

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The replica, or where that is made of plateaus something near to it that is not.

        For attacks that follow derivatives, which a plateau does not have.

        Args:
            gradient: of a candidate, after the same of the earlier steps.
            observed: the capture, or None when later steps hide this step's trace in it.
        """
        return self.replicate(gradient, observed)

    def log_likelihood(self, before: Gradient, noise: Noise, observed: Gradient) -> torch.Tensor:
        """How likely the capture is if this step came last, after noise; a scalar.

        Only asked for the distributions in ``likelihood_after``; a step without any is not asked.

        Args:
            before: a candidate's gradient as it is before the noise.
            noise: what was added to it before this step.
            observed: the capture.
        """
        raise NotImplementedError

    def log_likelihood_alone(self, before: Gradient, observed: Gradient) -> torch.Tensor:
        """How likely the capture is if only this step is random, and comes last; a scalar.

        Only asked of a ``stochastic`` step that changes the gradient.

        Args:
            before: a candidate's gradient after the replicas of the earlier steps.
            observed: the capture.
        """
        raise NotImplementedError

    @property
    def earlier_rounds(self) -> int:
        """How many gradients of earlier rounds are mixed into what the client sends."""
        return 0

    @property
    def changes_images(self) -> bool:
        """Whether it is a step on the data's side."""
        return type(self).transform is not Defense.transform

    @property
    def reads(self) -> Trace:
        """The trace that the replica and the guesses read off the capture."""
        return "mask" if self.trace == "zeros" else self.trace

    @property
    def acts_on_a_gradient(self) -> bool:
        """Whether the gradient is all that it needs, and not the images, the model or others."""
        return self.earlier_rounds == 0

    def leaves(self, trace: Trace) -> bool:
        """Whether a trace of an earlier step can still be read off what this step sends."""
        return trace == "protocol" or trace in self.preserves

    @property
    def keeps_every_tensor(self) -> bool:
        """Whether it leaves something of each tensor that holds something."""
        return True

    def norm_bound(self, before: float | None) -> float | None:
        """A bound on the norm after this step, given one (or none) before it."""
        return None

    def __str__(self) -> str:
        declared = ((name, value) for name, value in self if value is not None)
        parameters = ", ".join(f"{name}={value}" for name, value in declared)
        return f"{self.name}({parameters})"


class BeforeGradient(Defense):
    """A step on the images or on the model, which leaves alone the gradient that comes of it."""

    preserves: ClassVar[frozenset[Trace]] = EVERY_TRACE

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Nothing more: it has acted before."""
        return gradient

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing more: the candidate's gradient was computed under it."""
        return gradient

    @property
    def acts_on_a_gradient(self) -> bool:
        """No."""
        return False

    def norm_bound(self, before: float | None) -> float | None:
        """There is no gradient yet."""
        return before
