from __future__ import annotations

import pytest

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import (
    Guarantee,
    Rate,
    ReconstructionRate,
    measure_rate,
    paired_p_value,
)
from ggl_audit.evidence.findings import find
from ggl_audit.evidence.grade import decide, doubts_about_ceiling

CHANCE = 1 / 32
CONTRADICTION = Check("sign()", "contradicts", "magnitudes from 0 to 1")


def rate(successes: int, trials: int, null: int = 0) -> ReconstructionRate:
    """A rate, and as a floor one whose null control identified ``null`` other canaries."""
    p_value = paired_p_value(successes, null)
    measured = dict(measure_rate(successes, trials, CHANCE))
    return ReconstructionRate(**measured, psnr_db=20, null_p_value=p_value)


@pytest.mark.parametrize(
    ("floor", "ceiling", "grade", "code"),
    [
        (rate(0, 20), rate(6, 200), "A", 0),
        (rate(0, 20), rate(12, 200), "B", 0),
        (rate(0, 20), rate(150, 200), "C", 1),
        (rate(9, 20), rate(190, 200), "D", 1),
        (rate(20, 20), rate(200, 200), "F", 1),
        (rate(20, 20), None, "F", 1),
        (rate(0, 20), None, "inconclusive", 3),
        (rate(0, 20), rate(0, 5), "inconclusive", 3),
        (None, rate(6, 200), "A", 0),
        (None, rate(200, 200), "inconclusive", 3),
        (None, None, "inconclusive", 3),
        (rate(9, 20), rate(6, 200), "D", 1),
        (rate(9, 20, null=8), rate(190, 200), "C", 1),
        (rate(5, 20), rate(6, 200), "A", 0),
    ],
)
def test_the_grades_are_those_of_the_table(
    floor: ReconstructionRate | None, ceiling: Rate | None, grade: str, code: int
) -> None:
    verdict = decide(floor, ceiling, [], [], None, "C")
    assert (verdict.grade, verdict.exit_code) == (grade, code)
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(("fail_on", "code"), [("A", 1), ("B", 1), ("C", 0), ("D", 0)])
def test_the_gate_fails_at_its_grade_or_a_worse_one(fail_on: str, code: int) -> None:
    assert decide(rate(0, 20), rate(12, 200), [], [], None, fail_on).exit_code == code


def test_a_contradiction_or_an_interrupt_is_never_safe() -> None:
    contradicted = decide(rate(0, 20), rate(6, 200), [CONTRADICTION], [], None, "C")
    assert (contradicted.grade, contradicted.exit_code) == ("inconclusive", 3)
    assert "sign()" in contradicted.reason
    cut = decide(rate(0, 20), rate(6, 200), [], [], "the undefended control", "C")
    assert (cut.grade, cut.exit_code) == ("inconclusive", 3)
    assert "cut short" in cut.reason


HIDDEN = Check("sparsify(fraction=0.9)", "hidden", "noise after it hides its trace")


def test_no_low_ceiling_passes_while_it_is_in_doubt() -> None:
    assert doubts_about_ceiling(rate(50, 50), [], noise_is_last=True) == []
    for doubts in (
        doubts_about_ceiling(rate(3, 50), [], noise_is_last=True),
        doubts_about_ceiling(rate(50, 50), [HIDDEN], noise_is_last=True),
        doubts_about_ceiling(rate(50, 50), [], noise_is_last=False),
    ):
        assert len(doubts) == 1
        for ceiling in (rate(6, 200), rate(12, 200)):
            verdict = decide(rate(0, 20), ceiling, [], doubts, None, "C")
            assert (verdict.grade, verdict.exit_code) == ("inconclusive", 3)
            assert doubts[0] in verdict.reason
        assert decide(rate(0, 20), rate(150, 200), [], doubts, None, "C").grade == "C"
        assert decide(rate(20, 20), rate(200, 200), [], doubts, None, "C").grade == "F"


def ids(**given: object) -> list[str]:
    nothing = {
        "floor": None,
        "ceiling": None,
        "label": None,
        "undefended": None,
        "checks": [],
        "guarantee": None,
    }
    return [finding.id for finding in find(**{**nothing, **given})]


def test_every_finding_is_found_when_it_is_there_and_only_then() -> None:
    assert ids() == []
    assert ids(floor=rate(20, 20)) == ["GGL001"]
    assert ids(floor=rate(0, 20)) == []
    assert ids(ceiling=rate(150, 200)) == ["GGL002"]
    assert ids(ceiling=rate(6, 200)) == []
    assert ids(label=measure_rate(200, 200, 0.1)) == ["GGL003"]
    assert ids(label=measure_rate(20, 200, 0.1)) == []
    assert ids(checks=[CONTRADICTION]) == ["GGL005"]
    promise = Guarantee(epsilon=1, delta=1e-5, mu=0.5, reconstruction_bound=0.1)
    assert ids(ceiling=rate(150, 200), guarantee=promise) == ["GGL006", "GGL002"]
    kept = Guarantee(epsilon=1, delta=1e-5, mu=9, reconstruction_bound=1)
    assert "GGL006" not in ids(ceiling=rate(150, 200), guarantee=kept)
    assert ids(undefended=rate(0, 10)) == ["GGL007"]
    assert ids(undefended=rate(10, 10)) == []
    assert ids(ceiling=rate(1, 60)) == ["GGL008"]


def test_more_trials_are_only_asked_for_where_they_can_help() -> None:
    few = find(None, rate(0, 5), None, None, [], None)[0]
    assert "evidence.matching_trials=" in few.remedy
    assert ids(ceiling=rate(14, 200)) == []
