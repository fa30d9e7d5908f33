"""Gauss-Newton with damping, from candidates alone: no derivative of anything is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ggl_audit.optimizers.base import Evaluation, State, Wants

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


class GaussNewton:
    """Levenberg-Marquardt steps whose derivatives are differences between candidates.

    A gradient is not one number but thousands, which a loss adds up. Here each is looked at by
    itself: one candidate for each coordinate shows what that coordinate does to all of them, and
    least squares tell which step explains what is left (Levenberg 1944, Marquardt 1963; without
    derivatives Brown and Dennis, Numerische Mathematik 18, 1971). Damped steps are tried, and the
    best is taken if it is better.

    Starts at the origin, the prior's most likely latent. A search that gains little any more draws
    as many random latents as there are coordinates, and starts anew at the best of them.
    """

    wants: ClassVar[Wants] = "residuals"

    def __init__(self, dimension: int, seeds: Sequence[int], device: torch.device) -> None:
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        searches = len(seeds)
        zeros = torch.zeros(searches, device=device)
        self._base = torch.zeros(searches, dimension, device=device)
        self._residual = torch.zeros(searches, 0, device=device)
        self._loss = self._first_loss = self._best_loss = zeros + torch.inf
        self._best = self._base
        self._damping, self._idle = zeros + 1, zeros
        self._waiting = zeros > 0
        self._turns = 0
        self._steps = self._asked = self._base[:, None]

    def ask(self) -> torch.Tensor:
        """The origin; then in turn a candidate for each coordinate, and some damped steps."""
        if self._turns == 0:
            self._asked = self._base[:, None]
        elif self._turns % 2 == 1:
            self._asked = self._base[:, None] + STRIDE * self._axes()
            for index in self._tired().nonzero().flatten().tolist():
                drawn = torch.randn(self._asked.shape[1:], generator=self._random[index])
                self._asked[index] = drawn.to(self._asked)
        else:
            self._asked = self._base[:, None] + self._steps
        return self._asked

    def tell(self, evaluation: Evaluation) -> None:
        """Takes what the last candidates' gradients left unexplained."""
        residuals = evaluation.residuals
        assert residuals is not None
        losses = residuals.square().sum(2)
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        residuals = residuals.nan_to_num(0.0, 0.0, 0.0)
        if self._turns % 2 == 1:
            self._look(losses, residuals)
        else:
            self._move(losses, residuals)
        self._turns += 1

    def recommend(self) -> torch.Tensor:
        """The best latents, (s, d)."""
        return self._best

    def state(self) -> State:
        """The bases with what they leave unexplained, the dampings and the steps to be tried."""
        return {
            "base": self._base,
            "residual": self._residual,
            "losses": torch.stack([self._loss, self._first_loss, self._best_loss]),
            "best": self._best,
            "damping": self._damping,
            "idle": self._idle,
            "turns": torch.tensor(self._turns),
            "waiting": self._waiting,
            "steps": self._steps,
            "random": torch.stack([generator.get_state() for generator in self._random]),
        }

    def restore(self, state: State) -> None:
        """Goes on from there."""
        self._base, self._residual, self._best = state["base"], state["residual"], state["best"]
        self._loss, self._first_loss, self._best_loss = state["losses"]
        self._damping, self._idle, self._steps = state["damping"], state["idle"], state["steps"]
        self._waiting, self._turns = state["waiting"], int(state["turns"])
        for generator, position in zip(self._random, state["random"], strict=True):
            generator.set_state(position)

    def _axes(self) -> torch.Tensor:
        return torch.eye(self._base.shape[1], device=self._base.device)

    def _tired(self) -> torch.Tensor:
        return self._idle >= PATIENCE

    def _look(self, losses: torch.Tensor, residuals: torch.Tensor) -> None:
        """Computes the damped steps; or where a search starts anew, from the best of its draws."""
        anew = self._tired()
        slopes = (residuals - self._residual[:, None]) / STRIDE
        slopes[anew] = 0  # these do not know any yet, and wait a turn
        self._waiting = anew
        self._first_loss = torch.where(anew, torch.inf, self._first_loss)
        self._damping = torch.where(anew, 1.0, self._damping)
        self._idle = torch.where(anew, 0.0, self._idle)
        slope = -(slopes @ self._residual[:, :, None]).double()
        self._accept(anew, losses, residuals)
        curvature = (slopes @ slopes.transpose(1, 2)).double()
        values, vectors = torch.linalg.eigh(curvature)
        mean = values.clamp(min=0).mean(1).clamp(min=1e-30)
        dampings = (self._tried() * mean[:, None])[:, :, None]
        along = (vectors.transpose(1, 2) @ slope).transpose(1, 2)
        steps = (along / (values.clamp(min=0)[:, None] + dampings)) @ vectors.transpose(1, 2)
        self._steps = steps.to(self._base.dtype)

    def _move(self, losses: torch.Tensor, residuals: torch.Tensor) -> None:
        """Takes the best of the steps that were tried, if it is better."""
        least, chosen = losses.min(1)
        better = least < self._loss
        if self._turns:
            tried = self._tried().gather(1, chosen[:, None])[:, 0]
            raised = (self._damping * DAMPINGS[-1]).clamp(max=MOST_DAMPING)
            damping = torch.where(better, tried, raised)
            self._damping = torch.where(self._waiting, self._damping, damping)
            gain = (self._loss - least).clamp(min=0)
            little = gain <= LITTLE * (self._first_loss - self._loss + gain)
            idle = torch.where(little, self._idle + 1, 0.0)
            self._idle = torch.where(self._waiting, self._idle, idle)
        else:
            self._residual = residuals[:, 0]
        self._accept(better, losses, residuals)

    def _accept(
        self, which: torch.Tensor, losses: torch.Tensor, residuals: torch.Tensor
    ) -> None:
        """Puts the bases of some searches at the best of the candidates."""
        rows = torch.arange(len(losses), device=losses.device)
        least, chosen = losses.min(1)
        self._base = torch.where(which[:, None], self._asked[rows, chosen], self._base)
        self._residual = torch.where(which[:, None], residuals[rows, chosen], self._residual)
        self._loss = torch.where(which, least, self._loss)
        fresh = self._first_loss.isinf() & which
        self._first_loss = torch.where(fresh, least, self._first_loss)
        improved = self._loss < self._best_loss
        self._best = torch.where(improved[:, None], self._base, self._best)
        self._best_loss = torch.where(improved, self._loss, self._best_loss)

    def _tried(self) -> torch.Tensor:
        """The dampings of the next steps, (s, n), relative to the mean curvature."""
        factors = torch.tensor(DAMPINGS, device=self._base.device)
        return (self._damping[:, None] * factors).clamp(LEAST_DAMPING, MOST_DAMPING)
