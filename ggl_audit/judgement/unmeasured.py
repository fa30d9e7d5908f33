"""Why something was not measured, in words that can follow "not measured:"."""

from __future__ import annotations

from ggl_audit.experiments import candidate_matching, reconstruction
from ggl_audit.experiments.candidate_matching import CandidateMatching, UndefendedMatching
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.label import Label
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.membership import Membership
from ggl_audit.experiments.noise import Noise
from ggl_audit.experiments.promise import Promise
from ggl_audit.experiments.reconstruction import Reconstruction, UndefendedReconstruction
from ggl_audit.judgement.declared import Declared
from ggl_audit.judgement.measured import Measured

HIDDEN = "the rounding of the gradient hides the noise"
LATE = "the time limit left none for it"


def why_unmeasured(
    declared: Declared, ledger: Ledger, measured: Measured, cut_short: str | None
) -> dict[str, str]:
    """The reason for each part of the evidence that is lacking, by its name in the report.

    Args:
        declared: what was known before the first trial.
        ledger: what came out of the trials.
        measured: what that adds up to.
        cut_short: what was running when the audit was cut short, or None.
    """
    late = f"the audit was cut short during {cut_short}" if cut_short else LATE

    def reason(experiment: type[Experiment[Result]]) -> str:
        plan = declared.plans[experiment.name]
        return plan.reason if isinstance(plan, NotMeasured) else late

    controls = UndefendedReconstruction if declared.is_defended else Reconstruction
    no_control = declared.evidence.control_trials == 0 and not declared.is_defended
    wanted: dict[str, tuple[object, type[Experiment[Result]]]] = {
        "ceiling": (measured.ceiling, CandidateMatching),
        "floor": (measured.floors, Reconstruction),
        "label_ceiling": (measured.label_ceiling, Label),
        "membership": (measured.membership, Membership),
        "promise": (measured.promise, Promise),
        "noise": (measured.noise, Noise),
        "controls.null": (measured.nulls, Reconstruction),
        "controls.undefended": (measured.undefended, controls),
        "controls.undefended_matching": (
            measured.undefended_matching,
            UndefendedMatching if declared.is_defended else CandidateMatching,
        ),
    }
    reasons = {part: reason(kind) for part, (found, kind) in wanted.items() if not found}
    if "noise" in reasons and ledger.of(Noise.name):
        reasons["noise"] = HIDDEN
    if "controls.undefended" in reasons and no_control:
        reasons["controls.undefended"] = "evidence.control_trials is 0"
    if measured.label is None:
        planned = isinstance(declared.plans[Label.name], Plan)
        no_inference = declared.no_label_inference if planned else ""
        reasons["label"] = no_inference or reason(Label)
    return {**declared.not_measured, **reasons}


def lacking(declared: Declared, ledger: Ledger) -> list[str]:
    """The stages of which a pass takes something that there is not.

    That is a trial at least, or all where each is of something else, as of another capture.
    """
    return [
        declared.stages[name]
        for name, plan in declared.plans.items()
        if isinstance(plan, Plan)
        and name not in declared.explaining
        and len(ledger.of(name)) < (plan.trials if plan.each_counts else 1)
    ]


def unfinished(declared: Declared, ledger: Ledger) -> str | None:
    """The stage that a ledger breaks off in, or None where all that was planned is there."""
    hits = [one.hit for one in ledger.results(CandidateMatching)]
    done, evidence = ledger.results(Reconstruction), declared.evidence
    settled = {
        CandidateMatching.name: candidate_matching.is_settled(
            hits, declared.plans[CandidateMatching.name], evidence
        ),
        Reconstruction.name: reconstruction.are_settled(
            done, declared.plans[Reconstruction.name], evidence
        ),
    }
    for name, plan in declared.plans.items():
        if isinstance(plan, NotMeasured) or plan.optional or settled.get(name, False):
            continue
        if len(ledger.of(name)) < plan.trials:
            return declared.stages[name]
    return None
