"""The judgement of an audit: the verdict and the findings that a ledger gives rise to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggl_audit.evidence.bounds import Rate, ReconstructionRate
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.judgement.declared import Declared
from ggl_audit.judgement.findings import Finding, find, promise_is_broken
from ggl_audit.judgement.grade import (
    Answer,
    Verdict,
    answer_image,
    answer_label,
    decide,
    doubts_about_ceiling,
)
from ggl_audit.judgement.measured import Measured, measure
from ggl_audit.judgement.unmeasured import lacking, why_unmeasured
from ggl_audit.messages import Said


@dataclass(frozen=True)
class Judgement:
    """What can be said of an audit.

    Attributes:
        measured: what its ledger adds up to.
        verdict: the grade, and why.
        findings: what a reviewer has to act on, the gravest first.
        not_measured: the reason for each part of the evidence that is lacking.
    """

    measured: Measured
    verdict: Verdict
    findings: list[Finding]
    not_measured: dict[str, str]

    @property
    def floor(self) -> dict[str, ReconstructionRate]:
        """The floor of the strongest attack, by each distance."""
        return self.measured.floors.get(self.measured.attack, {})


def judge(declared: Declared, ledger: Ledger, cut_short: str | None = None) -> Judgement:
    """Judges what is in a ledger; a pure function, which computes no gradient.

    Args:
        declared: what was known before the first trial.
        ledger: what came out of the trials.
        cut_short: what was running when the audit was cut short, or None.
    """
    measured = measure(declared, ledger)
    floors = measured.floors.get(measured.attack, {})
    floor = floors.get(declared.evidence.distance)
    unproven = [
        found.likeness
        for capture, found in zip(declared.captures, measured.captures, strict=True)
        if not capture.proven
    ]
    likeness = min(unproven, key=_confidence, default=None)
    proven = all(capture.proven for capture in declared.captures)
    fits = proven or (likeness is not None and likeness.rules_out_larger)
    reasons = why_unmeasured(declared, ledger, measured, cut_short)

    def doubts(matching_control: Rate | None, bound_for_any_model: float) -> list[Said]:
        return doubts_about_ceiling(
            matching_control,
            declared.checks,
            likeness,
            has_likelihood=declared.has_likelihood,
            bound_for_any_model=bound_for_any_model,
            fit_is_proven=proven,
            real_images=declared.evidence.reference is not None,
            promise_is_broken=promise_is_broken(
                measured.ceiling, measured.promise, declared.guarantee, measured.label_ceiling
            ),
            about_the_client=[*declared.doubts, *declared.public_labels],
            noise=measured.noise,
            lacking=lacking(declared, ledger),
        )

    image = answer_image(
        floor,
        measured.ceiling,
        declared.checks,
        likeness,
        doubts(measured.undefended_matching, declared.bound_for_any_model),
        0.0 if fits else declared.bound_for_any_model,
        measured.is_exact,
    )
    is_public = "label" in declared.evidence.public
    label = answer_label(
        measured.label,
        measured.label_ceiling,
        declared.checks,
        likeness,
        doubts(None, declared.bound_for_label),
        0.0 if fits else declared.bound_for_label,
        bound=declared.bound_for_label,
        classes=declared.classes,
        left_out=declared.classes_left_out,
        classifier=measured.label_classifier,
        not_measured=reasons.get("label_ceiling", ""),
        no_floor=reasons.get("label", ""),
        public=is_public,
    )
    findings = find(
        floor,
        measured.ceiling,
        measured.label,
        measured.undefended,
        declared.checks,
        likeness,
        declared.guarantee,
        measured.promise,
        measured.membership,
        measured.noise,
        recovered=declared.is_exact_moments,
        members=declared.members,
        in_the_clear=declared.in_the_clear,
        exact=measured.is_exact,
        label_ceiling=measured.label_ceiling,
        label_classifier=measured.label_classifier,
        public_labels=declared.public_labels,
    )
    answers = [
        _completed(image, declared.bound_for_any_model, findings),
        _completed(label, declared.bound_for_label, findings),
    ]
    # What was read off exactly is so, whatever was left undone.
    verdict = decide(answers, None if measured.is_exact else cut_short, declared.gate.fail_on)
    return Judgement(measured, verdict, findings, reasons)


def _completed(answer: Answer, largest: float, findings: Sequence[Finding]) -> Answer:
    """An answer with chance, the bound that the largest advantage stands for, and findings."""
    chance = None if answer.ceiling is None else answer.ceiling.chance
    bound = None if chance is None or largest >= 1 else chance + largest * (1 - chance)
    found = [one.id for one in findings if one.question == answer.question]
    return answer.model_copy(update={"chance": chance, "bound": bound, "findings": found})


def _confidence(likeness: Likeness | None) -> int:
    """The least first: a release is no better than the capture that fits worst."""
    if likeness is None:
        return 3
    outcomes = ("unlike", "undecided", "hidden", "like")
    return 2 * outcomes.index(likeness.outcome) + likeness.rules_out_larger
