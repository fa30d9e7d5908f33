"""The protocol of an optimizer: ask for a batch of candidates, tell what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

Wants = Literal["losses", "derivatives", "products"]

DERIVATIVE_COST = 4
"""What a candidate with its derivative costs, in candidates (measured: 3 to 5)."""

EVALUATION_COST: dict[Wants, int] = {"losses": 1, "derivatives": DERIVATIVE_COST, "products": 1}
"""What a candidate costs of which an optimizer is told so much."""

Principal = Callable[[int], torch.Tensor]
"""From k to (k, d) orthonormal directions along which the generator's pictures change most."""


@dataclass(frozen=True)
class Evaluation:
    """What became of P candidates of each of s searches.

    Attributes:
        losses: (s, P), finite.
        derivatives: (s, P, d), of the losses; only for an optimizer that wants them.
        products: (s, P, P), inner products of what candidates leave unexplained, whose squared
            length is about the loss: that of the first, and what those of the others differ from
            it; only for an optimizer that wants them.
    """

    losses: torch.Tensor
    derivatives: torch.Tensor | None = None
    products: torch.Tensor | None = None


class Optimizer(Protocol):
    """Minimizes s functions of d standard normal coordinates at once, each on its own.

    All searches of one optimizer ask together, so that one call evaluates the candidates of all;
    none learns of another's.
    """

    @property
    def wants(self) -> Wants:
        """What it has to be told of the next candidates."""
        ...

    def ask(self) -> torch.Tensor:
        """The next candidates, (s, P, d), of type float32; P may differ from call to call."""
        ...

    def tell(self, evaluation: Evaluation) -> None:
        """Takes what became of the candidates that the last ``ask`` gave, in its order."""
        ...

    def recommend(self) -> torch.Tensor:
        """Where each search believes its minimum to be, (s, d); it may never have been asked."""
        ...


class Start(Protocol):
    """Starts an optimizer of as many searches as there are seeds."""

    def __call__(self, seeds: Sequence[int], evaluations: int, device: torch.device) -> Optimizer:
        """Starts it.

        Args:
            seeds: of each search; it does the same whatever others are beside it.
            evaluations: candidates that each search will be given.
            device: where the candidates are to be.
        """
        ...
