"""TuRBO-1: Bayesian optimization within a trust region, on the parts of BoTorch."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch

from ggl_audit.optimizers.base import Array
from ggl_audit.optimizers.family import Task
from ggl_audit.optimizers.registry import register
from ggl_audit.optimizers.side_by_side import Search
from ggl_audit.optimizers.subspace import Subspace, make_subspace

FIRST_LENGTH, LEAST_LENGTH, MOST_LENGTH = 0.8, 0.5**7, 1.6
"""The trust region's side, the box being 1 wide; below the least the search starts anew."""

SUCCESSES = 3
"""Better batches in a row that double the region; d / batch worse ones halve it."""

MOST_POINTS = 256
"""That the process learns from, those nearest to the best: time grows with their cube."""

MOST_PLACES = 2000
"""Among which a batch is chosen; the paper takes 5,000, and ten times as long."""

MOST_ITERATIONS = 10
"""In fitting a process, which begins at the parameters of the one before."""


@register
class Turbo(Search):
    """One search by TuRBO-1 (Eriksson et al., NeurIPS 2019), written from the paper.

    Each batch fits a Gaussian process with a length for each direction to the points since the
    search last started anew, and takes the minima of as many samples of it (Thompson sampling)
    among places around the best point, within a box whose sides are as those lengths. Before there
    is a process, each batch is of a scrambled Sobol sequence.

    The paper's process has a Matern kernel and bounds on its lengths; this one is BoTorch's, with a
    Gaussian kernel and a prior on them that suits many directions (Hvarfner et al., ICML 2024).
    """

    name: ClassVar[str] = "turbo"
    source: ClassVar[str] = "TuRBO-1 (Eriksson et al., NeurIPS 2019) on BoTorch"
    good_for: ClassVar[str] = (
        "100 to 500 evaluations in a subspace; in a whole latent space cma finds more"
    )
    takes_subspace: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("botorch", "gpytorch")
    install: ClassVar[str] = "ggl-audit[turbo]"

    def __init__(self, subspace: Subspace, population: int, evaluations: int, seed: int) -> None:
        self._subspace = subspace
        self._population = population
        self._seed = seed
        self._first = math.ceil(min(2 * subspace.dimension, evaluations / 4) / population)
        self._batch = 0
        self._best = torch.full((subspace.dimension,), 0.5, dtype=torch.float64)
        self._least = torch.tensor(torch.inf, dtype=torch.float64)
        self._asked = torch.zeros(0, subspace.dimension, dtype=torch.float64)
        self._places, self._losses = self._asked, self._asked.sum(1)
        self._fitted: dict[str, torch.Tensor] = {}
        self._length, self._successes, self._failures = FIRST_LENGTH, 0, 0

    @classmethod
    def begin(cls, task: Task, seed: int) -> Search:
        """Starts one search of a task."""
        subspace = make_subspace(task.attack.subspace, task.dimension, seed, task.principal)
        return cls(subspace, task.attack.population, task.evaluations, seed)

    def ask(self) -> Array:
        """The next candidates, (population, d)."""
        seed = int(np.random.default_rng((self._seed, self._batch)).integers(2**31))
        count = self._population
        if len(self._losses) < self._first * count:
            self._asked = self._sobol(count, seed)
            if self._batch == 0:
                self._asked[0] = 0.5  # the origin, the prior's most likely latent
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self._asked = self._sampled(seed)
        return self._subspace.latents(self._asked.numpy())

    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates."""
        told = torch.as_tensor(losses)
        if self._first * self._population <= len(self._losses):
            self._resize(bool(told.min() < self._losses.min()))
        self._places = torch.cat([self._places, self._asked])
        self._losses = torch.cat([self._losses, told])
        if told.min() < self._least:
            self._least, self._best = told.min(), self._asked[told.argmin()]
        self._batch += 1
        if self._length < LEAST_LENGTH:
            self._start_anew()

    def recommend(self) -> Array:
        """The best candidate, (d,); the origin before any was told."""
        return self._subspace.latents(self._best.numpy())

    def _start_anew(self) -> None:
        self._places, self._losses, self._fitted = self._places[:0], self._losses[:0], {}
        self._length, self._successes, self._failures = FIRST_LENGTH, 0, 0

    def _resize(self, better: bool) -> None:
        self._successes = self._successes + 1 if better else 0
        self._failures = 0 if better else self._failures + 1
        if self._successes == SUCCESSES:
            self._length, self._successes = min(2 * self._length, MOST_LENGTH), 0
        elif self._failures == math.ceil(self._subspace.dimension / self._population):
            self._length, self._failures = self._length / 2, 0

    def _sobol(self, count: int, seed: int) -> torch.Tensor:
        engine = torch.quasirandom.SobolEngine(self._subspace.dimension, scramble=True, seed=seed)
        return engine.draw(count, dtype=torch.float64)

    def _sampled(self, seed: int) -> torch.Tensor:
        from botorch.fit import fit_gpytorch_mll
        from botorch.generation.sampling import MaxPosteriorSampling
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood
        from gpytorch.settings import max_cholesky_size

        centre = self._places[self._losses.argmin()]
        nearest = (self._places - centre).square().sum(1).argsort(stable=True)[:MOST_POINTS]
        losses = self._losses[nearest, None]
        process = SingleTaskGP(self._places[nearest], -losses)
        process.load_state_dict(self._fitted, strict=False)
        likelihood = ExactMarginalLogLikelihood(process.likelihood, process)
        options = {"options": {"maxiter": MOST_ITERATIONS}}
        fit_gpytorch_mll(likelihood, optimizer_kwargs=options)
        self._fitted = {k: v.detach().clone() for k, v in process.named_parameters()}
        lengths = process.covar_module.lengthscale.detach().flatten()
        sides = self._length * lengths / lengths.log().mean().exp()
        low, high = (centre - sides / 2).clamp(0, 1), (centre + sides / 2).clamp(0, 1)

        d = self._subspace.dimension
        count = min(100 * d, MOST_PLACES)
        places = low + (high - low) * self._sobol(count, seed)
        # Of many directions about 20 are moved at a time, and one at least.
        moved = torch.rand(count, d) < min(1, 20 / d)
        moved[torch.arange(count), torch.randint(d, (count,))] = True
        places = torch.where(moved, places, centre)
        sampling = MaxPosteriorSampling(process, replacement=False)
        with torch.no_grad(), max_cholesky_size(count):
            chosen: torch.Tensor = sampling(places, num_samples=self._population)
        return chosen
