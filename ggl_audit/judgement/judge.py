"""The judgement of an audit: the verdict and the findings that a ledger gives rise to."""

from __future__ import annotations

from dataclasses import dataclass

from ggl_audit.evidence.bounds import ReconstructionRate
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.judgement.declared import Declared
from ggl_audit.judgement.findings import Finding, find, promise_is_broken
from ggl_audit.judgement.grade import Verdict, decide, doubts_about_ceiling
from ggl_audit.judgement.measured import Measured, measure
from ggl_audit.judgement.unmeasured import lacking, why_unmeasured


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
    broken = promise_is_broken(measured.ceiling, measured.promise, declared.guarantee)
    doubts = doubts_about_ceiling(
        measured.undefended_matching,
        declared.checks,
        likeness,
        has_likelihood=declared.has_likelihood,
        bound_for_any_model=declared.bound_for_any_model,
        fit_is_proven=proven,
        real_images=declared.evidence.reference is not None,
        promise_is_broken=broken,
        about_the_client=declared.doubts,
        noise=measured.noise,
        lacking=lacking(declared, ledger),
    )
    verdict = decide(
        floor,
        measured.ceiling,
        declared.checks,
        likeness,
        doubts,
        cut_short,
        declared.gate.fail_on,
        0.0 if fits else declared.bound_for_any_model,
        measured.is_exact,
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
    )
    reasons = why_unmeasured(declared, ledger, measured, cut_short)
    verdict = verdict.beside(measured.label, reasons.get("label", ""))
    return Judgement(measured, verdict, findings, reasons)


def _confidence(likeness: Likeness | None) -> int:
    """The least first: a release is no better than the capture that fits worst."""
    if likeness is None:
        return 3
    outcomes = ("unlike", "undecided", "hidden", "like")
    return 2 * outcomes.index(likeness.outcome) + likeness.rules_out_larger
