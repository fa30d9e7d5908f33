"""The protocol of a defense: what the client does, what the attacker does about it, and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from ggl_audit.gradient import Gradient

if TYPE_CHECKING:
    from ggl_audit.defenses.noise import Noise

FALSE_ACCUSATION = 1e-6
"""The largest probability with which a correct capture is said to contradict its declaration."""

Trace = Literal["norm", "zeros", "levels", "noise"]
"""What a defense leaves in a gradient that can be read off it."""

Distribution = Literal["gaussian", "laplace"]

NoiseBound = Callable[[int, float], float]
"""From a number of values and a confidence to a bound on the l2 norm of noise on them."""


@dataclass(frozen=True)
class Context:
    """What the client has besides the gradient.

    Attributes:
        generator: the client's randomness, on the gradient's device.
    """

    generator: torch.Generator


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
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    source: ClassVar[str]
    trace: ClassVar[Trace]
    preserves: ClassVar[frozenset[Trace]]
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset()

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

    @abstractmethod
    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Whether the capture cannot have come out of this step, and the measured figure.

        A capture that did come out of it is accused with a probability of 1e-6 at most.

        Args:
            observed: the capture.
            later_noise: bounds the norm of the noise that later steps add. Only a step whose trace
                survives noise is asked about a capture with any.
        """

    def log_likelihood(self, before: Gradient, noise: Noise, observed: Gradient) -> torch.Tensor:
        """How likely the capture is if this step came last, after noise; a scalar.

        Only asked for the distributions in ``likelihood_after``; a step without any is not asked.

        Args:
            before: a candidate's gradient as it is before the noise.
            noise: what was added to it before this step.
            observed: the capture.
        """
        raise NotImplementedError

    @property
    def keeps_every_tensor(self) -> bool:
        """Whether it leaves something of each tensor that holds something."""
        return True

    def norm_bound(self, before: float | None) -> float | None:
        """A bound on the norm after this step, given one (or none) before it."""
        return None

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value}" for name, value in self)
        return f"{self.name}({parameters})"
