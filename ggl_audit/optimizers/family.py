"""What a family of optimizers is: its traits, and how it is started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ggl_audit.optimizers.base import EVALUATION_COST, Optimizer, Principal, Wants
from ggl_audit.spec import AttackSpec

ANY_NAME = ":NAME"
"""Ends the name of a family for which any of its variants can be declared."""


@dataclass(frozen=True)
class Task:
    """What an optimizer is started for.

    Attributes:
        attack: its name, population, first step size and subspace, as declared.
        dimension: of each search, d.
        seeds: of each search; it does the same whatever others are beside it.
        evaluations: candidates that each search will be given, each of which costs one.
        device: where the candidates are to be.
        principal: computes the principal directions of the generator, where they are known.
    """

    attack: AttackSpec
    dimension: int
    seeds: Sequence[int]
    evaluations: int
    device: torch.device
    principal: Principal | None

    @property
    def variant(self) -> str:
        """What follows the colon in the declared name."""
        return self.attack.optimizer.partition(":")[2]


class Family(ABC):
    """Optimizers of one kind; its traits are on the class, and its instances are optimizers.

    One that runs a single search at a time derives from :class:`Search` instead.
    """

    name: ClassVar[str]
    """As it is declared; at the end ``:NAME`` stands for a colon and any of the variants."""

    source: ClassVar[str]
    """The method and its paper."""

    good_for: ClassVar[str]
    """When to choose it."""

    learns_from: ClassVar[Wants] = "losses"
    """The most that it wants to be told, which decides what an evaluation costs."""

    takes_subspace: ClassVar[bool] = False
    """Whether it searches the declared subspace."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """What it imports inside its functions, so that a list of all families is quick."""

    install: ClassVar[str] = ""
    """What pip installs them by, where they are no part of every installation."""

    tried_first: ClassVar[bool] = True
    """Whether one batch is tried before an audit: libraries have conditions of their own."""

    @classmethod
    @abstractmethod
    def start(cls, task: Task) -> Optimizer:
        """Starts all searches of a task."""

    @classmethod
    def variants(cls) -> Sequence[str]:
        """What can stand in place of NAME."""
        return ()

    @classmethod
    def stand_in(cls, dimension: int, evaluations: int, apart: bool) -> str:
        """The optimizer that finds more in so few evaluations; empty where none does.

        Args:
            dimension: of a search for all images of a release at once.
            evaluations: of each search.
            apart: whether the one that stands in can search each of several images by itself.
        """
        return ""

    @classmethod
    def evaluation_cost(cls) -> int:
        """What each candidate costs, in candidates of which only the loss is told."""
        return EVALUATION_COST[cls.learns_from]

    @property
    def wants(self) -> Wants:
        """What it has to be told of the next candidates."""
        return self.learns_from
