"""The grade: what the floor, the ceiling and the checks of the capture add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, trials_needed
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.evidence.standing import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    bounded,
    reconstructed,
)

Grade = Literal["A", "B", "C", "D", "F", "inconclusive"]

MATCHING_WORKS = 0.5

ORDER: tuple[Grade, ...] = ("A", "B", "C", "D", "F")

IN_WORDS: dict[Grade, str] = {
    "A": "which of N same-class images it was cannot be told measurably better than by guessing",
    "B": "which of N same-class images it was can be told little better than by guessing",
    "C": "the information is there; these attacks did not extract it",
    "D": "private images are partly reconstructed",
    "F": "private images are reconstructed",
    "inconclusive": "nothing can be said",
}


ONE_QUESTION = (
    "That is the one question which this grade is about: the label, attributes and other rounds "
    "are others."
)


class Verdict(BaseModel):
    """The grade, why, and what the program exits with.

    Attributes:
        grade: A to F, or inconclusive.
        reason: the figures that decided, in a sentence or two.
        exit_code: 0 passed the gate, 1 did not, 3 inconclusive or cut short.
        left_open: what the grade does not count, a sentence each.
    """

    model_config = ConfigDict(frozen=True)

    grade: Grade
    reason: str
    exit_code: Literal[0, 1, 3]
    left_open: list[str] = []

    def beside(self, label: Rate | None, why_no_label: str) -> Verdict:
        """The verdict, beside what is known of the label and does not count in the grade.

        Args:
            label: canaries whose label the last layer gives away; None if not measured.
            why_no_label: why it was not.
        """
        said = [ONE_QUESTION] if self.grade in ("A", "B") else []
        if label is None:
            said.append(f"Whether the gradient tells the label was not measured: {why_no_label}.")
        else:
            beyond = "" if label.advantage_lower > 0 else "not shown to be "
            more = "; a classifier of whole gradients may tell it more often"
            said.append(
                f"The label is told by the last layer alone for {label.successes} of "
                f"{label.trials} canaries (95 % interval {label.lower:.0%} to {label.upper:.0%}, "
                f"chance {label.chance:.0%}), {beyond}beyond guessing"
                f"{more if label.successes < label.trials else ''}."
            )
        return self.model_copy(update={"left_open": said})


def in_words(grade: Grade, ceiling: Rate | None) -> str:
    """The meaning of a grade, with the number of candidates that the ceiling was measured with."""
    words = IN_WORDS[grade]
    return words if ceiling is None else words.replace(" N ", f" {round(1 / ceiling.chance)} ")


def doubts_about_ceiling(
    matching_control: Rate | None,
    checks: Sequence[Check],
    likeness: Likeness | None,
    *,
    has_likelihood: bool,
    bound_for_any_model: float,
    fit_is_proven: bool,
    real_images: bool,
    promise_is_broken: bool,
    about_the_client: Sequence[str] = (),
    noise: NoiseTest | None = None,
    lacking: Sequence[str] = (),
) -> list[str]:
    """The reasons for which a low ceiling must not be taken for a good defense.

    Args:
        matching_control: candidate matching without the defense; None if not measured.
        checks: the capture against each declared step.
        likeness: of the capture to the canaries' gradients; None if not measured.
        has_likelihood: whether matching is by the likelihood under the declared noise.
        bound_for_any_model: the largest advantage that a clip and noise leave to anybody, whatever
            the model's gradient is; 1 where there are none.
        fit_is_proven: the private image is held and gives the capture, without noise.
        real_images: the canaries are images and not samples of the prior.
        promise_is_broken: a declared guarantee is contradicted.
        about_the_client: what is wrong with the client's own code as a stand-in for the capture's.
        noise: what its noise is like; None if that was not tested.
        lacking: what was planned and left out, as there was no time; in words.
    """
    doubts = []
    doubts += [f"not enough was measured of {stage}, which a pass takes" for stage in lacking]
    if noise is not None and noise.violations:
        found = noise.violations[0].detail
        doubts.append(f"what the client's own code sends is not as declared: {found}")
    doubts += about_the_client
    if promise_is_broken:
        doubts.append("the promise of differential privacy is contradicted")
    if not real_images:
        doubts.append(
            "the canaries are samples of the prior, which may be more alike than real images are: "
            "give an evidence.reference"
        )
    fits = fit_is_proven or (likeness is not None and likeness.rules_out_larger)
    if not fits and bound_for_any_model > LITTLE_LEAKAGE:
        doubts.append(
            "nothing shows that the capture belongs to the declared model, and a larger gradient, "
            "of another model or round, would stand out of this noise"
        )
    if likeness is not None and likeness.outcome == "undecided":
        doubts.append(
            "the capture is neither like the canaries' gradients nor clearly unlike them: "
            f"{likeness.detail}"
        )
    if matching_control is not None and matching_control.advantage_lower <= MATCHING_WORKS:
        doubts.append(
            f"even without the defense it identifies only {matching_control.successes} of "
            f"{matching_control.trials}: look at the weights, the normalization and the reference"
        )
    if not has_likelihood:
        doubts.append(
            "the client's random draws leave this tool without the best matching statistic, so "
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
    likeness: Likeness | None,
    doubts: Sequence[str],
    cut_short: str | None,
    fail_on: Grade,
    bound_for_any_model: float = 0.0,
    exact: bool = False,
) -> Verdict:
    """Grades an audit.

    Args:
        floor: canaries that were reconstructed, beyond the null control; None if not measured.
        ceiling: canaries that candidate matching identified; None if not measured.
        checks: the capture against each declared step.
        likeness: of the capture to the canaries' gradients, unless its fit is proven otherwise.
        doubts: about the ceiling; with any of them there is no A and no B.
        cut_short: what was running when the audit was cut short, or None. Then there is no pass.
        fail_on: the best grade that fails the gate.
        bound_for_any_model: where nothing shows that the capture belongs to the declared model,
            the largest advantage that a clip and noise leave to anybody; it bounds an A.
        exact: whether the image was read off the capture exactly, which settles the matter.
    """
    if exact:
        reason = "The private image was read off the captured gradient exactly."
        return Verdict(grade="F", reason=reason, exit_code=1)
    grade, reason = _grade(floor, ceiling, checks, likeness)
    if grade == "A" and bound_for_any_model > NO_LEAKAGE:
        grade = "B"
        reason = (
            f"{reason.removesuffix('.')}; no A, as nothing shows that the capture belongs to the "
            "declared model, and for any other the clip and the noise only bound the advantage "
            f"by {bound_for_any_model:.2f}."
        )
    if grade in ("A", "B") and doubts:
        grade, reason = "inconclusive", f"{reason.removesuffix('.')}, but {doubts[0]}."
    if cut_short is not None:
        grade = "inconclusive" if grade in ("A", "B") else grade
        reason = f"The audit was cut short during {cut_short}. {reason}"
    if grade == "inconclusive" or cut_short is not None:
        return Verdict(grade=grade, reason=reason, exit_code=3)
    failed = ORDER.index(grade) >= ORDER.index(fail_on)
    return Verdict(grade=grade, reason=reason, exit_code=1 if failed else 0)


def _grade(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    checks: Sequence[Check],
    likeness: Likeness | None,
) -> tuple[Grade, str]:
    contradicted = [check for check in checks if check.outcome == "contradicts"]
    if contradicted:
        check = contradicted[0]
        return (
            "inconclusive",
            f"The capture contradicts {check.step}: {check.detail}.",
        )
    if likeness is not None and likeness.outcome == "unlike":
        return (
            "inconclusive",
            f"The capture is unlike the canaries' gradients: {likeness.detail}. Likely cause: "
            f"{likeness.cause}.",
        )
    taken = reconstructed(floor)
    if floor is not None and taken is not None:
        return taken, f"{_floor(floor)}."
    if ceiling is None:
        return "inconclusive", "No matching trials were run, so nothing bounds the leakage."
    standing = bounded(ceiling)
    if standing == "A":
        return "A", f"{_ceiling(ceiling)}, about as often as by guessing."
    if standing == "B":
        return "B", f"{_ceiling(ceiling)}."
    if standing == "unclear":
        return (
            "inconclusive",
            f"Too few trials. {_ceiling(ceiling)}, which fits guessing and much more; "
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
