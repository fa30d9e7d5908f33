"""Puts what was measured into a report, and says what it rests on."""

from __future__ import annotations

from dataclasses import replace

from ggl_audit import __version__
from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.basics.environment import describe, peak_memory_bytes
from ggl_audit.basics.gradient import norm
from ggl_audit.case.clients import OwnClient
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.assignment import assign
from ggl_audit.evidence.bounds import empirical_mu
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.fidelity import compare
from ggl_audit.evidence.grade import decide, doubts_about_ceiling
from ggl_audit.evidence.guarantee import largest_advantage
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.experiments.attacks import ATTACKS, GGL
from ggl_audit.experiments.capture import SEARCHES_COMPARED
from ggl_audit.experiments.measurements import Measurements, Reconstructed
from ggl_audit.experiments.membership import can_identify_members
from ggl_audit.experiments.noise import why_no_noise_test
from ggl_audit.judgement.findings import find, promise_is_broken
from ggl_audit.report.assumptions import assumptions
from ggl_audit.report.model import (
    Agreement,
    Attack,
    Captured,
    CheckedStep,
    Controls,
    Cost,
    EvidenceReport,
    InputFile,
    LossPlace,
    Reconstruction,
    Report,
    Tool,
    png_uri,
)

LONGEST_CURVE = 200
HIDDEN = "the rounding of the gradient hides the noise"


def assemble(setting: Setting, measured: Measurements, seconds: float) -> Report:
    """Grades what was measured and writes it down.

    Args:
        setting: what was handed in.
        measured: all of it, or what there was when the audit was interrupted.
        seconds: since the start.
    """
    spec = setting.spec
    attack = measured.strongest(setting.distance)
    floors = measured.floors.get(attack, {})
    floor = floors.get(setting.distance)
    proven = not setting.defense.randomness.is_random() and any(
        check.step == PRIVATE_IMAGE and check.outcome == "agrees" for check in setting.checks
    )
    checks = [
        *setting.checks,
        *(
            replace(check, step=f"{check.step} ({_file(other)})")
            for other in setting.others
            for check in other.checks
            if check.outcome == "contradicts"
        ),
    ]
    likenesses = [own.likeness for own in ([] if proven else [measured]) + measured.others]
    likeness = min(likenesses, key=_confidence, default=None)
    proven = proven and not setting.others
    fits = proven or (likeness is not None and likeness.rules_out_larger)
    bound = largest_advantage(setting.defense.sensitivity.guarantee(), 1 / spec.evidence.candidates)
    if setting.defense.clear.names:
        bound = 1.0  # no clip and no noise is on them
    rates = [rate for rate in (measured.ceiling, measured.promise) if rate is not None]
    not_measured = _not_measured(setting, measured)
    return Report(
        tool=Tool(version=__version__),
        verdict=decide(
            floor,
            measured.ceiling,
            checks,
            likeness,
            doubts_about_ceiling(
                measured.matching_control,
                checks,
                likeness,
                has_likelihood=setting.has_likelihood,
                bound_for_any_model=bound,
                fit_is_proven=proven,
                real_images=spec.evidence.reference is not None,
                promise_is_broken=promise_is_broken(
                    measured.ceiling, measured.promise, setting.guarantee
                ),
                about_the_client=setting.doubts,
                noise=measured.noise,
            ),
            measured.stage,
            spec.gate.fail_on,
            0.0 if fits else bound,
            measured.exact,
        ).beside(measured.label, not_measured.get("label", "")),
        captured=_captured(setting, measured, attack),
        others=[
            _captured(
                other,
                replace(own, stage=measured.stage),
                attack if measured.floors else own.nearest,
            )
            for other, own in zip(setting.others, measured.others, strict=True)
        ],
        evidence=EvidenceReport(
            floor=floor,
            floor_distance=setting.distance,
            floor_by_distance=floors,
            attack=attack,
            attacks=_attacks(setting, measured),
            ceiling=measured.ceiling,
            label=measured.label,
            controls=Controls(
                null=measured.nulls.get(attack),
                undefended=measured.undefended,
                undefended_matching=measured.matching_control,
            ),
            membership=measured.membership,
            promise=measured.promise,
            noise=measured.noise,
            guarantee=setting.guarantee,
            empirical_mu=max(map(empirical_mu, rates), default=None),
            checks=[
                CheckedStep(step=check.step, outcome=check.outcome, detail=check.detail)
                for check in checks
            ],
            not_measured=not_measured,
        ),
        findings=find(
            floor,
            measured.ceiling,
            measured.label,
            measured.undefended,
            checks,
            likeness,
            setting.guarantee,
            measured.promise,
            measured.membership,
            measured.noise,
            recovered=spec.capture.kind == "moments",
            members=setting.members,
            in_the_clear=setting.defense.clear.names,
            exact=measured.exact,
        ),
        assumptions=assumptions(setting, measured),
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


def _attacks(setting: Setting, measured: Measurements) -> list[Attack]:
    made = [
        Attack(
            name=name,
            source=ATTACKS[name],
            floor=measured.floors.get(name, {}).get(setting.distance),
            null=measured.nulls.get(name),
        )
        for name in measured.suite.names
    ]
    left_out = measured.suite.left_out.items()
    return made + [
        Attack(name=name, source=ATTACKS[name], not_measured=reason) for name, reason in left_out
    ]


def _captured(setting: Setting, measured: Measurements, attack: str) -> Captured:
    reasons = _no_ranks(setting)
    cut = f"the audit was cut short during {measured.stage}"
    if not measured.captured:
        reasons["reconstructions"] = cut
    if measured.agreement_db is None:
        reasons["agreement"] = cut
    if measured.likeness is None:
        no_trials = setting.spec.evidence.reconstruction_trials == 0
        reasons["likeness"] = "evidence.reconstruction_trials is 0" if no_trials else cut
    inferred = setting.spec.capture.labels == "infer"
    method = "inferred from the last layer's gradient" if inferred else "declared"
    rows = "" if setting.model.targets is None else "; a number stands for a row of targets"
    return Captured(
        file=_file(setting),
        appearance=setting.appearance,
        labels=setting.labels,
        label_method=f"{method}{rows}",
        norm=float(norm(setting.observed)),
        truths=[png_uri(truth) for truth in setting.truths],
        reconstructions=[
            shown
            if shown.truth is None
            else shown.model_copy(update=_ranks(measured, setting, shown.truth, attack))
            for shown in _reconstructions(measured.captured.get(attack), setting)
        ],
        nulls=_reconstructions(measured.captured_null.get(attack), setting),
        attack=attack,
        by_attack={
            name: [png_uri(image) for image in found.images]
            for name, found in measured.captured.items()
        },
        agreement=_agreement(measured),
        loss_place=_loss_place(measured),
        likeness=measured.likeness,
        not_measured=reasons,
    )


def _file(setting: Setting) -> str:
    capture = setting.spec.capture
    return str(capture.gradient or capture.after)


def _confidence(likeness: Likeness | None) -> int:
    """The least first: a release is no better than the capture that fits worst."""
    if likeness is None:
        return 3
    outcomes = ("unlike", "undecided", "hidden", "like")
    return 2 * outcomes.index(likeness.outcome) + likeness.rules_out_larger


def _no_ranks(setting: Setting) -> dict[str, str]:
    """Why the private images are not ranked, by what of them is lacking."""
    if len(setting.truths) == 0:
        of = "image" if setting.members == 1 else "images"
        return {"truths": f"the auditor does not hold the private {of} (evidence.truth)"}
    if setting.truth_labels is None:
        reasons = {
            "rank": "which label belongs to which private image is not known: declare "
            "capture.labels, in the order of evidence.truth"
        }
        checked = any(check.step == PRIVATE_IMAGE for check in setting.checks)
        if setting.defense.randomness.leaves_only_noise() and not checked:
            reasons["check"] = (
                "whether the capture is of the private images: it is not with the inferred labels "
                "in the order that fits best, and others were not tried"
            )
        return reasons
    reasons = {}
    if setting.defense.randomness.leaves_only_noise() and not any(
        check.step == PRIVATE_IMAGE for check in setting.checks
    ):
        reasons["check"] = (
            "whether the capture is of the private images: a declared step depends on the whole "
            "gradient, of which not all is sent"
        )
    lacking = [
        label
        for label, trial in zip(setting.truth_labels, setting.captured_trials(), strict=True)
        if trial is None
    ]
    if lacking:
        reasons["rank"] = (
            f"{setting.reference.source} has fewer than {setting.spec.evidence.candidates - 1} "
            f"images of class {lacking[0]}"
        )
    elif setting.prior_saw_truth:
        reasons["rank"] = (
            "the prior was trained on a private image itself, but not on the other candidates, "
            "so its rank by the reconstruction would be no evidence"
        )
    if not setting.matching().adds_up:
        reasons["matching_rank"] = (
            "what the images of a client give does not add up, so that their order may matter"
        )
    return reasons


def _ranks(
    measured: Measurements, setting: Setting, truth: int, attack: str
) -> dict[str, int | None]:
    rank, matching_rank = (
        ranks[truth] if ranks else None
        for ranks in (measured.ranks.get(attack), measured.matching_ranks)
    )
    ranked = rank is not None or matching_rank is not None
    candidates = setting.spec.evidence.candidates if ranked else None
    return {"rank": rank, "matching_rank": matching_rank, "candidates": candidates}


def _agreement(measured: Measurements) -> Agreement | None:
    if measured.agreement_db is None or measured.null_agreement_db is None:
        return None
    return Agreement(
        searches=SEARCHES_COMPARED,
        psnr_db=measured.agreement_db,
        null_psnr_db=measured.null_agreement_db,
    )


def _loss_place(measured: Measurements) -> LossPlace | None:
    if not measured.captured or not measured.canary_losses:
        return None
    loss = measured.captured[GGL].loss
    return LossPlace(
        canaries=len(measured.canary_losses),
        canaries_above=sum(other > loss for other in measured.canary_losses),
        nulls=len(measured.null_losses),
        nulls_above=sum(other > loss for other in measured.null_losses),
    )


def _reconstructions(found: Reconstructed | None, setting: Setting) -> list[Reconstruction]:
    """The pictures, in the order of the truths where these are held."""
    if found is None:
        return []
    every = -(-len(found.curve) // LONGEST_CURVE)
    curve = found.curve[::every]
    if curve[-1] != found.curve[-1]:
        curve.append(found.curve[-1])
    truths: list[int | None] = [None] * len(found.images)
    if len(setting.truths):
        distance = setting.distances[setting.distance]
        truths = [*assign(found.images, setting.truths, distance)]
    pictures = zip(found.images, setting.labels, truths, strict=True)
    return [
        Reconstruction(
            image=png_uri(image),
            label=label,
            matching_loss=found.loss,
            curve=curve,
            truth=truth,
            metrics=None
            if truth is None
            else compare(image, setting.truths[truth], setting.model, setting.lpips),
        )
        for image, label, truth in sorted(pictures, key=lambda picture: picture[2] or 0)
    ]


def _not_measured(setting: Setting, measured: Measurements) -> dict[str, str]:
    evidence = setting.spec.evidence
    cut = f"the audit was cut short during {measured.stage}" if measured.stage else ""
    no_matching = "evidence.matching_trials is 0" if evidence.matching_trials == 0 else cut
    no_trials = evidence.reconstruction_trials == 0
    no_reconstruction = "evidence.reconstruction_trials is 0" if no_trials else cut
    late = "the time limit left none for it"
    no_control = "evidence.control_trials is 0" if evidence.control_trials == 0 else cut or late
    no_label = why_not_inferred(setting.model, setting.members)
    if not no_label and setting.model.classes == 1:
        no_label = "there is one label only"
    applied = "the tool applied the defense itself (capture.stage is raw)"
    raw = applied if setting.spec.capture.stage == "raw" and setting.defense.steps else ""
    reasons = {
        "ceiling": "" if measured.ceiling else no_matching,
        "floor": "" if measured.floors else no_reconstruction,
        "label": "" if measured.label else no_label or no_matching,
        "membership": "" if measured.membership else _no_membership(setting) or no_matching,
        "promise": "" if measured.promise else _no_promise(setting) or no_matching,
        "noise": "" if measured.noise else why_no_noise_test(setting) or no_matching or HIDDEN,
        "controls.null": "" if measured.nulls else no_reconstruction,
        "controls.undefended": "" if measured.undefended else no_reconstruction or no_control,
        "controls.undefended_matching": "" if measured.matching_control else no_matching,
        "guarantee": "" if setting.guarantee else _no_guarantee(setting),
        "checks": raw,
    }
    return {part: reason for part, reason in reasons.items() if reason}


def _no_guarantee(setting: Setting) -> str:
    if setting.defense.sensitivity.guarantee() is not None:
        return (
            "a clip and noise are declared, but not whom they protect and how often: that takes "
            "guarantee: {unit, reduction, rounds, sampling_rate, delta}"
        )
    if not setting.defense.steps:
        return "no defense is declared"
    if not setting.defense.randomness.is_random():
        return (
            f"{setting.defense} is not random, and only randomness makes a gradient differentially "
            "private"
        )
    return (
        f"{setting.defense} is not differentially private: that takes a bound on the norm of the "
        "whole gradient and Gaussian noise after it"
    )


def _no_membership(setting: Setting) -> str:
    if setting.members == 1:
        return "a release is made of one image"
    if not can_identify_members(setting):
        return (
            "what single images contribute does not add up under this defense, or the reference "
            "set is too small to tell what the others contribute"
        )
    return ""


def _no_promise(setting: Setting) -> str:
    if setting.guarantee is None:
        return "no guarantee is declared"
    if not isinstance(setting.client, OwnClient):
        return (
            "the client's own code was not given (client.step), and this tool's own defense cannot "
            "break the promise"
        )
    return ""
