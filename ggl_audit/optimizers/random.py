"""Random search from the prior: what a search must beat to be one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ggl_audit.optimizers.base import Evaluation, Optimizer
from ggl_audit.optimizers.family import Family, Task
from ggl_audit.optimizers.registry import register


@register
class RandomSearch(Family):
    """Draws every candidate from the prior, N(0, 1) in each coordinate, whatever it is told.

    Each search draws from a generator of its own on the CPU.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "draws from the prior"
    good_for: ClassVar[str] = (
        "the floor: what an optimizer must beat to have learned from the losses"
    )
    tried_first: ClassVar[bool] = False

    def __init__(
        self, dimension: int, population: int, seeds: Sequence[int], device: torch.device
    ) -> None:
        self._shape = (population, dimension)
        self._device = device
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._asked = torch.zeros(len(seeds), *self._shape, device=device)
        self._best = torch.zeros(len(seeds), dimension, device=device)
        self._least = torch.full((len(seeds), 1), torch.inf, device=device)

    @classmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task."""
        return cls(task.dimension, task.attack.population, task.seeds, task.device)

    def ask(self) -> torch.Tensor:
        """The next candidates, (s, P, d)."""
        drawn = [torch.randn(self._shape, generator=each) for each in self._random]
        self._asked = torch.stack(drawn).to(self._device)
        return self._asked

    def tell(self, evaluation: Evaluation) -> None:
        """Remembers the best of all candidates."""
        least, place = evaluation.losses.min(1, keepdim=True)
        best = self._asked.take_along_dim(place[:, :, None], 1)[:, 0]
        self._best = torch.where(least < self._least, best, self._best)
        self._least = torch.minimum(least, self._least)

    def recommend(self) -> torch.Tensor:
        """The best candidates, (s, d); the origin before any was told."""
        return self._best
