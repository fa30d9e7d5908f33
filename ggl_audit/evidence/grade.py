"""The grade: what the floor, the ceiling and the checks of the capture add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, trials_needed

Grade = Literal["A", "B", "C", "D", "F", "inconclusive"]

NO_LEAKAGE = 0.05
LITTLE_LEAKAGE = 0.25
PARTLY_RECONSTRUCTED = 0.05
RECONSTRUCTED = 0.5
MATCHING_WORKS = 0.5
SIGNIFICANCE = 0.025

ORDER: tuple[Grade, ...] = ("A", "B", "C", "D", "F")

IN_WORDS: dict[Grade, str] = {
    "A": "no measurable leakage",
    "B": "little leakage, bounded",
    "C": "the information is there; this attack did not extract it",
    "D": "private images are partly reconstructed",
    "F": "private images are reconstructed",
    "inconclusive": "nothing can be said",
}


class Verdict(BaseModel):
    """The grade, why, and what the program exits with.

    Attributes:
        grade: A to F, or inconclusive.
        reason: the figures that decided, in a sentence or two.
        exit_code: 0 passed the gate, 1 did not, 3 inconclusive or cut short.
    """

    model_config = ConfigDict(frozen=True)

    grade: Grade
    reason: str
    exit_code: Literal[0, 1, 3]


def reconstructed(floor: ReconstructionRate | None) -> Literal["D", "F"] | None:
    """Whether private images are partly (D) or mostly (F) reconstructed.

    The rate's lower end must be above the threshold, and the attack must beat its null control in
    the exact paired test at 2.5 %.
    """
    if floor is None or floor.null_p_value is None or floor.null_p_value > SIGNIFICANCE:
        return None
    if floor.advantage_lower > RECONSTRUCTED:
        return "F"
    return "D" if floor.advantage_lower > PARTLY_RECONSTRUCTED else None


def doubts_about_ceiling(
    matching_control: Rate | None, checks: Sequence[Check], noise_is_last: bool
) -> list[str]:
    """The reasons for which a low ceiling must not be taken for a good defense.

    Args:
        matching_control: candidate matching without the defense; None if not measured.
        checks: the capture against each declared step.
        noise_is_last: whether the matching distance is the likelihood under the declared noise.
    """
    doubts = []
    if matching_control is not None and matching_control.advantage_lower <= MATCHING_WORKS:
        doubts.append(
            f"even without the defense it identifies only {matching_control.successes} of "
            f"{matching_control.trials}: look at the weights, the normalization and the reference"
        )
    if not noise_is_last:
        doubts.append(
            "steps that follow noise leave this tool without the best matching statistic, so "
            "better matching may identify more"
        )
    doubts += [
        f"the capture cannot show {check.step}, which the ceiling takes for granted"
        for check in checks
        if check.outcome == "hidden"
    ]
    return doubts


def decide(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    checks: Sequence[Check],
    doubts: Sequence[str],
    interrupted_in: str | None,
    fail_on: Grade,
) -> Verdict:
    """Grades an audit.

    Args:
        floor: canaries that were reconstructed, beyond the null control; None if not measured.
        ceiling: canaries that candidate matching identified; None if not measured.
        checks: the capture against each declared step.
        doubts: about the ceiling; with any of them there is no A and no B.
        interrupted_in: what was running when the audit was cut short, or None.
        fail_on: the best grade that fails the gate.
    """
    grade, reason = _grade(floor, ceiling, checks, interrupted_in)
    if grade in ("A", "B") and doubts:
        grade, reason = "inconclusive", f"{reason.removesuffix('.')}, but {doubts[0]}."
    if grade == "inconclusive":
        return Verdict(grade=grade, reason=reason, exit_code=3)
    failed = ORDER.index(grade) >= ORDER.index(fail_on)
    return Verdict(grade=grade, reason=reason, exit_code=1 if failed else 0)


def _grade(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    checks: Sequence[Check],
    interrupted_in: str | None,
) -> tuple[Grade, str]:
    contradicted = [check for check in checks if check.outcome == "contradicts"]
    if interrupted_in is not None:
        return "inconclusive", f"The audit was cut short during {interrupted_in}."
    if contradicted:
        check = contradicted[0]
        return (
            "inconclusive",
            f"The capture contradicts {check.step}: {check.detail}.",
        )
    taken = reconstructed(floor)
    if floor is not None and taken is not None:
        return taken, f"{_floor(floor)}."
    if ceiling is None:
        return "inconclusive", "No matching trials were run, so nothing bounds the leakage."
    if ceiling.advantage_upper <= NO_LEAKAGE:
        return "A", f"{_ceiling(ceiling)}, about as often as by guessing."
    if ceiling.advantage_upper <= LITTLE_LEAKAGE:
        return "B", f"{_ceiling(ceiling)}."
    if ceiling.advantage_lower <= 0:
        return (
            "inconclusive",
            f"Too few trials. {_ceiling(ceiling)}, which fits both no leakage and much of it; "
            f"a B takes about {trials_needed(LITTLE_LEAKAGE, ceiling.chance)} matching trials, an "
            f"A about {trials_needed(NO_LEAKAGE, ceiling.chance)}.",
        )
    if floor is None:
        return "inconclusive", f"{_ceiling(ceiling)}, but no reconstruction trials were run."
    return "C", f"{_ceiling(ceiling)}. {_floor(floor)}."


def _floor(floor: Rate) -> str:
    return (
        f"The attack's pictures identify {floor.successes} of {floor.trials} canaries, beyond the "
        f"null control, among {round(1 / floor.chance)} same-class candidates "
        f"(95 % interval {floor.lower:.0%} to {floor.upper:.0%})"
    )


def _ceiling(ceiling: Rate) -> str:
    return (
        f"Candidate matching identifies {ceiling.successes} of {ceiling.trials} canaries "
        f"(95 % interval {ceiling.lower:.1%} to {ceiling.upper:.1%}, chance {ceiling.chance:.1%})"
    )
