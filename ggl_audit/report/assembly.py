"""Writes a report of what was declared, what came out of the trials, and what it amounts to."""

from __future__ import annotations

from collections.abc import Sequence

from ggl_audit.attacks.attack import Curve
from ggl_audit.evidence.bounds import empirical_mu
from ggl_audit.experiments.capture import SEARCHES_COMPARED, Attacked, Picture
from ggl_audit.experiments.experiment import NotMeasured
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.judgement.declared import Declared, DeclaredCapture
from ggl_audit.judgement.judge import Judgement, judge
from ggl_audit.judgement.measured import Measured, MeasuredCapture
from ggl_audit.report.model import (
    Agreement,
    Attack,
    Captured,
    CheckedStep,
    Controls,
    Cost,
    EvidenceReport,
    Experiment,
    Reconstruction,
    Report,
    Tool,
)

NOT_CALLED_FOR = "what the other experiments gave does not call for it"


def assemble(
    declared: Declared,
    ledger: Ledger,
    seconds: float,
    peak_memory_bytes: int | None = None,
    cut_short: str | None = None,
) -> Report:
    """Judges what is in a ledger and writes it down.

    Args:
        declared: what was known before the first trial.
        ledger: what came out of the trials.
        seconds: that the audit took.
        peak_memory_bytes: the most memory that it held; None where that is not known.
        cut_short: what was running when it was cut short, or None.
    """
    judgement = judge(declared, ledger, cut_short)
    measured = judgement.measured
    captured, *others = (
        _captured(declared, capture, found, judgement, cut_short)
        for capture, found in zip(declared.captures, measured.captures, strict=True)
    )
    evaluations = ledger.evaluations
    return Report(
        tool=Tool(version=declared.version),
        verdict=judgement.verdict,
        captured=captured,
        others=others,
        evidence=_evidence(declared, judgement),
        findings=judgement.findings,
        assumptions=declared.assumptions.of(measured.captures[0].likeness),
        experiments=_experiments(declared, ledger),
        cost=Cost(
            evaluations=evaluations,
            seconds=round(seconds, 3),
            evaluations_per_second=round(evaluations / seconds, 1) if seconds else None,
            peak_memory_bytes=peak_memory_bytes,
        ),
        inputs=declared.inputs,
        environment=declared.environment,
        spec=declared.spec,
        declaration=declared.declaration,
    )


def _evidence(declared: Declared, judgement: Judgement) -> EvidenceReport:
    measured = judgement.measured
    tried = (measured.ceiling, measured.promise, measured.label_ceiling)
    rates = [rate for rate in tried if rate is not None]
    return EvidenceReport(
        floor=judgement.floor.get(declared.evidence.distance),
        floor_distance=declared.evidence.distance,
        floor_by_distance=judgement.floor,
        attack=measured.attack,
        attacks=_attacks(declared, measured),
        ceiling=measured.ceiling,
        label=measured.label,
        label_ceiling=measured.label_ceiling,
        label_classifier=measured.label_classifier,
        controls=Controls(
            null=measured.nulls.get(measured.attack),
            undefended=measured.undefended,
            undefended_matching=measured.undefended_matching,
        ),
        membership=measured.membership,
        promise=measured.promise,
        noise=measured.noise,
        guarantee=declared.guarantee,
        empirical_mu=max(map(empirical_mu, rates), default=None),
        checks=[
            CheckedStep(
                code=check.said.code, step=check.step, outcome=check.outcome, detail=check.detail
            )
            for check in declared.checks
        ],
        not_measured=judgement.not_measured,
    )


def _attacks(declared: Declared, measured: Measured) -> list[Attack]:
    distance = declared.evidence.distance
    return [
        Attack(
            name=one.name,
            source=one.source,
            floor=measured.floors.get(one.name, {}).get(distance),
            null=measured.nulls.get(one.name),
            not_measured=one.not_made,
        )
        for one in declared.attacks
    ]


def _experiments(declared: Declared, ledger: Ledger) -> list[Experiment]:
    found = []
    for name, plan in declared.plans.items():
        stage = declared.stages[name]
        if isinstance(plan, NotMeasured):
            found.append(Experiment(name=name, stage=stage, not_measured=plan.reason))
            continue
        outcomes = ledger.of(name)
        if plan.optional and not outcomes:
            found.append(Experiment(name=name, stage=stage, not_measured=NOT_CALLED_FOR))
            continue
        found.append(
            Experiment(
                name=name,
                stage=stage,
                planned=plan.trials,
                trials=len(outcomes),
                evaluations=sum(one.evaluations for one in outcomes),
                seconds=round(sum(one.seconds for one in outcomes), 3),
                said=ledger.said(name),
            )
        )
    return found


def _captured(
    declared: Declared,
    capture: DeclaredCapture,
    found: MeasuredCapture,
    judgement: Judgement,
    cut_short: str | None,
) -> Captured:
    attacked, likeness = found.attacked, found.likeness
    reasons = dict(capture.not_measured)
    late = f"the audit was cut short during {cut_short}" if cut_short else "there was no time left"
    if attacked is None:
        reasons |= {"reconstructions": late, "agreement": late}
    if likeness is None:
        no_trials = declared.evidence.reconstruction_trials == 0
        reasons["likeness"] = "evidence.reconstruction_trials is 0" if no_trials else late
    # Of a round all captures show the same attack, where canaries tell which is the strongest.
    attack = judgement.measured.attack
    if not judgement.measured.floors and attacked is not None:
        attack = attacked.nearest
    return Captured(
        file=capture.file,
        appearance=capture.appearance,
        labels=capture.labels,
        label_method=capture.label_method,
        norm=capture.norm,
        truths=capture.truths,
        attack=attack,
        reconstructions=[] if attacked is None else _shown(declared, capture, attacked, attack),
        nulls=[] if attacked is None else _nulls(capture, attacked, attack),
        by_attack={}
        if attacked is None
        else {name: [one.image for one in own] for name, own in attacked.pictures.items()},
        agreement=None
        if attacked is None
        else Agreement(
            searches=SEARCHES_COMPARED,
            psnr_db=attacked.agreement_db,
            null_psnr_db=attacked.null_agreement_db,
        ),
        loss_place=found.loss_place,
        likeness=likeness,
        not_measured=reasons,
    )


def _shown(
    declared: Declared, capture: DeclaredCapture, attacked: Attacked, attack: str
) -> list[Reconstruction]:
    """The pictures of an attack, with the rank of the private image that each is compared with."""
    pictures = _reconstructions(
        capture, attacked.pictures[attack], attacked.loss[attack], attacked.curve
    )
    ranks = (attacked.ranks.get(attack), attacked.matching_ranks)
    shown = []
    for one in pictures:
        if one.truth is None:
            shown.append(one)
            continue
        rank, matching_rank = (None if not own else own[one.truth] for own in ranks)
        ranked = rank is not None or matching_rank is not None
        found = {
            "rank": rank,
            "matching_rank": matching_rank,
            "candidates": declared.evidence.candidates if ranked else None,
        }
        shown.append(one.model_copy(update=found))
    return shown


def _nulls(capture: DeclaredCapture, attacked: Attacked, attack: str) -> list[Reconstruction]:
    return _reconstructions(
        capture, attacked.null_pictures[attack], attacked.null_loss[attack], attacked.null_curve
    )


def _reconstructions(
    capture: DeclaredCapture, pictures: Sequence[Picture], loss: float, curve: Curve
) -> list[Reconstruction]:
    """The pictures, in the order of the truths where these are held."""
    labelled = zip(pictures, capture.labels, strict=True)
    return [
        Reconstruction(
            image=one.image,
            label=label,
            matching_loss=loss,
            curve=curve,
            truth=one.truth,
            metrics=one.metrics,
        )
        for one, label in sorted(labelled, key=lambda pair: pair[0].truth or 0)
    ]
