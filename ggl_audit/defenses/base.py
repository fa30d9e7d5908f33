"""What a step of a defense is, in the four places where one can act.

What only some steps have is an optional capability (:mod:`ggl_audit.defenses.capabilities`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ggl_audit.basics.gradient import Gradient, added, each
from ggl_audit.inputs.model import ClientModel

if TYPE_CHECKING:
    from typing_extensions import Self

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

Effect = Literal["none", "exact", "any"]
"""What a step does to values: nothing; it scales them, leaves some out or adds to them, after which
two images do not have the same ones; or anything else, such as rounding, after which they may."""

ReplicaKind = Literal["identity", "values", "scaling", "whole"]
"""How a replica treats a gradient: it leaves it alone, changes each value by itself and zero not at
all, multiplies all values by one factor that depends on the norm, or does anything else."""

Drawn = dict[str, torch.Tensor]
"""What a client draws before it has a gradient, by name; or what an attacker takes it for."""

NoiseBound = Callable[[int, float], float]
"""From a number of values and a confidence to a bound on the l2 norm of noise on them."""


class Place(IntEnum):
    """Where a step acts, in the order in which a client comes there."""

    BEFORE_GRADIENT = 0
    SAMPLE = 1
    GRADIENT = 2
    AGGREGATE = 3


@dataclass(frozen=True)
class Context:
    """What the client has besides the gradient.

    Attributes:
        generator: the client's randomness, on the gradient's device.
        images: (n, channels, height, width) in [0, 1], that the gradient is of; None where it is of
            no image, as in the null control.
        drawn: what it drew before it computed the gradient.
        earlier: undefended gradients of the client's earlier rounds, the oldest first, as many as
            the steps remember (:class:`~ggl_audit.defenses.capabilities.RemembersRounds`).
    """

    generator: torch.Generator
    images: torch.Tensor | None = None
    drawn: Drawn = field(default_factory=dict)
    earlier: Sequence[Gradient] = ()


class Declared(BaseModel, ABC):
    """What a spec declares by its name, with its parameters as fields.

    A class with a ``name`` in a file of this folder, or named by another package as an entry point
    of the group ``ggl_audit.defenses``, is known to every command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    source: ClassVar[str] = "not given"
    promise: ClassVar[str] = "none"
    broken_by: ClassVar[str] = "not known"
    divides_by_batch: ClassVar[bool] = False
    """Whether it is of each step of a client, and divides by the images in it."""

    @abstractmethod
    def as_steps(self, units: int) -> list[Step]:
        """The steps that it stands for.

        Args:
            units: how many samples of a client noise is divided by: those of a batch under a mean,
                1 under a sum.
        """


class Step(Declared):
    """One step of what a client does, or has done, to what it sends.

    Its methods take one gradient, without a leading dimension; whoever has many maps over them
    (``torch.func.vmap``).

    Attributes:
        trace: what it leaves in a gradient that can be checked.
        preserves: the traces of earlier steps that can still be read off what it sends.
        effect: what it does to values; ``any`` is right for every step.
        stochastic: whether what it sends is drawn at random, otherwise than by adding noise.
        random_if_hidden: whether it draws what the capture shows, unless later steps hide it.
    """

    trace: ClassVar[Trace] = "none"
    preserves: ClassVar[frozenset[Trace]] = frozenset()
    effect: ClassVar[Effect] = "any"
    stochastic: ClassVar[bool] = False
    random_if_hidden: ClassVar[bool] = False

    def as_steps(self, units: int) -> list[Step]:
        """Itself."""
        return [self]

    def bind(self, model: ClientModel) -> Self:
        """This step for one model, whose parameters it may have to know by name.

        Raises:
            ValueError: it does not fit the model; the message says why.
        """
        return self

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where it acts."""

    @property
    def acts_on_a_gradient(self) -> bool:
        """Whether the gradient is all that it needs, and not the images, the model or others."""
        return False

    @property
    def reads(self) -> Trace:
        """The trace that the replica and the guesses read off the capture."""
        return "mask" if self.trace == "zeros" else self.trace

    def leaves(self, trace: Trace) -> bool:
        """Whether a trace of an earlier step can still be read off what this step sends."""
        return trace == "protocol" or trace in self.preserves

    def __str__(self) -> str:
        declared = ((name, value) for name, value in self if value is not None)
        parameters = ", ".join(f"{name}={value}" for name, value in declared)
        return f"{self.name}({parameters})"


class BeforeGradient(Step):
    """A step that has acted when there is a gradient, which it leaves alone."""

    preserves: ClassVar[frozenset[Trace]] = EVERY_TRACE

    @property
    def place(self) -> Place:
        """Before the gradient."""
        return Place.BEFORE_GRADIENT

    def norm_bound(self, before: float | None) -> float | None:
        """That of before, as there is no gradient yet."""
        return before


class DataDefense(BeforeGradient):
    """A step on the images, before the model sees them."""

    treats_each_image_alone: ClassVar[bool] = False

    @abstractmethod
    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Changes a batch.

        Args:
            images: (n, channels, height, width) in [0, 1].
            targets: (n, classes), probabilities.
            drawn: by the client, or guessed by the attacker.
        """


class ModelDefense(BeforeGradient):
    """A step on the model that the gradient is of."""

    @abstractmethod
    def wrap(self, module: nn.Module) -> nn.Module:
        """Adds to the client's model what this step needs; before its weights are filled in.

        Raises:
            ValueError: the model has no place for it; the message says why.
        """

    def penalty(self, module: nn.Module) -> torch.Tensor | float:
        """What it adds to the client's loss, asked right after a forward pass of the module."""
        return 0.0


class Defense(Step):
    """A step on the gradient that a client has computed: what most defenses are.

    Attributes:
        replica_kind: what the replica may be evaluated by. A class that defines ``replicate`` and
            does not say so has the kind ``whole``, which is right for every step.
    """

    replica_kind: ClassVar[ReplicaKind] = "whole"

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

    @property
    def place(self) -> Place:
        """On the client's gradient."""
        return Place.GRADIENT

    @property
    def acts_on_a_gradient(self) -> bool:
        """Yes."""
        return True

    @classmethod
    def __pydantic_init_subclass__(cls, **keywords: Any) -> None:
        # A kind that a class inherits may not be that of its own replica.
        if "replicate" in vars(cls) and "replica_kind" not in vars(cls):
            cls.replica_kind = "whole"
        super().__pydantic_init_subclass__(**keywords)


class Aggregation(Step):
    """A step that joins what several clients send.

    What each sends is lifted to statistics that add up; the mean of these is all that is seen.

    Attributes:
        is_mean: whether that is the mean of what they send, and nothing else is done.
    """

    is_mean: ClassVar[bool] = False

    clients: int = Field(default=1, ge=1, description="in the cohort")

    def lift(self, gradient: Gradient, earlier: Sequence[Gradient] = ()) -> Gradient:
        """What a client adds to the aggregate."""
        return gradient

    def finish(self, mean: Gradient) -> Gradient:
        """What is seen of the mean over all clients."""
        return mean

    def share(
        self, gradients: Sequence[Gradient], earlier: Sequence[Sequence[Gradient]] = ()
    ) -> Gradient:
        """What some of the clients add to the mean over all of them."""
        before = earlier or [()] * len(gradients)
        lifted = [self.lift(g, e) for g, e in zip(gradients, before, strict=True)]
        total = added(lifted)
        return total if self.clients == 1 else each(lambda tensor: tensor / self.clients, total)

    @property
    def place(self) -> Place:
        """Where clients are joined."""
        return Place.AGGREGATE

    @property
    def acts_on_a_gradient(self) -> bool:
        """Only for a cohort of one."""
        return self.clients == 1
