"""Any optimizer of nevergrad's registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ggl_audit.optimizers.base import Array
from ggl_audit.optimizers.family import Task
from ggl_audit.optimizers.registry import register
from ggl_audit.optimizers.side_by_side import Search


@register
class Nevergrad(Search):
    """One search by one of nevergrad's optimizers (Rapin and Teytaud, 2018), by name.

    ``num_workers`` is the population: left at 1, many of them silently turn sequential. Told in the
    order of asking; whoever calls keeps the best point, since a restart inside can lose it.
    """

    name: ClassVar[str] = "nevergrad:NAME"
    source: ClassVar[str] = "any name of nevergrad's registry (Rapin and Teytaud, 2018)"
    good_for: ClassVar[str] = "comparing with what others used"
    libraries: ClassVar[tuple[str, ...]] = ("nevergrad",)

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

    @classmethod
    def begin(cls, task: Task, seed: int) -> Search:
        """Starts one search of a task."""
        attack = task.attack
        return cls(
            task.variant, task.dimension, attack.population, attack.sigma, task.evaluations, seed
        )

    @classmethod
    def variants(cls) -> Sequence[str]:
        """The names in nevergrad's registry."""
        from nevergrad.optimization import registry

        return sorted(registry)

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
