from __future__ import annotations

import numpy as np
import torch

from ggl_audit.optimizers import Evaluation
from ggl_audit.optimizers.gauss_newton import EXPLORED, GaussNewton

CPU = torch.device("cpu")


def started(dimension: int, seeds: list[int], evaluations: int) -> GaussNewton:
    return GaussNewton(dimension, 6, 0.3, seeds, evaluations, CPU)


def told(residuals: torch.Tensor) -> Evaluation:
    """From residuals (s, P, m), each computed by itself."""
    moved = torch.cat([residuals[:, :1], residuals[:, 1:] - residuals[:, :1]], dim=1)
    return Evaluation(residuals.square().sum(2), products=moved @ moved.transpose(1, 2))


class Linear:
    """Residuals A z - b of several searches, which least squares solve in one step."""

    def __init__(self, searches: int, dimension: int, values: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.slopes = torch.randn(searches, values, dimension, generator=random)
        self.wanted = torch.randn(searches, values, generator=random)

    def __call__(self, candidates: torch.Tensor) -> torch.Tensor:
        given = torch.einsum("smd,spd->spm", self.slopes, candidates)
        return given - self.wanted[:, None]

    @property
    def solution(self) -> torch.Tensor:
        return torch.linalg.lstsq(self.slopes, self.wanted[:, :, None]).solution[:, :, 0]


def run(optimizer: GaussNewton, residuals: object, turns: int) -> list[torch.Tensor]:
    asked = []
    for _ in range(turns):
        candidates = optimizer.ask()
        asked.append(candidates)
        optimizer.tell(told(residuals(candidates)))  # type: ignore[operator]
    return asked


def test_linear_least_squares_are_solved_at_once() -> None:
    problem = Linear(3, 5, 40)
    optimizer = started(5, [1, 2, 3], 0)  # nothing is explored
    run(optimizer, problem, 2 + 4)
    torch.testing.assert_close(optimizer.recommend(), problem.solution, rtol=2e-3, atol=2e-3)


def test_more_coordinates_than_values_are_no_matter() -> None:
    problem = Linear(2, 8, 3)
    optimizer = started(8, [1, 2], 0)
    run(optimizer, problem, 8)
    assert float(problem(optimizer.recommend()[:, None]).square().sum(2).max()) < 1e-5


def test_a_valley_is_followed_in_far_fewer_candidates_than_by_losses_alone() -> None:
    def rosenbrock(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([10 * (z[..., 1:] - z[..., :-1] ** 2), 1 - z[..., :-1]], dim=-1)

    optimizer = started(6, [0], 0)
    asked = run(optimizer, rosenbrock, 60)
    spent = sum(candidates.shape[1] for candidates in asked)
    best = float(rosenbrock(optimizer.recommend()).square().sum())
    assert best < 1e-4
    assert spent < 500


def test_it_explores_first_and_starts_where_that_has_led() -> None:
    problem = Linear(1, 4, 20)
    optimizer = started(4, [5], 400)
    wanted = []
    while optimizer.wants == "losses":
        candidates = optimizer.ask()
        wanted.append(candidates.shape[1])
        optimizer.tell(Evaluation(problem(candidates).square().sum(2)))
    assert EXPLORED * 400 - 6 < sum(wanted) <= EXPLORED * 400
    explored = optimizer.recommend()
    first = optimizer.ask()[:, 0]
    torch.testing.assert_close(first, explored)
    assert float(first.abs().sum()) > 0


def test_a_search_that_gains_nothing_more_starts_anew_and_keeps_its_best() -> None:
    problem = Linear(1, 4, 20)
    optimizer = started(4, [5], 0)
    asked = run(optimizer, problem, 40)
    far = [float((c - problem.solution[:, None]).norm(dim=2).min()) for c in asked[::2]]
    assert max(far[5:]) > 0.5
    torch.testing.assert_close(optimizer.recommend(), problem.solution, rtol=2e-3, atol=2e-3)


def test_a_residual_that_is_not_finite_never_wins() -> None:
    problem = Linear(1, 3, 10)

    def broken(candidates: torch.Tensor) -> torch.Tensor:
        residuals = problem(candidates)
        residuals[:, -1] = torch.nan
        return residuals

    optimizer = started(3, [2], 0)
    run(optimizer, broken, 12)
    assert bool(optimizer.recommend().isfinite().all())
    assert float(problem(optimizer.recommend()[:, None]).square().sum()) < float(
        problem(torch.zeros(1, 1, 3)).square().sum()
    )


def test_others_beside_it_change_nothing() -> None:
    problem = Linear(2, 4, 20)
    beside = run(started(4, [7, 9], 0), problem, 30)

    def alone(candidates: torch.Tensor) -> torch.Tensor:
        return problem(candidates.expand(2, -1, -1))[1:]

    for one, two in zip(run(started(4, [9], 0), alone, 30), beside, strict=True):
        np.testing.assert_allclose(one[0], two[1], rtol=1e-3, atol=1e-3)
