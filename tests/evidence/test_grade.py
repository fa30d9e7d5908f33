from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ggl_audit.defenses import Check
from ggl_audit.defenses.checks import HIDDEN_BY_STEP
from ggl_audit.evidence.bounds import (
    Rate,
    ReconstructionRate,
    measure_rate,
    paired_p_value,
)
from ggl_audit.evidence.guarantee import Guarantee
from ggl_audit.evidence.likeness import ANOTHER, Likeness
from ggl_audit.evidence.standing import ceiling_is_settled, floor_is_settled
from ggl_audit.judgement.findings import find
from ggl_audit.judgement.grade import (
    IN_WORDS,
    LABEL_IN_WORDS,
    Answer,
    Grade,
    Verdict,
    answer_image,
    answer_label,
    doubts_about_ceiling,
    in_words,
)
from ggl_audit.judgement.grade import decide as decide_all
from ggl_audit.messages import Said

CHANCE = 1 / 32
CONTRADICTION = Check("sign()", "contradicts", Said("test/sign", "magnitudes from 0 to 1"))


def rate(successes: int, trials: int, null: int = 0) -> ReconstructionRate:
    """A rate, and as a floor one whose null control identified ``null`` other canaries."""
    p_value = paired_p_value(successes, null)
    measured = dict(measure_rate(successes, trials, CHANCE))
    return ReconstructionRate(**measured, psnr_db=20, null_p_value=p_value)


def decide(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    checks: list[Check],
    likeness: Likeness | None,
    doubts: list[Said],
    cut_short: str | None,
    fail_on: Grade,
    bound: float = 0.0,
) -> Verdict:
    """Of an audit that asks for the image alone."""
    image = answer_image(floor, ceiling, checks, likeness, doubts, bound)
    return decide_all([image], cut_short, fail_on)


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
    verdict = decide(floor, ceiling, [], None, [], None, "C")
    assert (verdict.grade, verdict.exit_code) == (grade, code)
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(("fail_on", "code"), [("A", 1), ("B", 1), ("C", 0), ("D", 0)])
def test_the_gate_fails_at_its_grade_or_a_worse_one(fail_on: str, code: int) -> None:
    assert decide(rate(0, 20), rate(12, 200), [], None, [], None, fail_on).exit_code == code


def test_a_contradiction_or_an_interrupt_is_never_safe() -> None:
    contradicted = decide(rate(0, 20), rate(6, 200), [CONTRADICTION], None, [], None, "C")
    assert (contradicted.grade, contradicted.exit_code) == ("inconclusive", 3)
    assert "sign()" in contradicted.reason
    cut = decide(rate(0, 20), rate(6, 200), [], None, [], "the undefended control", "C")
    assert (cut.grade, cut.exit_code) == ("inconclusive", 3)
    assert "cut short" in cut.reason


HIDDEN = Check("sparsify(fraction=0.9)", "hidden", HIDDEN_BY_STEP(step="noise"))
FIGURE = Said("test/figure", "0.5")
LIKE = Likeness(outcome="like", said=FIGURE, rules_out_larger=True)
UNLIKE = Likeness(outcome="unlike", said=FIGURE, cause=ANOTHER())
CANNOT_TELL = Likeness(outcome="hidden", said=FIGURE)


def doubts(**given: Any) -> list[Said]:
    """Of a ceiling beyond doubt, but for what is given."""
    fine: dict[str, Any] = {
        "matching_control": rate(50, 50),
        "checks": [],
        "likeness": LIKE,
        "has_likelihood": True,
        "bound_for_any_model": 1.0,
        "fit_is_proven": False,
        "real_images": True,
        "promise_is_broken": False,
    }
    return doubts_about_ceiling(**{**fine, **given})


@pytest.mark.parametrize(
    "given",
    [
        {"matching_control": rate(3, 50)},
        {"checks": [HIDDEN]},
        {"has_likelihood": False},
        {"likeness": CANNOT_TELL},
        {"likeness": None},
        {"real_images": False},
        {"promise_is_broken": True},
        {"likeness": LIKE.model_copy(update={"rules_out_larger": False})},
        {"likeness": CANNOT_TELL, "bound_for_any_model": 0.3},
        {"about_the_client": [Said("test/clip", "it contradicts the clip")]},
    ],
)
def test_no_low_ceiling_passes_while_it_is_in_doubt(given: dict[str, Any]) -> None:
    found = doubts(**given)
    assert len(found) == 1
    for ceiling in (rate(6, 200), rate(12, 200)):
        verdict = decide(rate(0, 20), ceiling, [], None, found, None, "C")
        assert (verdict.grade, verdict.exit_code) == ("inconclusive", 3)
        assert found[0].text in verdict.reason
    assert decide(rate(0, 20), rate(150, 200), [], None, found, None, "C").grade == "C"
    assert decide(rate(20, 20), rate(200, 200), [], None, found, None, "C").grade == "F"


def test_a_ceiling_beyond_doubt_passes() -> None:
    assert doubts() == []
    assert doubts(likeness=CANNOT_TELL, bound_for_any_model=0.2) == []
    for bound, grade in ((0.2, "B"), (0.04, "A")):
        verdict = decide(rate(0, 20), rate(6, 200), [], None, [], None, "C", bound)
        assert verdict.grade == grade
    assert doubts(likeness=CANNOT_TELL, fit_is_proven=True) == []


def test_a_capture_that_is_unlike_the_canaries_has_no_grade() -> None:
    for ceiling in (rate(6, 200), rate(200, 200)):
        verdict = decide(rate(20, 20), ceiling, [], UNLIKE, [], None, "C")
        assert (verdict.grade, verdict.exit_code) == ("inconclusive", 3)
        assert "another model" in verdict.reason


def full_grade(ceiling_hits: list[bool], floor_hits: list[bool], nulls: list[bool]) -> Grade:
    pairs = list(zip(floor_hits, nulls, strict=True))
    floor = rate(pairs.count((True, False)), len(floor_hits), null=pairs.count((False, True)))
    ceiling = rate(sum(ceiling_hits), len(ceiling_hits))
    return decide(floor, ceiling, [], None, [], None, "C").grade


def early_grade(
    ceiling_hits: list[bool], floor_hits: list[bool], nulls: list[bool]
) -> tuple[Grade, int]:
    """The grade when both experiments end as soon as they are settled, and the trials left out."""
    planned = len(ceiling_hits)
    done = next(
        n
        for n in range(1, planned + 1)
        if ceiling_is_settled(sum(ceiling_hits[:n]), n, planned, CHANCE)
    )
    ceiling = measure_rate(sum(ceiling_hits[:done]), done, CHANCE, planned)
    planned = len(floor_hits)
    for count in range(1, planned + 1):
        pairs = list(zip(floor_hits[:count], nulls[:count], strict=True))
        beyond, only_null = pairs.count((True, False)), pairs.count((False, True))
        if floor_is_settled(beyond, only_null, count, planned, CHANCE):
            break
    p_value = paired_p_value(beyond, only_null + planned - count)
    measured = dict(measure_rate(beyond, count, CHANCE, planned))
    floor = ReconstructionRate(**measured, psnr_db=20, null_p_value=p_value)
    left = len(ceiling_hits) - done + planned - count
    return decide(floor, ceiling, [], None, [], None, "C").grade, left


@pytest.mark.parametrize("rate_of_matching", [1 / 32, 0.06, 0.12, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("rate_of_pictures", [1 / 32, 0.3, 0.55, 0.95])
def test_ending_early_gives_the_grade_of_the_full_run(
    rate_of_matching: float, rate_of_pictures: float
) -> None:
    """In every simulated audit, so that what the error was, it stays."""
    random = np.random.default_rng(0)
    saved = 0
    for _ in range(40):
        ceiling = (random.random(200) < rate_of_matching).tolist()
        floor = (random.random(20) < rate_of_pictures).tolist()
        nulls = (random.random(20) < CHANCE).tolist()
        early, left = early_grade(ceiling, floor, nulls)
        assert early == full_grade(ceiling, floor, nulls)
        saved += left
    assert saved > 0


def test_a_wrong_grade_is_rarer_than_one_in_twenty_whether_ended_early_or_not() -> None:
    """At the true rates where an A, a B, a D or an F would be just wrong."""
    random = np.random.default_rng(1)
    runs = 400

    def share(wrong: set[Grade], matching: float, pictures: float) -> float:
        found = 0
        for _ in range(runs):
            ceiling = (random.random(200) < matching).tolist()
            floor = (random.random(20) < pictures).tolist()
            nulls = (random.random(20) < CHANCE).tolist()
            found += early_grade(ceiling, floor, nulls)[0] in wrong
        return found / runs

    def at(advantage: float) -> float:
        return CHANCE + advantage * (1 - CHANCE)

    slack = 1.65 * (0.05 * 0.95 / runs) ** 0.5
    assert share({"A"}, at(0.0501), CHANCE) <= 0.05 + slack
    assert share({"A", "B"}, at(0.2501), CHANCE) <= 0.05 + slack
    assert share({"D", "F"}, 1.0, at(0.05)) <= 0.05 + slack
    assert share({"F"}, 1.0, at(0.5)) <= 0.05 + slack


ODD = Said("test/odd", "it is odd")


def told(successes: int, trials: int = 400, chance: float = 0.5) -> Rate:
    return measure_rate(successes, trials, chance, attacks=2)


def label_answer(floor: Rate | None, ceiling: Rate | None, **given: Any) -> Answer:
    named: dict[str, Any] = {"classes": 2, "classifier": "likelihood", "not_measured": "no images"}
    answer = answer_label(floor, ceiling, [], None, given.pop("doubts", []), **{**named, **given})
    assert answer.reason.endswith(".")
    return answer


@pytest.mark.parametrize(
    ("floor", "ceiling", "bound", "grade"),
    [
        (told(400), told(400), 1.0, "F"),
        (told(300), told(400), 1.0, "D"),
        (told(207), told(333), 0.68, "C"),
        (None, told(333), 1.0, "C"),
        (told(207), told(210), 1.0, "B"),
        (told(20, 2000, 0.01), told(20, 2000, 0.01), 1.0, "A"),
        (told(207), told(210), 0.04, "A"),
        (None, None, 0.04, "A"),
        (None, None, 0.2, "B"),
        (None, None, 1.0, "inconclusive"),
        (told(5, 10), told(6, 10), 1.0, "inconclusive"),
        (told(5, 10), told(6, 10), 0.2, "B"),
        (told(400), told(400), 0.04, "F"),
    ],
)
def test_the_label_is_graded_by_the_same_table(
    floor: Rate | None, ceiling: Rate | None, bound: float, grade: Grade
) -> None:
    answer = label_answer(floor, ceiling, bound=bound)
    assert (answer.grade, answer.question) == (grade, "label")


def test_no_pass_of_the_label_is_in_doubt_or_of_a_capture_that_does_not_fit() -> None:
    low = told(207), told(210)
    assert label_answer(*low, doubts=[ODD]).grade == "inconclusive"
    assert label_answer(*low, left_out=1, classes=3).grade == "inconclusive"
    assert "classes were left out (1)" in label_answer(*low, left_out=1).reason
    assert label_answer(*low, left_out=1, bound=0.2).grade == "B"
    assert label_answer(told(207), told(333), left_out=1).grade == "C"
    assert label_answer(told(400), told(400), doubts=[ODD]).grade == "F"
    assert answer_label(*low, [CONTRADICTION], None, []).grade == "inconclusive"
    assert answer_label(told(400), told(400), [], UNLIKE, []).grade == "inconclusive"
    sure = told(20, 2000, 0.01), told(20, 2000, 0.01)
    assert answer_label(*sure, [], None, [], 0.2).grade == "B"


def of(question: Any, grade: Grade | None, public: bool = False) -> Answer:
    return Answer(question=question, grade=grade, reason=f"{question} is so.", public=public)


@pytest.mark.parametrize(
    ("image", "label", "fail_on", "grade", "code", "decides"),
    [
        ("A", "B", "C", "B", 0, "label"),
        ("B", "A", "C", "B", 0, "image"),
        ("B", "B", "C", "B", 0, "image"),
        ("B", "C", "C", "C", 1, "label"),
        ("F", "C", "C", "F", 1, "image"),
        ("B", "inconclusive", "C", "inconclusive", 3, "label"),
        ("inconclusive", "B", "C", "inconclusive", 3, "image"),
        ("inconclusive", "F", "C", "F", 1, "label"),
        ("inconclusive", "C", "D", "inconclusive", 3, "image"),
        ("C", "inconclusive", "D", "inconclusive", 3, "label"),
        ("C", "C", "D", "C", 0, "image"),
    ],
)
def test_the_worst_question_decides_and_none_that_is_open_passes(
    image: Grade, label: Grade, fail_on: Grade, grade: Grade, code: int, decides: str
) -> None:
    verdict = decide_all([of("image", image), of("label", label)], None, fail_on)
    assert (verdict.grade, verdict.exit_code, verdict.question) == (grade, code, decides)
    assert verdict.reason == f"{decides} is so."
    cut = decide_all([of("image", image), of("label", label)], "matching", fail_on)
    assert cut.exit_code == 3
    assert cut.grade not in ("A", "B")


def test_a_public_question_is_not_counted() -> None:
    for grade in ("A", "B", "C", "F"):
        verdict = decide_all([of("image", grade), of("label", None, public=True)], None, "C")
        assert (verdict.grade, verdict.question) == (grade, "image")
    answer = answer_label(told(400), told(400), [], None, [], public=True)
    assert (answer.grade, answer.public) == (None, True)
    assert "evidence.public" in answer.reason


def test_the_label_is_said_in_words_of_its_own() -> None:
    assert set(LABEL_IN_WORDS) == set(IN_WORDS)
    for grade, words in LABEL_IN_WORDS.items():
        assert "label" in words
        assert in_words(grade, rate(6, 200), "label") == words
    some = label_answer(told(3, 20, 0.25), told(9, 20, 0.25), classes=7)
    assert "among 4 of the 7 classes" in some.reason


def test_the_words_of_a_pass_are_about_images_of_one_class() -> None:
    for grade in ("A", "B"):
        words = in_words(grade, rate(6, 200))
        assert words.startswith("which of 32 same-class images it was can")
        assert "by guessing" in words
    assert not any("leak" in words for words in IN_WORDS.values())
    assert in_words("inconclusive", None) == IN_WORDS["inconclusive"]


def guarantee(mu: float, **given: Any) -> Guarantee:
    described = {"unit": "sample", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}
    return Guarantee(**described, epsilon=1, mu=mu, reconstruction_bound=0.1, **given)


def ids(**given: object) -> list[str]:
    nothing = {
        "floor": None,
        "ceiling": None,
        "label": None,
        "undefended": None,
        "checks": [],
        "likeness": None,
        "guarantee": None,
        "promise": None,
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
    assert ids(label_ceiling=measure_rate(150, 200, 0.1)) == ["GGL003"]
    assert ids(label_ceiling=measure_rate(20, 200, 0.1)) == []
    both = {"label": measure_rate(200, 200, 0.1), "label_ceiling": measure_rate(200, 200, 0.1)}
    assert ids(**both) == ["GGL003"]
    assert "GGL006" in ids(label_ceiling=measure_rate(190, 200, 0.5), guarantee=guarantee(1))
    assert "GGL006" not in ids(label_ceiling=measure_rate(160, 200, 0.5), guarantee=guarantee(1))
    assert ids(checks=[CONTRADICTION]) == ["GGL005"]
    assert ids(likeness=UNLIKE) == ["GGL005"]
    assert ids(likeness=LIKE) == ids(likeness=CANNOT_TELL) == []
    assert ids(ceiling=rate(150, 200), guarantee=guarantee(0.5)) == ["GGL006", "GGL002"]
    assert "GGL006" not in ids(ceiling=rate(150, 200), guarantee=guarantee(9))
    broken = measure_rate(190, 200, 1 / 8)
    assert ids(promise=broken, guarantee=guarantee(1)) == ["GGL006"]
    assert ids(promise=broken, guarantee=guarantee(4)) == []
    assert ids(guarantee=guarantee(1, claimed_epsilon=0.5)) == ["GGL006"]
    assert ids(undefended=rate(0, 10)) == ["GGL007"]
    assert ids(undefended=rate(10, 10)) == []
    assert ids(ceiling=rate(1, 60)) == ["GGL008"]


def test_more_trials_are_only_asked_for_where_they_can_help() -> None:
    few = find(None, rate(0, 5), None, None, [], None, None, None)[0]
    assert "evidence.matching_trials=" in few.detail
    assert ids(ceiling=rate(14, 200)) == []
