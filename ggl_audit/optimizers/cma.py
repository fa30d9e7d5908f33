"""CMA-ES with a diagonal covariance, by pycma."""

from __future__ import annotations

import warnings

import numpy as np

from ggl_audit.optimizers.base import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about plots that pycma cannot draw without matplotlib
    import cma


class DiagonalCma:
    """Separable CMA-ES (Ros and Hansen, PPSN 2008).

    Starts at the origin, the prior's most likely latent. A search that has converged starts anew
    at a random latent, so that the rest of its budget is not spent on one point.
    """

    def __init__(self, dimension: int, population: int, sigma: float, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._population = population
        self._sigma = sigma
        self._search = self._start(np.zeros(dimension))
        self._asked: list[Array] = []

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        if self._search.stop():
            start = self._random.standard_normal(self._search.N)
            self._search = self._start(start)
        self._asked = self._search.ask()
        return np.stack(self._asked)

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        self._search.tell(self._asked, losses.tolist())

    def recommend(self) -> Array:
        """The mean of the search distribution."""
        return np.asarray(self._search.mean, dtype=np.float64)

    def _start(self, mean: Array) -> cma.CMAEvolutionStrategy:
        return cma.CMAEvolutionStrategy(
            mean,
            self._sigma,
            {
                "popsize": self._population,
                "CMA_diagonal": True,
                "randn": lambda *shape: self._random.standard_normal(shape),
                "seed": np.nan,  # keeps pycma from seeding NumPy's global generator
                "verbose": -9,
            },
        )
