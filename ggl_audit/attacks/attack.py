"""The protocol of an attack: what it makes of the gradients that an attacker observes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case

Advance = Callable[[int], None]

Curve = list[tuple[int, float]]
"""The best loss so far, by candidates evaluated."""


@dataclass(frozen=True)
class Attempt:
    """What one attack made of t gradients.

    Attributes:
        images: (t, k, channels, height, width) in [0, 1].
        losses: (t,), the matching distances that it reached.
        latents: (t, k x d), where the prior was searched.
        curves: of a search, one for each gradient.
    """

    images: torch.Tensor
    losses: torch.Tensor
    latents: torch.Tensor | None = None
    curves: Sequence[Curve] = ()


class Attack(ABC):
    """One attack on the gradients of one case.

    A class with a ``name`` in a file of this folder, or named by another package as an entry point
    of the group ``ggl_audit.attacks``, is known to every command.

    Attributes:
        name: in specs and reports.
        source: what it searches, and where it is from.
        turn: when it is made; it is given what those with lower numbers have made. Those of other
            packages come after all of ours.
        by_derivatives: whether its evaluations are of candidates with their derivatives.

    Args:
        case: what was handed in.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    turn: ClassVar[int]
    by_derivatives: ClassVar[bool] = False

    def __init__(self, case: Case) -> None:
        self.case = case

    def why_not(self) -> str:
        """Why it cannot be made on this model and defense; empty where it can."""
        return ""

    @abstractmethod
    def evaluations(self) -> int:
        """How many candidates it evaluates for each gradient."""

    @abstractmethod
    def attack(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        before: Mapping[str, Attempt],
        advance: Advance,
    ) -> Attempt:
        """Attacks t gradients, each on its own.

        Args:
            observed: tensors with a leading dimension t.
            labels: (t, k), what the attacker takes the labels for.
            randoms: t streams, one for each gradient.
            before: what the attacks before this one made of the same gradients, by name.
            advance: told of the candidates that are evaluated, as often as it can be.
        """

    def is_exact(self, capture: Capture, attempt: Attempt) -> bool:
        """Whether the first picture is proven to be the very image of a capture."""
        return False
