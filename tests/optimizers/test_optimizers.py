from __future__ import annotations

import numpy as np
import pytest

from ggl_audit.errors import SpecError
from ggl_audit.optimizers import optimizer_factory
from ggl_audit.spec import AttackSpec

NAMES = ["cma", "nevergrad:OldCMA", "nevergrad:DE", "nevergrad:PSO", "nevergrad:NGOpt"]


def minimized(name: str, seed: int, evaluations: int = 2000) -> tuple[float, list[float]]:
    make = optimizer_factory(AttackSpec(optimizer=name, evaluations=evaluations), 8)
    optimizer = make(seed)
    target = np.linspace(-1, 1, 8)
    best, trace = np.inf, []
    for _ in range(evaluations // 12):
        candidates = optimizer.ask()
        assert candidates.shape == (12, 8)
        losses = ((candidates - target) ** 2).sum(axis=1)
        trace.append(float(candidates.sum()))
        best = min(best, float(losses.min()))
        optimizer.tell(losses)
    assert optimizer.recommend().shape == (8,)
    return best, trace


@pytest.mark.parametrize("name", NAMES)
def test_every_family_beats_random_search(name: str) -> None:
    random = np.random.default_rng(0).standard_normal((2000, 8))
    by_chance = float(((random - np.linspace(-1, 1, 8)) ** 2).sum(axis=1).min())
    assert minimized(name, 0)[0] < by_chance / 5


@pytest.mark.parametrize("name", ["cma", "nevergrad:OldCMA", "nevergrad:DE"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(name: str) -> None:
    np.random.seed(3)  # noqa: NPY002
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    one, same, other = (minimized(name, seed, 200)[1] for seed in (5, 5, 6))
    assert one == same
    assert one != other
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_independent_searches_do_not_disturb_each_other() -> None:
    make = optimizer_factory(AttackSpec(), 4)
    alone, first, second = make(1), make(1), make(2)
    for _ in range(5):
        expected, got = alone.ask(), first.ask()
        second.tell((second.ask() ** 2).sum(axis=1))
        np.testing.assert_array_equal(expected, got)
        for optimizer in (alone, first):
            optimizer.tell((expected**2).sum(axis=1))


def test_a_converged_search_starts_anew_somewhere_else() -> None:
    optimizer = optimizer_factory(AttackSpec(population=6), 2)(0)
    means = []
    for _ in range(400):
        candidates = optimizer.ask()
        means.append(candidates.mean(axis=0))
        optimizer.tell((candidates**2).sum(axis=1))
    assert max(float(np.abs(mean).max()) for mean in means[60:]) > 0.2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cmaes", "Did you mean 'cma'"),
        ("nevergrad:OldCAM", "Did you mean 'OldCMA'"),
        ("nevergrad", "Did you mean"),
        ("turbo", "list optimizers"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as error:
        optimizer_factory(AttackSpec(optimizer=name), 4)
    assert error.value.key == ("attack", "optimizer")
