"""CMA-ES by its inventor's library, pycma."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ggl_audit.optimizers.base import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about plots that pycma cannot draw without matplotlib
    import cma
    from cma.restricted_gaussian_sampler import GaussVkDSampler

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "diagonal": {"CMA_diagonal": True},
    "vkd": GaussVkDSampler.extend_cma_options(),
}
"""pycma's options for each."""


class Pycma:
    """One search by pycma (Hansen, arXiv 1604.00772).

    Of a full covariance; of a diagonal one (Ros and Hansen, PPSN 2008); or of a diagonal one with
    as many principal axes as it finds worth the time (VkD; Akimoto and Hansen, GECCO 2016). Starts
    at the origin, the prior's most likely latent. A search that pycma calls finished starts anew at
    a random latent, so that the rest of its budget is not spent on one point.
    """

    def __init__(
        self, variant: str, dimension: int, population: int, sigma: float, seed: int
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._sigma = sigma
        self._options = {
            **VARIANTS[variant],
            "popsize": population,
            "randn": self._draw,
            "seed": np.nan,  # keeps pycma from seeding NumPy's global generator
            "verbose": -9,
        }
        if variant == "vkd":
            self._options["CMA_sampler_options"] = {"randn": self._draw}
        self._search = self._start(np.zeros(dimension))
        self._asked: list[Array] = []

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
        return cma.CMAEvolutionStrategy(mean, self._sigma, dict(self._options))
