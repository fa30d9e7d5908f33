"""Bayesian optimization with a Gaussian process, by scikit-optimize."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ggl_audit.optimizers.base import Array
from ggl_audit.optimizers.family import Task
from ggl_audit.optimizers.registry import register
from ggl_audit.optimizers.side_by_side import Search
from ggl_audit.optimizers.subspace import Subspace, make_subspace
from ggl_audit.spec import SubspaceSpec

if TYPE_CHECKING:
    from skopt.learning import GaussianProcessRegressor

MOST_POINTS = 100
"""That the process learns from: the time it takes grows with their cube."""

FIRST_BATCHES = 2
"""Drawn evenly in the box, before there is a process."""

NOISE = 1e-6
"""A share of the losses' variance, though they have none; with less nothing can be inverted."""


@register
class Bayesian(Search):
    """One search of a subspace: Gaussian process, lower confidence bound, batches by lies.

    Each batch fits a process (Matern 5/2, a length for each direction) to the best and the latest
    points, half of each. The fit begins at the kernel of the batch before and, since one that takes
    every loss for noise is a maximum of the likelihood that is never left, also anew; the likelier
    is taken. The kernel then stays as it is while the candidates are chosen one after the other,
    each being told to the process with the least loss so far in place of its own (the constant liar
    of Ginsbourger, Le Riche and Carraro, 2010).
    """

    name: ClassVar[str] = "bayesian"
    source: ClassVar[str] = "Gaussian process and lower confidence bound, by scikit-optimize"
    good_for: ClassVar[str] = (
        "100 to 500 evaluations, each dearer than a second, in about 12 directions"
    )
    takes_subspace: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("skopt",)

    def __init__(self, subspace: Subspace, population: int, seed: int) -> None:
        from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern

        self._subspace = subspace
        self._population = population
        self._seed = seed
        self._batch = 0
        lengths = Matern(np.ones(subspace.dimension), (0.01, 100), nu=2.5)
        self._kernel = ConstantKernel(1.0, (0.01, 1000.0)) * lengths
        self._parameters: Array = self._kernel.theta
        self._asked = np.zeros((0, subspace.dimension))
        self._places, self._losses = self._asked, np.zeros(0)
        self._best, self._least = np.full(subspace.dimension, 0.5), np.inf

    @classmethod
    def begin(cls, task: Task, seed: int) -> Search:
        """Starts one search of a task."""
        declared = task.attack.subspace or SubspaceSpec()
        subspace = make_subspace(declared, task.dimension, seed, task.principal)
        return cls(subspace, task.attack.population, seed)

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        random = np.random.default_rng((self._seed, self._batch))
        if self._batch < FIRST_BATCHES:
            self._asked = random.random((self._population, self._subspace.dimension))
            if self._batch == 0:
                self._asked[0] = 0.5  # the origin, the prior's most likely latent
        else:
            self._asked = self._chosen(int(random.integers(2**31)))
        return self._subspace.latents(self._asked)

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        if losses.min() < self._least:
            self._best, self._least = self._asked[losses.argmin()], float(losses.min())
        places = np.concatenate([self._places, self._asked])
        told = np.concatenate([self._losses, losses])
        latest = np.arange(len(told)) >= len(told) - MOST_POINTS // 2
        # First the latest, then the best of the rest; kept in the order in which they came.
        kept = np.sort(np.lexsort((told, ~latest))[:MOST_POINTS])
        self._places, self._losses = places[kept], told[kept]
        self._batch += 1

    def recommend(self) -> Array:
        """The best candidate, (d,); the origin before any was told."""
        return self._subspace.latents(self._best)

    def _chosen(self, seed: int) -> Array:
        from skopt import Optimizer
        from skopt.learning import GaussianProcessRegressor

        fits = [self._fit(begin) for begin in (self._kernel.theta, self._parameters)]
        fitted = max(fits, key=lambda fit: fit.log_marginal_likelihood_value_).kernel_
        self._parameters = fitted.theta
        optimizer = Optimizer(
            [(0.0, 1.0)] * self._subspace.dimension,
            GaussianProcessRegressor(fitted, NOISE, optimizer=None, normalize_y=True),
            n_initial_points=0,
            acq_func="LCB",
            acq_optimizer="lbfgs",
            acq_optimizer_kwargs={"n_points": 1000, "n_restarts_optimizer": 1},
            random_state=seed,
        )
        optimizer.tell(self._places.tolist(), self._losses.tolist())
        return np.array(optimizer.ask(self._population, "cl_min"))

    def _fit(self, begin: Array) -> GaussianProcessRegressor:
        from skopt.learning import GaussianProcessRegressor

        kernel = self._kernel.clone_with_theta(begin)
        process = GaussianProcessRegressor(kernel, NOISE, normalize_y=True)
        return process.fit(self._places, self._losses)
