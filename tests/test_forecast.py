"""The forecast: from few candidates where a model is slow, and then it ends in time too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from ggl_audit.attacks.suite import Suite
from ggl_audit.audit import plan_experiments
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.experiments import forecast as module
from ggl_audit.experiments.experiment import NotMeasured, Plan
from ggl_audit.experiments.forecast import (
    SECONDS_TO_PREDICT,
    forecast,
    predict_seconds,
    seconds_each,
)
from ggl_audit.optimizers import DERIVATIVE_COST
from ggl_audit.spec import Spec


class FakeTime:
    """A clock on which each candidate takes so many seconds, and each call some more."""

    def __init__(self, each: float, call: float = 0.0) -> None:
        self.each, self.call = each, call
        self.now = 0.0
        self.sizes: list[tuple[int, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def experiment(self, first: int, second: int) -> int:
        self.sizes.append((first, second))
        self.now += self.call + self.each * first * second
        return first * second


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTime]:
    def make(*arguments: float) -> FakeTime:
        fake = FakeTime(*arguments)
        monkeypatch.setattr(module, "time", fake)
        return fake

    return make


SIZES = [(1, 3), (1, 33), (8, 33)]


@pytest.mark.parametrize(("each", "tried"), [(0.001, 3), (0.02, 3), (0.1, 2), (1.0, 1), (100.0, 1)])
def test_as_many_are_tried_as_fit(clock: Callable[..., FakeTime], each: float, tried: int) -> None:
    fake = clock(each)
    assert seconds_each(fake.experiment, SIZES, most=10.0) == pytest.approx(each)
    assert fake.sizes == SIZES[:tried]
    assert fake.now <= max(10.0, 3 * each)


def test_what_a_call_costs_once_is_not_what_a_candidate_costs(
    clock: Callable[..., FakeTime],
) -> None:
    fake = clock(0.01, 2.0)
    assert seconds_each(fake.experiment, SIZES, most=60.0) == pytest.approx(0.01)


def test_what_is_known_to_be_too_slow_is_not_tried(clock: Callable[..., FakeTime]) -> None:
    fake = clock(5.0)
    assert seconds_each(fake.experiment, SIZES, guess=5.0, most=10.0) == 5.0
    assert fake.sizes == []


def plans(case: Case) -> tuple[Case, Suite, dict[str, Plan | NotMeasured]]:
    """What a forecast is made of."""
    experiments = plan_experiments(case)
    return case, experiments[0].suite, {one.name: one.plan() for one in experiments}


def slowed(monkeypatch: pytest.MonkeyPatch, fake: FakeTime) -> None:
    """Each experiment takes time for each of its candidates, and computes nothing."""

    def matched(*arguments: Any) -> list[None]:
        fake.experiment(len(arguments[4]), arguments[6] + 1)
        return [None] * len(arguments[4])

    def searched(_s: Any, _d: Any, observed: Any, *rest: Any) -> Any:
        fake.experiment(len(next(iter(observed.values()))), rest[-1])
        return type("Found", (), {"curves": [[(rest[-1], 0.0)]]})

    def descended(*arguments: Any) -> None:
        fake.experiment(len(arguments[2]), DERIVATIVE_COST * arguments[4])

    monkeypatch.setattr(module, "match_canaries", matched)
    monkeypatch.setattr(module, "search_latents", searched)
    monkeypatch.setattr(module, "attack_pixels", descended)


@pytest.mark.parametrize("each", [1e-4, 0.05, 0.7, 20.0])
def test_a_slow_model_is_forecast_in_bounded_time(
    sample: Callable[..., Spec],
    clock: Callable[..., FakeTime],
    monkeypatch: pytest.MonkeyPatch,
    each: float,
) -> None:
    planned = plans(prepare(sample("undefended")))
    fake = clock(each)
    slowed(monkeypatch, fake)
    found = predict_seconds(*planned)
    assert found == pytest.approx((each, each, each))
    assert fake.now <= 3 * SECONDS_TO_PREDICT + 3 * each
    assert math.isfinite(forecast(*planned).seconds)


def test_a_forecast_of_a_real_audit_is_of_its_size(sample: Callable[..., Spec]) -> None:
    case = prepare(sample("undefended"))
    began = time.perf_counter()
    found = predict_seconds(*plans(case))
    assert all(0 < seconds < 1 for seconds in found)
    assert time.perf_counter() - began < 6 * SECONDS_TO_PREDICT
