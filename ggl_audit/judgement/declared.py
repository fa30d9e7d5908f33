"""What is known of an audit before its first trial: the declaration, and what its checks have said.

With the ledger it is all that judgement and reports read, so that both can be had again from a file
without the model, and nothing is computed once the experiments are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ggl_audit import __version__
from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.attacks.suite import Suite
from ggl_audit.basics.environment import describe
from ggl_audit.basics.gradient import norm
from ggl_audit.case.appearance import appearance_of
from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case
from ggl_audit.defenses import Check
from ggl_audit.evidence.classifiers import FEWEST_IMAGES
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.guarantee import Guarantee, largest_advantage
from ggl_audit.evidence.public_labels import public_label_doubts
from ggl_audit.experiments import likeness
from ggl_audit.experiments.candidate_matching import has_likelihood
from ggl_audit.experiments.capture import captured_trials
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.label import Label
from ggl_audit.inputs.png_uri import PngUri, png_uri
from ggl_audit.judgement.assumptions import Assumptions, assumptions
from ggl_audit.messages import Said
from ggl_audit.spec import EvidenceSpec, GateSpec


class InputFile(BaseModel):
    """A file that the audit read, as it was named, and what it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str


class DeclaredCapture(BaseModel):
    """One captured gradient of the round.

    Attributes:
        file: as the spec names it.
        appearance: what it looks like, in sentences, where that can be told.
        labels: of its images, as inferred or declared.
        label_method: how they were found.
        norm: of the gradient, as it was observed.
        truths: the private images, where they are held.
        proven: whether these images are shown to give the capture.
        likeness: what it takes to place it among the canaries' gradients.
        not_measured: the reason for what is lacking in any case.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    appearance: list[str]
    labels: list[int]
    label_method: str
    norm: float
    truths: list[PngUri]
    proven: bool
    likeness: likeness.Premises
    not_measured: dict[str, str]


class DeclaredAttack(BaseModel):
    """An attack that is made, or why it is not.

    Attributes:
        name: as in reports.
        source: what it searches, and where it is from.
        not_made: why not; empty where it is.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    source: str
    not_made: str = ""


class Declared(BaseModel):
    """What is known before the first trial.

    Attributes:
        version: of this program.
        spec: as it was read, with its defaults.
        declaration: the same without them.
        evidence: the part of it that says how trials are counted.
        gate: the part of it that says what fails.
        inputs: the files that were read.
        environment: versions and device.
        captures: those of the round; the first is the one that is audited.
        checks: of the captures against the declared steps.
        doubts: why canaries may not stand for the capture.
        public_labels: what is wrong with the labels of the public images; none or one.
        guarantee: of the declared defense.
        bound_for_any_model: the largest advantage that a clip and noise leave to anybody.
        in_the_clear: running statistics that are sent and no step is over.
        is_defended: whether any step is declared.
        is_exact_moments: whether the gradient follows from what was captured, by arithmetic.
        has_likelihood: whether matching is by the likelihood under the declared noise.
        members: images of a release.
        classes: of the model.
        classes_left_out: how many of these have too few public images to be told apart.
        bound_for_label: the largest advantage that a clip and noise leave to anybody who tells the
            label.
        no_label_inference: why labels are not inferred from the last layer; empty where they are.
        attacks: those that are made, and those that are not.
        plans: of the experiments, by name.
        stages: what each does, in words.
        explaining: those that a pass does not rest on.
        assumptions: what is assumed and not measured.
        not_measured: the reason for what is lacking in any case.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    spec: dict[str, Any]
    declaration: dict[str, Any]
    evidence: EvidenceSpec
    gate: GateSpec
    inputs: list[InputFile]
    environment: dict[str, str]
    captures: list[DeclaredCapture]
    checks: list[Check]
    doubts: list[Said]
    public_labels: list[Said]
    guarantee: Guarantee | None
    bound_for_any_model: float
    in_the_clear: list[str]
    is_defended: bool
    is_exact_moments: bool
    has_likelihood: bool
    members: int
    classes: int
    classes_left_out: int
    bound_for_label: float
    no_label_inference: str
    attacks: list[DeclaredAttack]
    plans: dict[str, Plan | NotMeasured]
    stages: dict[str, str]
    explaining: list[str]
    assumptions: Assumptions
    not_measured: dict[str, str]


def declare(case: Case, suite: Suite, experiments: Sequence[Experiment[Result]]) -> Declared:
    """Puts down what is known of a case before its first trial."""
    spec = case.spec
    bound = largest_advantage(case.defense.sensitivity.guarantee(), 1 / spec.evidence.candidates)
    plans = {one.name: one.plan() for one in experiments}
    told = plans[Label.name]
    hidden = why_not_inferred(case.model, case.members)
    chance = told.chance if isinstance(told, Plan) else None
    made = [DeclaredAttack(name=one.name, source=one.source) for one in suite.attacks]
    not_made = [
        DeclaredAttack(name=kind.name, source=kind.source, not_made=reason)
        for kind, reason in suite.left_out
    ]
    applied = "the tool applied the defense itself (capture.stage is raw)"
    raw = spec.capture.stage == "raw" and case.defense.steps
    reasons = {
        "guarantee": "" if case.guarantee else _no_guarantee(case),
        "checks": applied if raw else "",
    }
    return Declared(
        version=__version__,
        spec=spec.model_dump(mode="json"),
        declaration=spec.model_dump(mode="json", exclude_unset=True),
        evidence=spec.evidence,
        gate=spec.gate,
        inputs=[InputFile(path=path, sha256=digest) for path, digest in case.files],
        environment=describe(case.model.device),
        captures=[_capture(case, one) for one in case.captures],
        checks=[
            *case.audited.checks,
            *(
                replace(check, step=f"{check.step} ({other.file})")
                for other in case.captures[1:]
                for check in other.checks
                if check.outcome == "contradicts"
            ),
        ],
        doubts=case.doubts,
        public_labels=_public_labels(case),
        guarantee=case.guarantee,
        # No clip and no noise is on what is sent in the clear.
        bound_for_any_model=1.0 if case.defense.clear.names else bound,
        in_the_clear=list(case.defense.clear.names),
        is_defended=bool(case.defense.steps),
        is_exact_moments=spec.capture.kind == "moments",
        has_likelihood=has_likelihood(case),
        members=case.members,
        classes=case.model.classes,
        classes_left_out=_classes_left_out(case),
        bound_for_label=_bound_for_label(case, chance),
        no_label_inference="" if hidden is None else hidden.text,
        attacks=[*made, *not_made],
        plans=plans,
        stages={one.name: one.stage for one in experiments},
        explaining=[one.name for one in experiments if one.explains],
        assumptions=assumptions(case, suite),
        not_measured={name: reason for name, reason in reasons.items() if reason},
    )


def _public_labels(case: Case) -> list[Said]:
    # Samples of a prior may have labels that it takes no notice of.
    if case.spec.evidence.reference is None:
        return []
    return public_label_doubts(case.model, case.reference, case.random("public labels"))


def _classes_left_out(case: Case) -> int:
    labels, classes = case.reference.labels, case.model.classes
    if case.model.targets is not None or labels.ndim != 1:
        return 0
    counts = torch.bincount(labels, minlength=classes)[:classes]
    return int((counts < FEWEST_IMAGES).sum())


def _bound_for_label(case: Case, chance: float | None) -> float:
    # The client's own code may break what is declared, and nothing is on what is in the clear.
    if chance is None or case.spec.client is not None or case.defense.clear.names:
        return 1.0
    return largest_advantage(case.defense.sensitivity.guarantee(), chance)


def _capture(case: Case, capture: Capture) -> DeclaredCapture:
    method = "inferred from the last layer's gradient" if capture.inferred else "declared"
    rows = "" if case.model.targets is None else "; a number stands for a row of targets"
    shown = any(c.step == PRIVATE_IMAGE and c.outcome == "agrees" for c in capture.checks)
    return DeclaredCapture(
        file=capture.file,
        appearance=appearance_of(case, capture),
        labels=capture.labels,
        label_method=f"{method}{rows}",
        norm=float(norm(capture.observed)),
        truths=[png_uri(truth) for truth in capture.truths],
        proven=shown and not case.defense.randomness.is_random(),
        likeness=likeness.premises_of(case, capture),
        not_measured=_no_ranks(case, capture),
    )


def _no_ranks(case: Case, capture: Capture) -> dict[str, str]:
    """Why the private images are not ranked, by what of them is lacking."""
    if len(capture.truths) == 0:
        of = "image" if case.members == 1 else "images"
        return {"truths": f"the auditor does not hold the private {of} (evidence.truth)"}
    if capture.truth_labels is None:
        reasons = {
            "rank": "which label belongs to which private image is not known: declare "
            "capture.labels, in the order of evidence.truth"
        }
        checked = any(check.step == PRIVATE_IMAGE for check in capture.checks)
        if case.defense.randomness.leaves_only_noise() and not checked:
            reasons["check"] = (
                "whether the capture is of the private images: it is not with the inferred labels "
                "in the order that fits best, and others were not tried"
            )
        return reasons
    reasons = {}
    if case.defense.randomness.leaves_only_noise() and not any(
        check.step == PRIVATE_IMAGE for check in capture.checks
    ):
        reasons["check"] = (
            "whether the capture is of the private images: a declared step depends on the whole "
            "gradient, of which not all is sent"
        )
    lacking = [
        label
        for label, trial in zip(capture.truth_labels, captured_trials(case, capture), strict=True)
        if trial is None
    ]
    if lacking:
        reasons["rank"] = (
            f"{case.reference.source} has fewer than {case.spec.evidence.candidates - 1} "
            f"images of class {lacking[0]}"
        )
    elif capture.prior_saw_truth:
        reasons["rank"] = (
            "the prior was trained on a private image itself, but not on the other candidates, "
            "so its rank by the reconstruction would be no evidence"
        )
    if not case.clients.adds_up:
        reasons["matching_rank"] = (
            "what the images of a client give does not add up, so that their order may matter"
        )
    return reasons


def _no_guarantee(case: Case) -> str:
    if case.defense.sensitivity.guarantee() is not None:
        return (
            "a clip and noise are declared, but not whom they protect and how often: that takes "
            "guarantee: {unit, reduction, rounds, sampling_rate, delta}"
        )
    if not case.defense.steps:
        return "no defense is declared"
    if not case.defense.randomness.is_random():
        return (
            f"{case.defense} is not random, and only randomness makes a gradient differentially "
            "private"
        )
    return (
        f"{case.defense} is not differentially private: that takes a bound on the norm of the "
        "whole gradient and Gaussian noise after it"
    )
