"""Searches that run one at a time, as one optimizer of many."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from ggl_audit.basics.device import widened
from ggl_audit.optimizers.base import Array, Evaluation, Optimizer, Wants
from ggl_audit.optimizers.family import Family, Task


class Search(Family):
    """A family whose instances minimize one function of d coordinates each."""

    @classmethod
    @abstractmethod
    def begin(cls, task: Task, seed: int) -> Search:
        """Starts one search of a task."""

    @classmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task, side by side."""
        return SideBySide(partial(cls.begin, task), task.seeds, task.device)

    @abstractmethod
    def ask(self) -> Array:
        """The next candidates, (P, d)."""

    @abstractmethod
    def tell(self, losses: Array) -> None:
        """Takes the losses of the last candidates, (P,)."""

    @abstractmethod
    def recommend(self) -> Array:
        """Where it believes the minimum to be, (d,)."""


class SideBySide:
    """As many searches as there are seeds, each of which asks for as many candidates.

    What they do on the CPU is all that they do; only the candidates go to the device.
    """

    wants: ClassVar[Wants] = "losses"

    def __init__(
        self, start: Callable[[int], Search], seeds: Sequence[int], device: torch.device
    ) -> None:
        with quiet():
            self._searches = [start(seed) for seed in seeds]
        self._device = device

    def ask(self) -> torch.Tensor:
        """The next candidates, (s, P, d)."""
        with quiet():
            return self._stacked([search.ask() for search in self._searches])

    def tell(self, evaluation: Evaluation) -> None:
        """Takes the losses of the last candidates."""
        losses = widened(evaluation.losses).cpu().numpy()
        with quiet():
            for search, told in zip(self._searches, losses, strict=True):
                search.tell(told)

    def recommend(self) -> torch.Tensor:
        """What each search recommends, (s, d)."""
        with quiet():
            return self._stacked([search.recommend() for search in self._searches])

    def _stacked(self, values: list[Array]) -> torch.Tensor:
        return torch.as_tensor(np.stack(values), dtype=torch.float32, device=self._device)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the warnings that libraries raise about their own choices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
