"""Gauss-Newton with damping, by differences between candidates: nothing is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ggl_audit.basics.device import widened
from ggl_audit.optimizers.base import Evaluation, Optimizer, Wants
from ggl_audit.optimizers.cma import DiagonalCma
from ggl_audit.optimizers.family import Family, Task
from ggl_audit.optimizers.registry import register

EXPLORED = 0.3
"""The share of the evaluations that CMA-ES has first; 0 and 0.5 are worse behind some defenses."""

STRIDE = 0.03
"""How far a coordinate is moved to see what that changes, in prior deviations."""

DAMPINGS = (1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Times the last damping; each of them is tried."""

LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e4
"""Relative to the mean curvature."""

LITTLE = 3e-4
"""A step gains little if it gains less than this share of all that a search gained."""

PATIENCE = 2
"""Steps of little gain in a row after which a search starts anew."""

FEWEST_STEPS, FEWEST_STEPS_FOR_SEVERAL = 3, 20
"""With fewer ``cma`` stands in; see :meth:`GaussNewton.stand_in`."""


def full_steps(dimension: int, evaluations: int) -> int:
    """How many steps with all differences there are in a search of so many evaluations."""
    return int((1 - EXPLORED) * evaluations) // (dimension + 1 + len(DAMPINGS))


@register
class GaussNewton(Family):
    """Levenberg-Marquardt steps whose derivatives are differences between candidates.

    A gradient is not one number but thousands, which a loss adds up. Here each is looked at by
    itself: one candidate for each coordinate shows what that coordinate does to all of them, and
    least squares tell which step explains what is left (Levenberg 1944, Marquardt 1963; without
    derivatives Brown and Dennis, Numerische Mathematik 18, 1971). Damped steps are tried, and the
    best is taken if it is better.

    Starts where a diagonal CMA-ES has led, as the steps find no more than the nearest minimum. A
    search that gains little any more draws as many random latents as there are coordinates, and
    starts anew at the best of them.
    """

    name: ClassVar[str] = "gauss_newton"
    source: ClassVar[str] = (
        "Levenberg-Marquardt by differences (Brown and Dennis, 1971), started by cma"
    )
    good_for: ClassVar[str] = (
        "most audits, the default: looks at every value of the gradient, not at a loss alone"
    )
    learns_from: ClassVar[Wants] = "products"
    tried_first: ClassVar[bool] = False

    def __init__(
        self,
        dimension: int,
        population: int,
        sigma: float,
        seeds: Sequence[int],
        evaluations: int,
        device: torch.device,
    ) -> None:
        self._explorer = DiagonalCma(dimension, population, sigma, seeds, device)
        self._exploring = int(EXPLORED * evaluations) // population
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        searches = len(seeds)
        zeros = torch.zeros(searches, device=device)
        self._base = torch.zeros(searches, dimension, device=device)
        self._loss = self._first_loss = self._best_loss = zeros + torch.inf
        self._best = self._base
        self._damping, self._idle = zeros + 1, zeros
        self._waiting = zeros > 0
        self._turns = 0
        self._steps = self._asked = self._base[:, None]

    @classmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task."""
        attack = task.attack
        return cls(
            task.dimension,
            attack.population,
            attack.sigma,
            task.seeds,
            task.evaluations,
            task.device,
        )

    @classmethod
    def stand_in(cls, dimension: int, evaluations: int, apart: bool) -> str:
        """``cma`` where there is room for too few steps.

        With three it is as good as ``cma`` with twice the evaluations (faces). Of several images
        ``cma`` can search each by itself if their gradients add up: with 3,000 evaluations digits
        come back at 29.3 dB by 30 steps for both of two images and at 24.8 dB by 15 steps for four,
        where ``cma`` gives 27.0 and 25.7.
        """
        steps = full_steps(dimension, evaluations)
        enough = steps >= (FEWEST_STEPS_FOR_SEVERAL if apart else FEWEST_STEPS)
        return "" if enough else DiagonalCma.name

    @property
    def wants(self) -> Wants:
        """Losses while it explores, then products."""
        return "losses" if self._exploring else "products"

    def ask(self) -> torch.Tensor:
        """In turn the base with a candidate for each coordinate, and some damped steps."""
        if self._exploring:
            self._asked = self._explorer.ask()
        elif self._turns % 2 == 0:
            dimension = self._base.shape[1]
            moves = STRIDE * torch.eye(dimension + 1, dimension, device=self._base.device)
            self._asked = self._base[:, None] + moves.roll(1, 0)
            for index in (self._idle >= PATIENCE).nonzero().flatten().tolist():
                drawn = torch.randn(self._asked.shape[1:], generator=self._random[index])
                self._asked[index] = drawn.to(self._asked)
        else:
            self._asked = self._base[:, None] + self._steps
        return self._asked

    def tell(self, evaluation: Evaluation) -> None:
        """Takes what the last candidates left unexplained."""
        if self._exploring:
            self._exploring -= 1
            self._explorer.tell(evaluation)
            self._accept(evaluation.losses.amin(1) < self._loss, evaluation.losses)
            if not self._exploring:
                self._best_loss = torch.full_like(self._best_loss, torch.inf)
            return
        products = evaluation.products
        assert products is not None
        first, added = products[:, 0], products.diagonal(dim1=1, dim2=2).clone()
        added[:, 0] = -2 * first[:, 0]
        losses = first[:, :1] + 2 * first + added
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        if self._turns % 2 == 0:
            self._look(losses, products.nan_to_num(0.0, 0.0, 0.0))
        else:
            self._move(losses)
        self._turns += 1

    def recommend(self) -> torch.Tensor:
        """The best latents, (s, d)."""
        return self._best

    def _look(self, losses: torch.Tensor, products: torch.Tensor) -> None:
        """Computes the damped steps; or where a search starts anew, from the best of its draws."""
        anew = self._idle >= PATIENCE
        self._loss = torch.where(anew, torch.inf, losses[:, 0])
        self._accept(anew, losses)
        self._first_loss = torch.where(anew | (self._turns == 0), self._loss, self._first_loss)
        self._damping = torch.where(anew, 1.0, self._damping)
        self._idle = torch.where(anew, 0.0, self._idle)
        self._waiting = anew  # a search that starts anew knows no differences yet
        slope = -widened(products[:, 0, 1:, None]) / STRIDE
        values, axes = torch.linalg.eigh(widened(products[:, 1:, 1:]) / STRIDE**2)
        values = values.clamp(min=0)[:, None]
        dampings = self._tried()[:, :, None] * values.mean(2, keepdim=True).clamp(min=1e-30)
        steps = (axes.transpose(1, 2) @ slope).transpose(1, 2) / (values + dampings)
        steps = (steps @ axes.transpose(1, 2)).to(self._base.dtype)
        self._steps = torch.where(anew[:, None, None], 0.0, steps)

    def _move(self, losses: torch.Tensor) -> None:
        """Takes the best of the steps that were tried, if it is better."""
        least, chosen = losses.min(1)
        better = least < self._loss
        tried = self._tried().gather(1, chosen[:, None])[:, 0]
        raised = (self._damping * DAMPINGS[-1]).clamp(max=MOST_DAMPING)
        damping = torch.where(better, tried, raised)
        gain = (self._loss - least).clamp(min=0)
        little = gain <= LITTLE * (self._first_loss - self._loss + gain)
        idle = torch.where(little, self._idle + 1, 0.0)
        self._damping = torch.where(self._waiting, self._damping, damping)
        self._idle = torch.where(self._waiting, self._idle, idle)
        self._accept(better, losses)

    def _accept(self, which: torch.Tensor, losses: torch.Tensor) -> None:
        """Puts the bases of some searches at the best of the last candidates."""
        least, chosen = losses.min(1)
        best = self._asked[torch.arange(len(losses), device=losses.device), chosen]
        self._base = torch.where(which[:, None], best, self._base)
        self._loss = torch.where(which, least, self._loss)
        improved = self._loss < self._best_loss
        self._best = torch.where(improved[:, None], self._base, self._best)
        self._best_loss = torch.where(improved, self._loss, self._best_loss)

    def _tried(self) -> torch.Tensor:
        """The dampings of the next steps, (s, n), relative to the mean curvature."""
        factors = torch.tensor(DAMPINGS, device=self._base.device)
        return (self._damping[:, None] * factors).clamp(LEAST_DAMPING, MOST_DAMPING)
