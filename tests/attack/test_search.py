from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from ggl_audit.attack.search import search
from ggl_audit.attacks.ggl import searched_by
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.optimizers import DERIVATIVE_COST, Evaluation, Wants, start_optimizer
from ggl_audit.spec import AttackSpec, Spec


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

    def evaluate(self, latents: torch.Tensor, wants: Wants) -> Evaluation:
        self.asked += latents.shape[1]
        if self.asked > self.interrupt_after:
            raise KeyboardInterrupt
        away = latents - self.targets[:, None]
        losses = away.square().sum(-1)
        self.smallest.append(losses.min(dim=1).values)
        if wants == "products":
            added = torch.cat([away[:, :1], away[:, 1:] - away[:, :1]], dim=1)
            return Evaluation(losses, products=added @ added.transpose(1, 2))
        return Evaluation(losses, derivatives=2 * away if wants == "derivatives" else None)


class Forgetful:
    """Draws at random and recommends the worst it can think of."""

    wants: Wants = "losses"

    def __init__(self, seeds: Sequence[int], evaluations: int, device: torch.device) -> None:
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.told: list[Evaluation] = []
        self.evaluations = evaluations

    def ask(self) -> torch.Tensor:
        return torch.stack([torch.randn(5, 3, generator=each) for each in self.random])

    def tell(self, evaluation: Evaluation) -> None:
        assert evaluation.losses.shape == (len(self.random), 5)
        self.told.append(evaluation)

    def recommend(self) -> torch.Tensor:
        return torch.full((len(self.random), 3), 100.0)


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
    assert objective.asked > evaluations - 2  # two restarts
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

    def recommend(self) -> torch.Tensor:
        return torch.full((len(self.random), 3), 0.5)


class Sloped(Forgetful):
    """Wants derivatives, each of which costs as much as four candidates."""

    wants: Wants = "derivatives"

    def tell(self, evaluation: Evaluation) -> None:
        assert evaluation.derivatives is not None
        assert evaluation.derivatives.shape == (len(self.random), 5, 3)
        super().tell(evaluation)


@pytest.mark.parametrize("evaluations", [100, 101, 117])
def test_a_derivative_costs_what_it_costs(evaluations: int) -> None:
    objective = Quadratic(TARGETS)
    counted: list[int] = []
    result = search(objective, Sloped, SEEDS, evaluations, counted.append)
    assert DERIVATIVE_COST * objective.asked <= evaluations
    assert DERIVATIVE_COST * objective.asked > evaluations - 2 * DERIVATIVE_COST
    assert result.evaluations == sum(counted) == 2 * DERIVATIVE_COST * objective.asked
    assert result.spent.tolist() == sorted(result.spent.tolist())
    assert result.spent[-1] == DERIVATIVE_COST * objective.asked


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


def test_an_interrupt_is_no_result() -> None:
    with pytest.raises(KeyboardInterrupt):
        search(Quadratic(TARGETS, 35), Forgetful, SEEDS, 100, lambda _: None)


def test_a_loss_that_is_not_finite_never_wins() -> None:
    class Broken(Quadratic):
        def evaluate(self, latents: torch.Tensor, wants: Wants) -> Evaluation:
            losses = super().evaluate(latents, wants).losses
            losses[:, 0] = torch.nan
            return Evaluation(losses)

    result = search(Broken(TARGETS), Forgetful, SEEDS[:, :1], 60, lambda _: None)
    assert torch.isfinite(result.losses).all()


@pytest.mark.parametrize(
    ("members", "evaluations", "optimizer"),
    [
        (1, 3000, "gauss_newton"),
        (1, 100, "cma"),  # of which 70 are for steps of 38
        (2, 3000, "gauss_newton"),
        (4, 3000, "cma"),
    ],
)
def test_gauss_newton_is_left_out_where_its_steps_do_not_fit(
    sample: Callable[..., Spec],
    monkeypatch: pytest.MonkeyPatch,
    members: int,
    evaluations: int,
    optimizer: str,
) -> None:
    case = prepare(sample("undefended", attack__evaluations=evaluations))
    declared = prepare(sample("undefended", attack__evaluations=100, attack__optimizer="random"))
    monkeypatch.setattr(Case, "members", members)
    assert searched_by(case).optimizer == optimizer
    assert searched_by(declared).optimizer == "random"


def test_restarts_that_want_products_are_as_searches_of_their_own() -> None:
    targets = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    start = start_optimizer(AttackSpec(optimizer="gauss_newton"), 3)
    seeds = np.arange(6).reshape(2, 3, 1)
    together = search(Quadratic(targets), start, seeds, 3 * 60, lambda _: None)
    apart = [
        search(Quadratic(targets), start, seeds[:, [restart]], 60, lambda _: None)
        for restart in range(3)
    ]
    best = torch.stack([one.losses for one in apart]).amin(0)
    torch.testing.assert_close(together.losses, best)
    assert bool((together.losses < 1e-3).all())
