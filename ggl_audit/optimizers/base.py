"""The protocol of a gradient-free optimizer: ask for a batch, tell its losses."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Optimizer(Protocol):
    """Minimizes a function of d standard normal coordinates, a population at a time."""

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        ...

    def tell(self, losses: Array) -> None:
        """Takes the losses, (population,), of what the last ``ask`` gave, in its order."""
        ...

    def recommend(self) -> Array:
        """Where the optimizer believes the minimum to be, (d,); it may never have been asked."""
        ...
