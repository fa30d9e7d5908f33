"""CMA-ES with a diagonal covariance, for many searches at once on the model's device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from ggl_audit.optimizers.base import Evaluation, Optimizer
from ggl_audit.optimizers.family import Family, Task
from ggl_audit.optimizers.registry import register

CONVERGED = 1e-4
"""A share of the first step size: a search whose steps have become smaller starts anew."""

FLAT = 1e-7
"""A population whose losses differ by less, relative to their size, tells nothing more."""

DRAWN_TOGETHER = 32
"""Populations that are drawn, and brought to the device, at a time."""


@register
class DiagonalCma(Family):
    """Separable CMA-ES (Ros and Hansen, PPSN 2008), as in Hansen's tutorial (arXiv 1604.00772).

    With negative weights (its equation 53) and step size control by the evolution path (equation
    43); the learning rates are those that pycma takes for a diagonal of d variances. Starts at the
    origin, the prior's most likely latent. A search that has converged starts anew at a random
    latent, so that the rest of its budget is not spent on one point.

    Each search draws from a generator of its own on the CPU, so that it does the same on every
    device and whatever else is searched beside it.
    """

    name: ClassVar[str] = "cma"
    source: ClassVar[str] = "CMA-ES with a diagonal covariance (Ros and Hansen, PPSN 2008)"
    good_for: ClassVar[str] = (
        "the cheapest for an evaluation: any loss, any device, all searches at once"
    )
    tried_first: ClassVar[bool] = False

    def __init__(
        self,
        dimension: int,
        population: int,
        sigma: float,
        seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        self._shape = (population, dimension)
        self._first_sigma = sigma
        self._device = device
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: list[torch.Tensor] = []
        self._set_rates(population, dimension)
        searches = len(seeds)
        self._mean = torch.zeros(searches, dimension, device=device)
        self._variances = torch.ones_like(self._mean)
        self._path, self._sigma_path = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        self._sigma = torch.full((searches, 1), sigma, device=device)
        self._generation = torch.zeros(searches, 1, device=device)
        self._normal = self._steps = torch.zeros(searches, population, dimension, device=device)

    def _set_rates(self, population: int, d: int) -> None:
        ranks = torch.arange(1, population + 1, dtype=torch.float64)
        raw = math.log((population + 1) / 2) - ranks.log()
        positive, negative = raw.clamp(min=0), raw.clamp(max=0)
        mass = float(positive.sum().square() / positive.square().sum())
        self._mass = mass
        self._sigma_rate = (mass + 2) / (d + mass + 5)
        excess = math.sqrt((mass - 1) / (d + 1)) - 1
        self._damping = 1 + 2 * max(0.0, excess) + self._sigma_rate
        self._path_rate = (1 + (1 + mass) / d) / (math.sqrt(d) + (1 + 2 * mass) / d)
        one = 1 / (d + 2 * math.sqrt(d) + mass / d)
        many = min(1 - one, (mass + 1 / mass - 2) / (d + 4 * math.sqrt(d) + mass / 2))
        self._one_rate, self._many_rate = one, many
        weights = positive / positive.sum()
        if bool((negative < 0).any()) and many > 0:
            lost = float(negative.sum().square() / negative.square().sum())
            least = min(1 + one / many, 1 + 2 * lost / (mass + 2), (1 - one - many) / (d * many))
            weights = weights + least * negative / negative.abs().sum()
        self._weight = float(weights.sum())
        self._weights = weights.to(self._device, torch.float32)
        self._usual_length = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))

    @classmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task."""
        attack = task.attack
        return cls(task.dimension, attack.population, attack.sigma, task.seeds, task.device)

    def ask(self) -> torch.Tensor:
        """The next candidates, (s, P, d)."""
        if not self._drawn:
            self._drawn = list(self._draw(DRAWN_TOGETHER).unbind(1))
        self._normal = self._drawn.pop()
        self._steps = self._variances.sqrt()[:, None] * self._normal
        return self._mean[:, None] + self._sigma[:, None] * self._steps

    def tell(self, evaluation: Evaluation) -> None:
        """Takes the losses of the last candidates."""
        losses, d = evaluation.losses, self._shape[1]
        order = losses.argsort(dim=1, stable=True)
        steps = self._steps.gather(1, order[:, :, None].expand_as(self._steps))
        weights = self._weights[:, None]
        step = (weights.clamp(min=0) * steps).sum(1)
        self._mean = self._mean + self._sigma * step

        deviations = self._variances.sqrt()
        keep, gain = 1 - self._sigma_rate, self._sigma_rate * (2 - self._sigma_rate)
        whitened = step / deviations
        self._sigma_path = keep * self._sigma_path + math.sqrt(gain * self._mass) * whitened
        self._generation = self._generation + 1
        squared = self._sigma_path.square().sum(1, keepdim=True)
        # A path that is long only since sigma is too small does not go into the covariance.
        unbiased = squared / (1 - keep ** (2 * self._generation)) / d
        held = (unbiased < 2 + 4 / (d + 1)).to(step.dtype)
        keep, gain = 1 - self._path_rate, self._path_rate * (2 - self._path_rate)
        self._path = keep * self._path + held * math.sqrt(gain * self._mass) * step

        lengths = (steps / deviations[:, None]).square().sum(2, keepdim=True).clamp(min=1e-12)
        scaled = torch.where(weights < 0, weights * d / lengths, weights)
        forgotten = self._one_rate * (1 - (1 - held) * gain) + self._many_rate * self._weight
        self._variances = (
            (1 - forgotten) * self._variances
            + self._one_rate * self._path.square()
            + self._many_rate * (scaled * steps.square()).sum(1)
        ).clamp(min=1e-12)
        change = (squared.sqrt() / self._usual_length - 1) * self._sigma_rate / self._damping
        self._sigma = self._sigma * change.clamp(-1, 1).exp()
        self._start_anew(losses)

    def recommend(self) -> torch.Tensor:
        """The means of the search distributions, (s, d)."""
        return self._mean

    def _draw(self, count: int) -> torch.Tensor:
        drawn = [torch.randn(count, *self._shape, generator=each) for each in self._random]
        return torch.stack(drawn).to(self._device)

    def _start_anew(self, losses: torch.Tensor) -> None:
        widest = self._sigma * self._variances.amax(1, keepdim=True).sqrt()
        least, most = losses.aminmax(dim=1, keepdim=True)
        done = (widest < CONVERGED * self._first_sigma) | (most - least <= FLAT * most.abs())
        zero = torch.zeros_like(self._mean)
        self._mean = torch.where(done, self._normal[:, -1], self._mean)
        self._sigma = torch.where(done, self._first_sigma, self._sigma)
        self._variances = torch.where(done, zero + 1, self._variances)
        self._path = torch.where(done, zero, self._path)
        self._sigma_path = torch.where(done, zero, self._sigma_path)
        self._generation = torch.where(done, zero[:, :1], self._generation)
