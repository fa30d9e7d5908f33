"""Puts what was measured into a report, and says what it rests on."""

from __future__ import annotations

from ggl_audit import __version__
from ggl_audit.environment import describe, peak_memory_bytes
from ggl_audit.evidence.bounds import account, empirical_mu
from ggl_audit.evidence.fidelity import compare
from ggl_audit.evidence.findings import find
from ggl_audit.evidence.grade import decide, doubts_about_ceiling
from ggl_audit.experiments import Measurements, Reconstructed
from ggl_audit.gradient import norm
from ggl_audit.report.assumptions import assumptions
from ggl_audit.report.model import (
    Captured,
    CheckedStep,
    Controls,
    Cost,
    EvidenceReport,
    InputFile,
    Reconstruction,
    Report,
    Tool,
    png_uri,
)
from ggl_audit.setting import Setting

LONGEST_CURVE = 200


def assemble(setting: Setting, measured: Measurements, seconds: float) -> Report:
    """Grades what was measured and writes it down.

    Args:
        setting: what was handed in.
        measured: all of it, or what there was when the audit was interrupted.
        seconds: since the start.
    """
    spec = setting.spec
    mechanism = setting.defense.guarantee()
    chance = 1 / spec.evidence.candidates
    guarantee = account(mechanism, spec.evidence.delta, chance) if mechanism else None
    return Report(
        tool=Tool(version=__version__),
        verdict=decide(
            measured.floor,
            measured.ceiling,
            setting.checks,
            doubts_about_ceiling(
                measured.matching_control, setting.checks, setting.defense.noise_is_last()
            ),
            measured.stage,
            spec.gate.fail_on,
        ),
        captured=_captured(setting, measured),
        evidence=EvidenceReport(
            floor=measured.floor,
            ceiling=measured.ceiling,
            label=measured.label,
            controls=Controls(
                null=measured.null,
                undefended=measured.undefended,
                undefended_matching=measured.matching_control,
            ),
            guarantee=guarantee,
            empirical_mu=empirical_mu(measured.ceiling) if measured.ceiling else None,
            checks=[
                CheckedStep(step=check.step, outcome=check.outcome, detail=check.detail)
                for check in setting.checks
            ],
            not_measured=_not_measured(setting, measured),
        ),
        findings=find(
            measured.floor,
            measured.ceiling,
            measured.label,
            measured.undefended,
            setting.checks,
            guarantee,
        ),
        assumptions=assumptions(setting),
        cost=Cost(
            evaluations=measured.evaluations,
            seconds=round(seconds, 3),
            evaluations_per_second=round(measured.evaluations / seconds, 1),
            peak_memory_bytes=peak_memory_bytes(setting.model.device),
        ),
        inputs=[InputFile(path=path, sha256=digest) for path, digest in setting.files],
        environment=describe(setting.model.device),
        spec=spec.model_dump(mode="json"),
    )


def _captured(setting: Setting, measured: Measurements) -> Captured:
    reasons = {}
    if setting.truth is None:
        reasons["truth"] = "the auditor does not hold the private image (evidence.truth)"
    elif setting.captured_trial() is None:
        reasons["rank"] = (
            f"{setting.reference.source} has fewer than {setting.spec.evidence.candidates - 1} "
            f"images of class {setting.label}"
        )
    if measured.captured is None:
        reasons["reconstructions"] = f"the audit was cut short during {measured.stage}"
    inferred = setting.spec.capture.labels == "infer"
    return Captured(
        labels=[setting.label],
        label_method="inferred from the last layer's gradient" if inferred else "declared",
        norm=float(norm(setting.observed)),
        truth=None if setting.truth is None else png_uri(setting.truth),
        reconstructions=[
            _reconstruction(measured.captured, setting).model_copy(
                update={
                    "rank": measured.rank,
                    "matching_rank": measured.matching_rank,
                    "candidates": measured.candidates,
                }
            )
        ]
        if measured.captured
        else [],
        null=_reconstruction(measured.captured_null, setting) if measured.captured_null else None,
        not_measured=reasons,
    )


def _reconstruction(found: Reconstructed, setting: Setting) -> Reconstruction:
    every = -(-len(found.curve) // LONGEST_CURVE)
    curve = found.curve[::every]
    if curve[-1] != found.curve[-1]:
        curve.append(found.curve[-1])
    metrics = None
    if setting.truth is not None:
        metrics = compare(found.image, setting.truth, setting.model, setting.lpips)
    return Reconstruction(
        image=png_uri(found.image), matching_loss=found.loss, curve=curve, metrics=metrics
    )


def _not_measured(setting: Setting, measured: Measurements) -> dict[str, str]:
    evidence = setting.spec.evidence
    cut = f"the audit was cut short during {measured.stage}" if measured.stage else ""
    no_matching = "evidence.matching_trials is 0" if evidence.matching_trials == 0 else cut
    no_trials = evidence.reconstruction_trials == 0
    no_reconstruction = "evidence.reconstruction_trials is 0" if no_trials else cut
    no_control = "evidence.control_trials is 0" if evidence.control_trials == 0 else cut
    no_head = "" if setting.model.head else "the model has no linear head"
    raw = setting.spec.capture.stage == "raw" and setting.defense.steps
    reasons = {
        "ceiling": measured.ceiling is None and no_matching,
        "floor": measured.floor is None and no_reconstruction,
        "label": measured.label is None and (no_head or no_matching),
        "controls.null": measured.null is None and no_reconstruction,
        "controls.undefended": measured.undefended is None and (no_reconstruction or no_control),
        "controls.undefended_matching": measured.matching_control is None and no_matching,
        "guarantee": setting.defense.guarantee() is None
        and "the declared defense gives no differential privacy: that takes a clip of the whole "
        "gradient and Gaussian noise after it",
        "checks": raw and "the tool applied the defense itself (capture.stage is raw)",
    }
    return {part: reason for part, reason in reasons.items() if reason}
