"""Any optimizer of nevergrad's registry."""

from __future__ import annotations

from typing import Any

import numpy as np

from ggl_audit.optimizers.base import Array


class Nevergrad:
    """One search by one of nevergrad's optimizers (Rapin and Teytaud, 2018), by name.

    ``num_workers`` is the population: left at 1, many of them silently turn sequential. Told in the
    order of asking; whoever calls keeps the best point, since a restart inside can lose it.
    """

    def __init__(
        self, name: str, dimension: int, population: int, sigma: float, budget: int, seed: int
    ) -> None:
        from nevergrad import p
        from nevergrad.optimization import recaster, registry

        # Where it refuses to start, it would ask for this when it is deleted, and print an error.
        recaster.RecastOptimizer._messaging_thread = None
        parametrization = p.Array(init=np.zeros(dimension)).set_mutation(sigma=sigma)
        parametrization.random_state = np.random.RandomState(seed)
        self._search = registry[name](parametrization, budget=budget, num_workers=population)
        self._population = population
        self._asked: list[Any] = []

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        self._asked = [self._search.ask() for _ in range(self._population)]
        return np.stack([candidate.value for candidate in self._asked])

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        for candidate, loss in zip(self._asked, losses.tolist(), strict=True):
            self._search.tell(candidate, loss)

    def recommend(self) -> Array:
        """What nevergrad would return, (d,)."""
        return np.asarray(self._search.provide_recommendation().value, dtype=np.float64)


def names() -> list[str]:
    """The names in nevergrad's registry."""
    from nevergrad.optimization import registry

    return sorted(registry)
