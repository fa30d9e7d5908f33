from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggl_audit.optimizers import Evaluation, start_optimizer
from ggl_audit.optimizers.bayesian import MOST_POINTS, Bayesian
from ggl_audit.optimizers.side_by_side import SideBySide
from ggl_audit.optimizers.subspace import make_subspace
from ggl_audit.spec import AttackSpec, SubspaceSpec

CPU = torch.device("cpu")
needs_botorch = pytest.mark.skipif(find_spec("botorch") is None, reason="BoTorch is not installed")
both = pytest.mark.parametrize("name", ["bayesian", pytest.param("turbo", marks=needs_botorch)])


def candidates_of(name: str, d: int, principal: Any = None, **subspace: Any) -> torch.Tensor:
    """Some batches of a search from before and after there is a process, (n, d)."""
    attack = AttackSpec(
        optimizer=name, evaluations=60, population=6, subspace=subspace if subspace else None
    )
    optimizer = start_optimizer(attack, d, principal)([1], 60, CPU)
    asked = []
    for _ in range(5):
        asked.append(optimizer.ask()[0])
        optimizer.tell(Evaluation((asked[-1] - 0.5).square().sum(1)[None]))
    return torch.cat(asked)


@given(k=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_random_directions_are_orthonormal_and_span_a_box(k: int, d: int, seed: int) -> None:
    subspace = make_subspace(SubspaceSpec(dimension=k), d, seed, None)
    assert subspace.dimension == min(k, d)
    np.testing.assert_allclose(
        subspace.directions @ subspace.directions.T, np.eye(min(k, d)), atol=1e-12
    )
    places = np.random.default_rng(seed).random((5, min(k, d)))
    coordinates = subspace.latents(places) @ subspace.directions.T
    np.testing.assert_allclose(coordinates, 4 * places - 2, atol=1e-12)


def test_random_directions_prefer_none() -> None:
    projectors = []
    for seed in range(3000):
        directions = make_subspace(SubspaceSpec(dimension=2), 5, seed, None).directions
        projectors.append(directions.T @ directions)
    np.testing.assert_allclose(np.mean(projectors, axis=0), np.eye(5) * 2 / 5, atol=0.03)


@both
def test_candidates_are_in_the_declared_subspace_and_box(name: str) -> None:
    asked_for = []

    def principal(count: int) -> torch.Tensor:
        asked_for.append(count)
        return torch.eye(7)[2 : 2 + count]

    candidates = candidates_of(name, 7, principal, directions="principal", dimension=3)
    assert asked_for == [3]
    assert not candidates[0].any()
    assert candidates[:, 2:5].std(0).min() > 0.1
    assert not candidates[:, [0, 1, 5, 6]].any()
    assert candidates.abs().max() <= 2

    singular = torch.linalg.svdvals(candidates_of(name, 7, dimension=2))
    assert singular[1] > 1
    assert singular[2] < 1e-5


def test_bayesian_takes_twelve_directions_unless_told() -> None:
    assert torch.linalg.matrix_rank(candidates_of("bayesian", 20)) == 12


@needs_botorch
def test_turbo_takes_all_directions_unless_told() -> None:
    assert torch.linalg.matrix_rank(candidates_of("turbo", 20)) == 20


def test_a_process_learns_from_the_best_and_the_latest_points_alone() -> None:
    search = Bayesian(make_subspace(None, 3, 0, None), 60, 0)
    losses = np.random.default_rng(0).random((2, 60))
    places = []
    for told in losses:
        search.ask()
        places.append(search._asked)
        search.tell(told)
    latest = losses[1, -MOST_POINTS // 2 :]
    earlier = np.concatenate([losses[0], losses[1, : -MOST_POINTS // 2]])
    best = np.sort(earlier)[: MOST_POINTS // 2]
    np.testing.assert_array_equal(np.sort(search._losses), np.sort([*latest, *best]))
    told_at = dict(zip(losses.flat, np.concatenate(places), strict=True))
    for place, loss in zip(search._places, search._losses.tolist(), strict=True):
        np.testing.assert_array_equal(place, told_at[loss])


def test_a_process_that_takes_every_loss_for_noise_is_left() -> None:
    """Where all lengths are the shortest, the likelihood is flat: a fit from there ends there."""
    subspace = make_subspace(None, 4, 0, None)
    search = Bayesian(subspace, 6, 0)
    random = torch.Generator().manual_seed(0)
    search._places = torch.rand(48, 4, generator=random, dtype=torch.float64).numpy()
    search._losses = np.square(subspace.latents(search._places) - 0.5).sum(1)
    search._parameters, search._batch = np.log([1.0, *[0.01] * 4]), 8
    asked = SideBySide(lambda _: search, [0], CPU).ask()[0].numpy()
    assert np.square(asked - 0.5).sum(1).min() < search._losses.min() / 5
    assert np.exp(search._parameters[1:]).min() > 0.1


@needs_botorch
def test_the_trust_region_shrinks_where_nothing_is_better_and_starts_anew() -> None:
    from ggl_audit.optimizers.turbo import LEAST_LENGTH, SUCCESSES, Turbo

    def lengths(losses: list[float]) -> list[float]:
        """After each batch, the first of which is before there is a process."""
        subspace = make_subspace(None, 2, 0, None)
        search = Turbo(subspace, 4, 100, 0)
        optimizer = SideBySide(lambda _: search, [0], CPU)
        found = []
        for loss in losses:
            optimizer.tell(Evaluation(loss + optimizer.ask().square().sum(2)))
            found.append(search._length)
        return found

    worse = lengths([100.0 * batch for batch in range(9)])
    np.testing.assert_allclose(worse[:7], 0.8 * 0.5 ** np.arange(7))
    assert worse[6] / 2 < LEAST_LENGTH
    assert worse[7:] == [0.8, 0.8]
    better = lengths([-100.0 * batch for batch in range(1, SUCCESSES + 2)])
    assert better == [0.8] * SUCCESSES + [1.6]
