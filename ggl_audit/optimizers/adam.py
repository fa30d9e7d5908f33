"""Adam on the latents: the peer that has derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from ggl_audit.optimizers.base import DERIVATIVE_COST, Evaluation, Optimizer, Wants
from ggl_audit.optimizers.family import Family, Task
from ggl_audit.optimizers.registry import register

FIRST_STEP = 0.1
"""As in GGL (Li et al., CVPR 2022); falls to zero by half a cosine (Loshchilov, ICLR 2017)."""


@register
class Adam(Family):
    """Adam (Kingma and Ba, ICLR 2015) from as many latents of each search as it has candidates.

    The first starts at the origin, the prior's most likely latent, the others at random ones; none
    learns of another. Each search draws its starts from a generator of its own on the CPU.
    """

    name: ClassVar[str] = "adam"
    source: ClassVar[str] = "Adam (Kingma and Ba, ICLR 2015) from `population` latents"
    good_for: ClassVar[str] = (
        "losses with derivatives: no sign, quantization or other steps in the defense"
    )
    learns_from: ClassVar[Wants] = "derivatives"
    tried_first: ClassVar[bool] = False

    def __init__(
        self,
        dimension: int,
        population: int,
        evaluations: int,
        seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        starts = [
            torch.randn(population, dimension, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._latents = torch.stack(starts).to(device)
        self._latents[:, 0] = 0
        self._adam = torch.optim.Adam([self._latents], lr=FIRST_STEP)
        self._adam.state[self._latents] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(self._latents),
            "exp_avg_sq": torch.zeros_like(self._latents),
        }
        self._steps = max(1, evaluations // population)
        self._leader = torch.zeros(len(seeds), dtype=torch.int64, device=device)

    @classmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task, whose derivatives are paid for in candidates."""
        steps = task.evaluations // DERIVATIVE_COST
        return cls(task.dimension, task.attack.population, steps, task.seeds, task.device)

    def ask(self) -> torch.Tensor:
        """The next candidates, (s, P, d)."""
        return self._latents.clone()

    def tell(self, evaluation: Evaluation) -> None:
        """Takes the losses and their derivatives at the last candidates."""
        taken = float(self._adam.state[self._latents]["step"])
        cosine = math.cos(math.pi * min(1.0, taken / self._steps))
        self._adam.param_groups[0]["lr"] = FIRST_STEP * (1 + cosine) / 2
        self._latents.grad = evaluation.derivatives
        self._adam.step()
        self._leader = evaluation.losses.argmin(1)

    def recommend(self) -> torch.Tensor:
        """Where the best start of each search is now, (s, d)."""
        return self._latents.take_along_dim(self._leader[:, None, None], 1)[:, 0]
