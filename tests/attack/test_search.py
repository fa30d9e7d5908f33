from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from ggl_audit.attack.search import search
from ggl_audit.optimizers import Array


@dataclass
class Quadratic:
    """Distance to a target for each of t rows; counts what it is asked, and can interrupt."""

    targets: torch.Tensor
    interrupt_after: int = 10**9
    asked: int = 0
    smallest: list[torch.Tensor] = field(default_factory=list)

    @property
    def labels(self) -> torch.Tensor:
        return torch.zeros(len(self.targets), dtype=torch.long)

    def losses(self, latents: torch.Tensor) -> torch.Tensor:
        self.asked += latents.shape[1]
        if self.asked > self.interrupt_after:
            raise KeyboardInterrupt
        losses = (latents - self.targets[:, None]).square().sum(-1)
        self.smallest.append(losses.min(dim=1).values)
        return losses


class Forgetful:
    """Draws at random and recommends the worst it can think of."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.told: list[Array] = []

    def ask(self) -> Array:
        return self.random.standard_normal((5, 3))

    def tell(self, losses: Array) -> None:
        self.told.append(losses)

    def recommend(self) -> Array:
        return np.full(3, 100.0)


TARGETS = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, -1.0]])
SEEDS = np.array([[[1], [2]], [[3], [4]]])


def test_the_best_point_is_kept_whatever_the_optimizer_does() -> None:
    objective = Quadratic(TARGETS)
    result = search(objective, Forgetful, SEEDS, 100, lambda _: None)
    best = torch.stack(objective.smallest).min(dim=0).values
    torch.testing.assert_close(result.losses, best)
    torch.testing.assert_close(
        (result.latents - TARGETS).square().sum(-1), best, rtol=1e-4, atol=1e-6
    )
    assert np.all(np.diff(result.curves, axis=1) <= 0)


@pytest.mark.parametrize("evaluations", [12, 13, 50, 100, 101])
def test_the_budget_is_kept_and_counted(evaluations: int) -> None:
    objective = Quadratic(TARGETS)
    counted = 0

    def advance(count: int) -> None:
        nonlocal counted
        counted += count

    result = search(objective, Forgetful, SEEDS, evaluations, advance)
    assert objective.asked <= evaluations
    assert objective.asked > evaluations - 12
    assert result.evaluations == counted == 2 * objective.asked


@dataclass
class Apart:
    """Two parts of three coordinates for each of t rows, whose product of distances counts."""

    targets: torch.Tensor
    asked: int = 0
    best: list[torch.Tensor] = field(default_factory=list)

    @property
    def labels(self) -> torch.Tensor:
        return torch.zeros(len(self.targets), 2, dtype=torch.long)

    def losses_in_turn(self, candidates: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        self.asked += candidates.shape[3]
        targets = self.targets[:, None]
        own = 1 + (candidates - targets[:, :, :, None]).square().sum(-1)
        fixed = 1 + (others - targets).square().sum(-1)
        losses = own * fixed.flip(2)[..., None]
        self.best.append(losses.flatten(1).min(1).values)
        return losses


class Still(Forgetful):
    """Recommends the same place all the time."""

    def recommend(self) -> Array:
        return np.full(3, 0.5)


def test_parts_are_searched_for_with_the_others_where_they_are_believed() -> None:
    targets = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    objective = Apart(targets)
    counted: list[int] = []
    seeds = np.arange(8).reshape(2, 2, 2)
    result = search(objective, Still, seeds, 60, counted.append)
    assert result.latents.shape == (2, 6)
    assert objective.asked <= 60 / 2
    assert result.evaluations == sum(counted) == 2 * 2 * objective.asked
    torch.testing.assert_close(result.losses, torch.stack(objective.best).min(0).values)
    parts = result.latents.unflatten(1, (2, 3))
    apart = 1 + (parts - targets).square().sum(-1)
    torch.testing.assert_close(apart.prod(1), result.losses, rtol=1e-4, atol=1e-6)
    believed = (parts == 0.5).all(-1)
    assert bool((believed.sum(1) >= 1).all())


def test_an_interrupt_gives_what_was_found() -> None:
    result = search(Quadratic(TARGETS, 35), Forgetful, SEEDS, 100, lambda _: None)
    assert not result.complete
    assert torch.isfinite(result.losses).all()
    with pytest.raises(KeyboardInterrupt):
        search(Quadratic(TARGETS, 5), Forgetful, SEEDS, 100, lambda _: None)


def test_a_loss_that_is_not_finite_never_wins() -> None:
    class Broken(Quadratic):
        def losses(self, latents: torch.Tensor) -> torch.Tensor:
            losses = super().losses(latents)
            losses[:, 0] = torch.nan
            return losses

    result = search(Broken(TARGETS), Forgetful, SEEDS[:, :1], 60, lambda _: None)
    assert torch.isfinite(result.losses).all()
