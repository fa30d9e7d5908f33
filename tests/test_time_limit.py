"""The time limit, by a clock that goes with the candidates and not with the machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ggl_audit.audit import run_audit
from ggl_audit.basics.clock import WRITING, Clock, OutOfTimeError
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

PLENTY = {"evidence__matching_trials": 60, "evidence__reconstruction_trials": 15}


class CandidateClock(Clock):
    """A second for each thousand candidates."""

    def __init__(self, limit: float, counter: Counter) -> None:
        super().__init__(limit + WRITING)
        self.counter = counter

    @property
    def seconds(self) -> float:
        return self.counter.done / 1000


def audit(spec: Spec, limit: float) -> tuple[Report, float]:
    counter, limited = Counter(), spec.model_copy(update={"time_limit": limit})
    report = run_audit(limited, counter, CandidateClock(limit, counter))
    return report, counter.done / 1000


def test_an_audit_with_time_enough_is_as_one_without_a_limit(sample: Callable[..., Spec]) -> None:
    spec = sample("undefended")
    limited, _ = audit(spec, 1e6)
    free = run_audit(spec, Counter())
    assert limited.verdict == free.verdict
    assert limited.evidence.ceiling == free.evidence.ceiling


@pytest.mark.parametrize("name", ["undefended", "sparsified"])
def test_what_fits_is_measured_and_graded(sample: Callable[..., Spec], name: str) -> None:
    spec = sample(name, attack__method="ggl", **PLENTY)
    report, seconds = audit(spec, 8.0)
    assert seconds <= 8.1  # the next step of a search is where it can end
    floor, ceiling = report.evidence.floor, report.evidence.ceiling
    assert floor is not None
    assert ceiling is not None
    assert 5 <= floor.trials < 15
    assert floor.planned == floor.trials  # the interval is that of the trials that were made
    assert report.verdict.grade in ("C", "D", "F")
    assert report.verdict.exit_code == 1


def test_matching_leaves_time_for_the_rest(sample: Callable[..., Spec]) -> None:
    spec = sample("undefended", evidence__matching_trials=200)
    report, _ = audit(spec, 8.0)
    assert report.evidence.ceiling is not None
    assert 0 < report.evidence.ceiling.trials < 200
    assert report.evidence.floor is not None


def test_too_little_time_is_inconclusive_and_says_so(sample: Callable[..., Spec]) -> None:
    report, seconds = audit(sample("sparsified", **PLENTY), 2.0)
    assert report.verdict.of("image").grade == "inconclusive"
    assert report.verdict.exit_code == 3
    assert "cut short" in report.verdict.reason
    assert seconds < 4.0


def test_a_control_that_does_not_fit_is_not_measured(sample: Callable[..., Spec]) -> None:
    spec = sample("sparsified", attack__method="ggl", evidence__control_trials=15, **PLENTY)
    report, _ = audit(spec, 8.0)
    assert report.evidence.controls.undefended is None
    assert "time limit" in report.evidence.not_measured["controls.undefended"]


def test_the_clock() -> None:
    free = Clock(None)
    assert not free.is_limited
    assert not free.used(0.4)
    assert free.reaches(1e9)
    free.check()
    late = Clock(10.0, started=-1e9)
    assert late.used(1.0)
    assert not late.reaches(0.0)
    with pytest.raises(OutOfTimeError):
        late.check()
