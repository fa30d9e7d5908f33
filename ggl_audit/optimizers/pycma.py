"""CMA-ES by its inventor's library, pycma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ggl_audit.optimizers.base import Array
from ggl_audit.optimizers.family import Task
from ggl_audit.optimizers.registry import register
from ggl_audit.optimizers.side_by_side import Search

if TYPE_CHECKING:
    import cma


class Pycma(Search):
    """One search by pycma (Hansen, arXiv 1604.00772).

    Starts at the origin, the prior's most likely latent. A search that pycma calls finished starts
    anew at a random latent, so that the rest of its budget is not spent on one point.
    """

    libraries: ClassVar[tuple[str, ...]] = ("cma",)

    def __init__(self, dimension: int, population: int, sigma: float, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._sigma = sigma
        self._options = {
            **self._covariance(),
            "popsize": population,
            "randn": self._draw,
            "seed": np.nan,  # keeps pycma from seeding NumPy's global generator
            "verbose": -9,
        }
        self._search = self._start(np.zeros(dimension))
        self._asked: list[Array] = []

    @classmethod
    def begin(cls, task: Task, seed: int) -> Search:
        """Starts one search of a task."""
        return cls(task.dimension, task.attack.population, task.attack.sigma, seed)

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        if self._search.stop():
            self._search = self._start(self._random.standard_normal(self._search.N))
        self._asked = self._search.ask()
        return np.stack(self._asked)

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        self._search.tell(self._asked, losses.tolist())

    def recommend(self) -> Array:
        """The mean of the search distribution, (d,)."""
        return np.asarray(self._search.mean, dtype=np.float64)

    def _draw(self, *shape: int) -> Array:
        return self._random.standard_normal(shape)

    def _start(self, mean: Array) -> cma.CMAEvolutionStrategy:
        import cma

        return cma.CMAEvolutionStrategy(mean, self._sigma, dict(self._options))

    def _covariance(self) -> dict[str, Any]:
        """The options of pycma that say which covariance it learns."""
        return {}


@register
class FullCovariance(Pycma):
    """One search with a full covariance."""

    name: ClassVar[str] = "pycma:full"
    source: ClassVar[str] = "CMA-ES (Hansen, arXiv 1604.00772), by pycma"
    good_for: ClassVar[str] = "coordinates that depend on each other, up to some hundred of them"


@register
class DiagonalCovariance(Pycma):
    """One search with a diagonal covariance (Ros and Hansen, PPSN 2008)."""

    name: ClassVar[str] = "pycma:diagonal"
    source: ClassVar[str] = "as cma, by pycma, in double precision"
    good_for: ClassVar[str] = "checking cma"

    def _covariance(self) -> dict[str, Any]:
        return {"CMA_diagonal": True}


@register
class PrincipalAxes(Pycma):
    """One search with a diagonal covariance and as many principal axes as are worth their time."""

    name: ClassVar[str] = "pycma:vkd"
    source: ClassVar[str] = "VkD-CMA (Akimoto and Hansen, GECCO 2016), by pycma"
    good_for: ClassVar[str] = (
        "many coordinates of which a few combinations matter, and 10,000 evaluations or more"
    )

    def _covariance(self) -> dict[str, Any]:
        from cma.restricted_gaussian_sampler import GaussVkDSampler

        options: dict[str, Any] = GaussVkDSampler.extend_cma_options()
        return {**options, "CMA_sampler_options": {"randn": self._draw}}
