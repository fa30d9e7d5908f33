"""The grade: what the floor, the ceiling and the checks of the capture add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, trials_needed
from ggl_audit.evidence.classifiers import FEWEST_IMAGES
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.evidence.standing import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    RECONSTRUCTED,
    bounded,
    reconstructed,
)
from ggl_audit.messages import Message, Said

Grade = Literal["A", "B", "C", "D", "F", "inconclusive"]

AskedFor = Literal["image", "label"]

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

LABEL_IN_WORDS: dict[Grade, str] = {
    "A": "the label cannot be told measurably better than by guessing",
    "B": "the label can be told little better than by guessing",
    "C": "the label is told; that the last layer alone gives it away was not shown",
    "D": "labels are partly read off the last layer",
    "F": "labels are read off the last layer",
    "inconclusive": "nothing can be said of the label",
}


class Answer(BaseModel):
    """What can be said of one question.

    Attributes:
        question: image or label.
        grade: A to F, or inconclusive; None where it was not asked.
        reason: the figures that decided, in a sentence or two.
        floor: what was demonstrably taken.
        ceiling: what is still in there.
        chance: how often a guess is right.
        bound: how often anybody is right at most, under the declared clip and noise; None where
            these are no bound.
        findings: ids of what was found.
        public: whether the answer is declared to be no secret, so that no verdict counts it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: AskedFor
    grade: Grade | None
    reason: str
    floor: ReconstructionRate | Rate | None = None
    ceiling: Rate | None = None
    chance: float | None = None
    bound: float | None = None
    findings: list[str] = []
    public: bool = False


STAGE_LACKS = Message(
    "doubt/stage-lacks",
    "not enough was measured of {stage}, which a pass takes",
    advice="Give it more time (`--time-limit`), or go on with the same `--ledger`.",
)
CLIENT_SENDS_OTHERS = Message(
    "doubt/client-sends-others",
    "what the client's own code sends is not as declared: {detail}",
    advice="Act on the finding; what it says is explained above, under what contradicts.",
)
PROMISE_CONTRADICTED = Message(
    "doubt/promise-contradicted",
    "the promise of differential privacy is contradicted",
    advice="Act on finding GGL006: more is identified than the guarantee allows, or a smaller "
    "epsilon is claimed than the noise gives.",
)
SAMPLES_OF_PRIOR = Message(
    "doubt/samples-of-prior",
    "the canaries are samples of the prior, which may be more alike than real images are: give an "
    "evidence.reference",
    advice="Give public images that are like the private ones.",
)
SHOW_THE_FIT = (
    "Give `evidence.truth` if you hold the private image, raise `evidence.reconstruction_trials` "
    "and `attack.evaluations`, or bound the gradient by a clip before the noise."
)
FIT_NOT_SHOWN = Message(
    "doubt/fit-not-shown",
    "nothing shows that the capture belongs to the declared model, and a larger gradient, of "
    "another model or round, would stand out of this noise",
    advice=SHOW_THE_FIT,
)
UNDECIDED = Message(
    "doubt/undecided",
    "the capture is neither like the canaries' gradients nor clearly unlike them: {detail}",
    advice="Begin with the named tensor: its order, layout or layer may be another. Raise "
    "`attack.evaluations` and `evidence.reconstruction_trials`, or give `evidence.truth`, which "
    "settles it.",
)
CONTROL_FAILS = Message(
    "doubt/control-fails",
    "even without the defense it identifies only {count} of {trials}: look at the weights, the "
    "normalization and the reference",
    advice="Look at these: the images cannot be told apart by this model at all, so the defense "
    "is not what was measured.",
)
NO_LIKELIHOOD = Message(
    "doubt/no-likelihood",
    "the client's random draws leave this tool without the best matching statistic, so better "
    "matching may identify more",
    advice="Audit a release that tells the attacker more: `order: fixed`, no error feedback, or "
    "none of the steps that come after the noise or hide a mask.",
)
STEP_HIDDEN = Message(
    "doubt/step-hidden",
    "the capture cannot show {step}, which the ceiling takes for granted",
    advice="Give the gradient as it is before the defense with `capture.stage: raw`, so that this "
    "tool applies the steps; a capture of what is sent cannot show this one.",
)
NO_A = Message(
    "doubt/no-a",
    "{reason}; no A, as nothing shows that the capture belongs to the declared model, and for any "
    "other the clip and the noise only bound the advantage by {advantage:.2f}",
    advice=SHOW_THE_FIT,
)
READ_OFF = Message(
    "inconclusive/read-off",
    "The private image was read off the captured gradient exactly",
    advice="Do not send the first layer's bias, or add noise after a clip.",
)
CUT_SHORT = Message(
    "inconclusive/cut-short",
    "The audit was cut short during {stage}. {reason}",
    advice="Run it to the end, or with fewer trials or evaluations; `ggl-audit check` predicts "
    "the time.",
)
CONTRADICTED = Message(
    "inconclusive/contradicted",
    "The capture contradicts {step}: {detail}",
    advice="Find the contradicting step [below](#what-contradicts).",
)
IS_UNLIKE = Message(
    "inconclusive/is-unlike",
    "The capture is unlike the canaries' gradients: {detail}. Likely cause: {cause}",
    advice="Look at the likely cause, [below](#likely-causes).",
)
NO_MATCHING_TRIALS = Message(
    "inconclusive/no-matching-trials",
    "No matching trials were run, so nothing bounds the leakage",
    advice="Raise `evidence.matching_trials`.",
)
TOO_FEW_TRIALS = Message(
    "inconclusive/too-few-trials",
    "Too few trials. {rate}, which fits guessing and much more; a B takes about {trials_for_b} "
    "matching trials, an A about {trials_for_a}",
    advice="Raise `evidence.matching_trials` to the number for the grade, with as many reference "
    "images.",
)
LABEL_NOT_MEASURED = Message(
    "inconclusive/label-not-measured",
    "Whether the label can be told was not measured: {reason}",
    advice="Give two classes with 8 public images each or more, or whatever the reason says; where "
    "the label is no secret, say so: `evidence.public: [label]`.",
)
TOO_FEW_OF_EACH_CLASS = Message(
    "inconclusive/too-few-of-each-class",
    "Too few trials. {rate}, which fits guessing and much more; a B takes about {trials} canaries, "
    "as many of each class",
    advice="Raise `evidence.matching_trials`, and give twice as many images of each class, of "
    "which half are canaries.",
)
CLASSES_LEFT_OUT = Message(
    "inconclusive/classes-left-out",
    "{rate}, but classes were left out ({count}), as there are fewer than {fewest} public images "
    "of each",
    advice="Give 8 public images of each class or more, as rare ones may be told best; where the "
    "label is no secret, say so: `evidence.public: [label]`.",
)
LABEL_IS_PUBLIC = Message(
    "inconclusive/label-is-public",
    "It is no secret, as evidence.public says, and was not asked for",
    advice="Nothing is to be done, if that is so.",
)
NO_RECONSTRUCTION_TRIALS = Message(
    "inconclusive/no-reconstruction-trials",
    "{rate}, but no reconstruction trials were run",
    advice="Raise `evidence.reconstruction_trials`.",
)


class Verdict(BaseModel):
    """The grade, why, and what the program exits with.

    Attributes:
        grade: the worst of the questions that are not public: A to F, or inconclusive.
        reason: the figures that decided, in a sentence or two.
        exit_code: 0 passed the gate, 1 did not, 3 inconclusive or cut short.
        question: the one that decided.
        answers: to each question.
    """

    model_config = ConfigDict(frozen=True)

    grade: Grade
    reason: str
    exit_code: Literal[0, 1, 3]
    question: AskedFor = "image"
    answers: list[Answer] = []

    def of(self, question: AskedFor) -> Answer:
        """The answer to one question."""
        return next(one for one in self.answers if one.question == question)


def in_words(grade: Grade, ceiling: Rate | None, question: AskedFor = "image") -> str:
    """The meaning of a grade, with the number of candidates that the ceiling was measured with."""
    if question == "label":
        return LABEL_IN_WORDS[grade]
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
    about_the_client: Sequence[Said] = (),
    noise: NoiseTest | None = None,
    lacking: Sequence[str] = (),
) -> list[Said]:
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
    doubts = [STAGE_LACKS(stage=stage) for stage in lacking]
    if noise is not None and noise.violations:
        doubts.append(CLIENT_SENDS_OTHERS(detail=noise.violations[0].detail))
    doubts += about_the_client
    if promise_is_broken:
        doubts.append(PROMISE_CONTRADICTED())
    if not real_images:
        doubts.append(SAMPLES_OF_PRIOR())
    fits = fit_is_proven or (likeness is not None and likeness.rules_out_larger)
    if not fits and bound_for_any_model > LITTLE_LEAKAGE:
        doubts.append(FIT_NOT_SHOWN())
    if likeness is not None and likeness.outcome == "undecided":
        doubts.append(UNDECIDED(detail=likeness.detail))
    if matching_control is not None and matching_control.advantage_lower <= MATCHING_WORKS:
        count, trials = matching_control.successes, matching_control.trials
        doubts.append(CONTROL_FAILS(count=count, trials=trials))
    if not has_likelihood:
        doubts.append(NO_LIKELIHOOD())
    doubts += [STEP_HIDDEN(step=check.step) for check in checks if check.outcome == "hidden"]
    return doubts


def decide(answers: Sequence[Answer], cut_short: str | None, fail_on: Grade) -> Verdict:
    """Adds answers up: the worst that is not public decides.

    A question that nothing can be said of leaves a verdict inconclusive, unless another one fails
    the gate.

    Args:
        answers: to each question.
        cut_short: what was running when the audit was cut short, or None. Then there is no pass.
        fail_on: the best grade that fails the gate.
    """
    counted = [one for one in answers if not one.public]
    graded = [one for one in counted if one.grade in ORDER]
    open_ones = [one for one in counted if one.grade not in ORDER]
    worst = max(graded, key=_order, default=None)
    fails = worst is not None and _order(worst) >= ORDER.index(fail_on)
    decisive = worst if worst is not None and (fails or not open_ones) else open_ones[0]
    grade, reason = decisive.grade or "inconclusive", decisive.reason
    if cut_short is not None:
        grade = "inconclusive" if grade in ("A", "B") else grade
        reason = CUT_SHORT(stage=cut_short, reason=reason).text
    code: Literal[0, 1, 3] = 1 if fails else 0
    if grade == "inconclusive" or cut_short is not None:
        code = 3
    return Verdict(
        grade=grade,
        reason=reason,
        exit_code=code,
        question=decisive.question,
        answers=list(answers),
    )


def _order(answer: Answer) -> int:
    assert answer.grade is not None
    return ORDER.index(answer.grade)


def answer_image(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    checks: Sequence[Check],
    likeness: Likeness | None,
    doubts: Sequence[Said],
    bound_for_any_model: float = 0.0,
    exact: bool = False,
) -> Answer:
    """Grades what is known of the image.

    Args:
        floor: canaries that were reconstructed, beyond the null control; None if not measured.
        ceiling: canaries that candidate matching identified; None if not measured.
        checks: the capture against each declared step.
        likeness: of the capture to the canaries' gradients, unless its fit is proven otherwise.
        doubts: about the ceiling; with any of them there is no A and no B.
        bound_for_any_model: where nothing shows that the capture belongs to the declared model,
            the largest advantage that a clip and noise leave to anybody; it bounds an A.
        exact: whether the image was read off the capture exactly, which settles the matter.
    """
    if exact:
        grade: Grade = "F"
        reason = f"{READ_OFF()}."
    else:
        misfit = _misfit(checks, likeness)
        grade, reason = ("inconclusive", misfit) if misfit else _grade(floor, ceiling)
        grade, reason = _beyond_doubt(grade, reason, doubts, bound_for_any_model)
    return Answer(question="image", grade=grade, reason=reason, floor=floor, ceiling=ceiling)


def answer_label(
    floor: Rate | None,
    ceiling: Rate | None,
    checks: Sequence[Check],
    likeness: Likeness | None,
    doubts: Sequence[Said],
    bound_for_any_model: float = 0.0,
    *,
    bound: float = 1.0,
    classes: int = 0,
    left_out: int = 0,
    classifier: str = "",
    not_measured: str = "",
    no_floor: str = "",
    public: bool = False,
) -> Answer:
    """Grades what is known of the label.

    The classifier that the ceiling is measured with needs no generator, but it is learned from
    public images; what anybody reads off the last layer without any is the floor.

    Args:
        floor: canaries whose labels were inferred from the last layer; None if not measured.
        ceiling: canaries whose label the best classifier told; None if not measured.
        checks: the capture against each declared step.
        likeness: of the capture to the canaries' gradients, unless its fit is proven otherwise.
        doubts: about the ceiling; with any of them there is no A and no B.
        bound_for_any_model: as for the image.
        bound: the largest advantage that the declared clip and noise leave to anybody.
        classes: of the model.
        left_out: how many of these have too few public images.
        classifier: the best one.
        not_measured: why there is no ceiling.
        no_floor: why there is no floor.
        public: whether it is declared to be no secret.
    """
    if public:
        reason = f"{LABEL_IS_PUBLIC()}."
        return Answer(question="label", grade=None, reason=reason, public=True)
    misfit = _misfit(checks, likeness)
    grade: Grade = "inconclusive"
    reason = misfit
    if not misfit:
        measured = floor, ceiling, bound, classes, left_out, classifier
        grade, reason = _grade_of_label(*measured, not_measured, no_floor)
    grade, reason = _beyond_doubt(grade, reason, doubts, bound_for_any_model)
    return Answer(question="label", grade=grade, reason=reason, floor=floor, ceiling=ceiling)


def _beyond_doubt(
    grade: Grade, reason: str, doubts: Sequence[Said], bound_for_any_model: float
) -> tuple[Grade, str]:
    """No A without a fit that is shown, and no pass in doubt."""
    if grade == "A" and bound_for_any_model > NO_LEAKAGE:
        grade = "B"
        no_a = NO_A(reason=reason.removesuffix("."), advantage=bound_for_any_model)
        reason = f"{no_a}."
    if grade in ("A", "B") and doubts:
        grade, reason = "inconclusive", f"{reason.removesuffix('.')}, but {doubts[0]}."
    return grade, reason


def _misfit(checks: Sequence[Check], likeness: Likeness | None) -> str:
    """Why canaries do not speak for the capture; empty where nothing is said against it."""
    contradicted = [check for check in checks if check.outcome == "contradicts"]
    if contradicted:
        check = contradicted[0]
        return f"{CONTRADICTED(step=check.step, detail=check.detail)}."
    if likeness is not None and likeness.outcome == "unlike":
        return f"{IS_UNLIKE(detail=likeness.detail, cause=likeness.cause)}."
    return ""


def _grade_of_label(
    floor: Rate | None,
    ceiling: Rate | None,
    bound: float,
    classes: int,
    left_out: int,
    classifier: str,
    not_measured: str,
    no_floor: str,
) -> tuple[Grade, str]:
    if floor is not None and floor.advantage_lower > PARTLY_RECONSTRUCTED:
        grade: Grade = "F" if floor.advantage_lower > RECONSTRUCTED else "D"
        return grade, f"{_inferred(floor)}."
    told = "" if ceiling is None else _told(ceiling, classes, classifier)
    standing = None if ceiling is None else bounded(ceiling)
    if standing == "A" and not left_out:
        return "A", f"{told}, about as often as by guessing."
    # The bound is one for any class.
    if bound <= NO_LEAKAGE:
        return "A", _limited(told, bound)
    if bound <= LITTLE_LEAKAGE:
        return "B", _limited(told, bound)
    if standing in ("A", "B") and left_out:
        missing = CLASSES_LEFT_OUT(rate=told, count=left_out, fewest=FEWEST_IMAGES)
        return "inconclusive", f"{missing}."
    if standing == "B":
        return "B", f"{told}."
    if ceiling is None:
        return "inconclusive", f"{LABEL_NOT_MEASURED(reason=not_measured)}."
    if standing == "unclear":
        needed = trials_needed(LITTLE_LEAKAGE, ceiling.chance)
        return "inconclusive", f"{TOO_FEW_OF_EACH_CLASS(rate=told, trials=needed)}."
    if floor is None:
        return "C", f"{told}. Label inference from the last layer was not measured: {no_floor}."
    return "C", f"{told}. {_inferred(floor)}."


def _limited(told: str, bound: float) -> str:
    limit = f"he declared clip and noise leave anybody an advantage of {bound:.2f} at most."
    return f"{told}; t{limit}" if told else f"T{limit}"


def _told(ceiling: Rate, classes: int, classifier: str) -> str:
    asked = round(1 / ceiling.chance)
    among = f"{asked} classes" if asked == classes else f"{asked} of the {classes} classes"
    return (
        f"The best classifier ({classifier}) tells the label of {ceiling.successes} of "
        f"{ceiling.trials} canaries among {among} (95 % interval {ceiling.lower:.1%} to "
        f"{ceiling.upper:.1%}, chance {ceiling.chance:.1%})"
    )


def _inferred(floor: Rate) -> str:
    return (
        f"The last layer alone gives the label away for {floor.successes} of {floor.trials} "
        f"canaries (95 % interval {floor.lower:.1%} to {floor.upper:.1%}, chance "
        f"{floor.chance:.1%})"
    )


def _grade(floor: ReconstructionRate | None, ceiling: Rate | None) -> tuple[Grade, str]:
    taken = reconstructed(floor)
    if floor is not None and taken is not None:
        return taken, f"{_floor(floor)}."
    if ceiling is None:
        return "inconclusive", f"{NO_MATCHING_TRIALS()}."
    standing = bounded(ceiling)
    if standing == "A":
        return "A", f"{_ceiling(ceiling)}, about as often as by guessing."
    if standing == "B":
        return "B", f"{_ceiling(ceiling)}."
    if standing == "unclear":
        few = TOO_FEW_TRIALS(
            rate=_ceiling(ceiling),
            trials_for_b=trials_needed(LITTLE_LEAKAGE, ceiling.chance),
            trials_for_a=trials_needed(NO_LEAKAGE, ceiling.chance),
        )
        return "inconclusive", f"{few}."
    if floor is None:
        return "inconclusive", f"{NO_RECONSTRUCTION_TRIALS(rate=_ceiling(ceiling))}."
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
