"""The audit: from what was declared to what can be said, in the order of a method section."""

from __future__ import annotations

from ggl_audit.attacks.suite import choose_attacks
from ggl_audit.basics.clock import Clock
from ggl_audit.basics.environment import peak_memory_bytes
from ggl_audit.basics.plugins import added_by_packages
from ggl_audit.case.setting import Setting, prepare
from ggl_audit.experiments.candidate_matching import CandidateMatching, UndefendedMatching
from ggl_audit.experiments.capture import CaptureAttack
from ggl_audit.experiments.cause import OtherDeclaration, OtherLayout
from ggl_audit.experiments.conduct import Progress, conduct
from ggl_audit.experiments.experiment import Experiment, Plan, Result
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.membership import Membership
from ggl_audit.experiments.noise import Noise
from ggl_audit.experiments.promise import Promise
from ggl_audit.experiments.reconstruction import Reconstruction, UndefendedReconstruction
from ggl_audit.experiments.schedule import InThisProcess
from ggl_audit.judgement.declared import declare
from ggl_audit.report.assembly import assemble
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec

EXPERIMENTS: tuple[type[Experiment[Result]], ...] = (
    CandidateMatching,
    UndefendedMatching,
    Membership,
    Noise,
    Promise,
    CaptureAttack,
    Reconstruction,
    OtherDeclaration,
    OtherLayout,
    UndefendedReconstruction,
)


def run_audit(spec: Spec, progress: Progress, clock: Clock | None = None) -> Report:
    """Audits a captured gradient.

    An interrupt (Ctrl-C) ends the audit early: what was measured until then is graded, but never as
    a pass. A time limit leaves each experiment the trials that fit, and is graded for these.

    Args:
        spec: what was declared.
        progress: shown how far it is.
        clock: of the spec's time limit, if it runs already.

    Raises:
        AuditError: something that the spec names is missing, broken, or does not fit the rest.
    """
    clock = clock or Clock(spec.time_limit)
    case = prepare(spec)
    experiments = plan_experiments(case)
    declared = declare(case, experiments[0].suite, experiments)
    ledger = Ledger()
    schedule = InThisProcess({one.name: one for one in experiments}, progress.advance, clock)
    plans = declared.plans
    progress.start(sum(one.evaluations for one in plans.values() if isinstance(one, Plan)))
    cut_short = conduct(experiments, plans, ledger, schedule, progress, clock)
    memory = peak_memory_bytes(case.model.device)
    return assemble(declared, ledger, clock.seconds, memory, cut_short)


def plan_experiments(case: Setting) -> list[Experiment[Result]]:
    """The experiments on a case, in the order in which they are begun; those of packages last."""
    suite = choose_attacks(case)
    kinds = [*EXPERIMENTS, *added_by_packages("experiments").values()]
    return [kind(case, suite) for kind in kinds]
