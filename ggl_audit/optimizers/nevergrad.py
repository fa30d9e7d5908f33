"""Any optimizer of nevergrad's registry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ggl_audit.optimizers.base import Array


class Nevergrad:
    """Drives one of nevergrad's optimizers by name.

    ``num_workers`` is the population: left at 1, many of them silently turn sequential. Told in the
    order of asking; whoever calls keeps the best point, since a restart inside can lose it.
    """

    def __init__(
        self, name: str, dimension: int, population: int, sigma: float, budget: int, seed: int
    ) -> None:
        from nevergrad import p
        from nevergrad.optimization import registry

        parametrization = p.Array(init=np.zeros(dimension)).set_mutation(sigma=sigma)
        parametrization.random_state = np.random.RandomState(seed)
        with _quiet():
            self._search = registry[name](parametrization, budget=budget, num_workers=population)
        self._population = population
        self._asked: list[Any] = []

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        with _quiet():
            self._asked = [self._search.ask() for _ in range(self._population)]
        return np.stack([candidate.value for candidate in self._asked])

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        with _quiet():
            for candidate, loss in zip(self._asked, losses.tolist(), strict=True):
                self._search.tell(candidate, loss)

    def recommend(self) -> Array:
        """What nevergrad would return."""
        with _quiet():
            return np.asarray(self._search.provide_recommendation().value, dtype=np.float64)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings that nevergrad's optimizers raise about their own choices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def names() -> list[str]:
    """The names in nevergrad's registry."""
    from nevergrad.optimization import registry

    return sorted(registry)
