"""Makes the captures of a case: what each was read to be, observed, checked and labelled."""

from __future__ import annotations

import torch

from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case
from ggl_audit.case.checks import check_truths, look_at_noise, look_for_covering_noise, observe
from ggl_audit.case.doubts import label_doubts
from ggl_audit.case.labels import labels_of
from ggl_audit.case.reading import read_captured
from ggl_audit.errors import InputError, SpecError
from ggl_audit.evidence.declared_noise import check_noise
from ggl_audit.inputs.capture import FittedGradient
from ggl_audit.inputs.images import fingerprints
from ggl_audit.messages import Message

LACKS_OTHERS = Message(
    "capture/lacks-others",
    "has no {name!r}, which the first capture has",
    "Captures that lack different parameters are audits of their own.",
    advice="The captures of a round lack the same parameters, or are audits of their own.",
)
OTHER_STATISTICS = Message(
    "capture/other-statistics",
    "holds other running statistics than the first capture",
    "Captures that hold different tensors are audits of their own.",
)


def observe_audited(case: Case, fitted: FittedGradient, truths: torch.Tensor) -> Capture:
    """The capture that is audited.

    Args:
        case: without captures so far.
        fitted: the capture as it was read.
        truths: the private images, where they are held.

    Raises:
        AuditError: it does not fit what is declared.
    """
    declared, defense = case.spec.capture, case.defense
    observed, checks = observe(case, fitted)
    labels = labels_of(case, observed, declared.labels)
    truth_labels, truth_checks = check_truths(case, observed, truths, labels)
    checks += look_at_noise(case, fitted, observed, truths, truth_labels, truth_checks)
    checks += truth_checks
    checks += look_for_covering_noise(case, observed)
    proven = (
        any(check.outcome == "agrees" for check in truth_checks)
        and not defense.randomness.is_random()
    )
    inferred = declared.labels == "infer"
    return Capture(
        file=str(declared.gradient or declared.after),
        fitted=fitted,
        observed=observed,
        checks=checks,
        labels=labels,
        inferred=inferred,
        labels_in_doubt=label_doubts(case, observed) if inferred and not proven else [],
        truths=truths,
        truth_labels=truth_labels,
        prior_saw_truth=not frozenset(fingerprints(truths)).isdisjoint(case.prior.seen or ()),
    )


def observe_other(case: Case, audited: Capture, number: int) -> Capture:
    """Another capture of the round; its images are not held.

    Args:
        case: without captures so far.
        audited: the first capture.
        number: of the other in ``capture.others``.

    Raises:
        AuditError: it cannot be read, does not fit, or lacks other parameters than the first.
    """
    spec, defense = case.spec, case.defense
    file = spec.capture.others[number]
    fitted = read_captured(spec, case.model, defense, file)
    if fitted.unsent:
        raise InputError(spec.resolve(file), LACKS_OTHERS(name=fitted.unsent[0]))
    if fitted.beside.statistics.keys() != audited.fitted.beside.statistics.keys():
        raise InputError(spec.resolve(file), OTHER_STATISTICS())
    observed, checks = observe(case, fitted)
    if spec.capture.stage == "defended":
        checks += check_noise(defense, observed, case.model, spec.capture, fitted.rounding)
    try:
        labels = labels_of(case, observed, "infer")
    except SpecError as error:
        raise SpecError(
            ("capture", "others", number),
            error.said.advising(
                "Labels of the others are always inferred; audit this capture by itself."
            ),
        ) from None
    return Capture(
        file=str(file),
        fitted=fitted,
        observed=observed,
        checks=checks,
        labels=labels,
        inferred=True,
        labels_in_doubt=label_doubts(case, observed),
        truths=audited.truths[:0],
        truth_labels=None,
        prior_saw_truth=False,
    )
