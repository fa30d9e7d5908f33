"""The audit: from what was declared to what can be said, in the order of a method section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ggl_audit.attacks.suite import choose_attacks
from ggl_audit.basics.clock import Clock
from ggl_audit.basics.environment import peak_memory_bytes
from ggl_audit.basics.plugins import with_packages
from ggl_audit.case.case import Case
from ggl_audit.case.input_files import own_code
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import InputError
from ggl_audit.experiments.candidate_matching import CandidateMatching, UndefendedMatching
from ggl_audit.experiments.capture import CaptureAttack
from ggl_audit.experiments.cause import OtherDeclaration, OtherLayout
from ggl_audit.experiments.conduct import Progress, conduct
from ggl_audit.experiments.experiment import Experiment, Result
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.experiments.label import Label
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.ledger_file import (
    Header,
    header_of,
    open_ledger,
    read_declared,
    read_outcomes,
)
from ggl_audit.experiments.membership import Membership
from ggl_audit.experiments.noise import Noise
from ggl_audit.experiments.promise import Promise
from ggl_audit.experiments.reconstruction import Reconstruction, UndefendedReconstruction
from ggl_audit.experiments.schedule import InThisProcess
from ggl_audit.experiments.workers import Workers
from ggl_audit.judgement.declared import Declared, declare
from ggl_audit.judgement.unmeasured import unfinished
from ggl_audit.messages import Message
from ggl_audit.report.assembly import assemble
from ggl_audit.report.declaration import check_inputs, declared_in
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec

EXPERIMENTS: tuple[type[Experiment[Result]], ...] = (
    CandidateMatching,
    UndefendedMatching,
    Label,
    Membership,
    Noise,
    Promise,
    CaptureAttack,
    Reconstruction,
    OtherDeclaration,
    OtherLayout,
    UndefendedReconstruction,
)

NO_DECLARATION = Message(
    "ledger/no-declaration",
    "line 2 is no declaration",
    "The ledger is of another version of this program.",
    advice="The file was changed, or is of another version: begin another one.",
)


def run_audit(
    spec: Spec,
    progress: Progress,
    clock: Clock | None = None,
    *,
    ledger: Path | None = None,
    workers: int = 1,
) -> Report:
    """Audits a captured gradient.

    An interrupt (Ctrl-C) ends the audit early: what was measured until then is graded, but never as
    a pass. A time limit leaves each experiment the trials that fit, and is graded for these.

    Args:
        spec: what was declared.
        progress: shown how far it is.
        clock: of the spec's time limit, if it runs already.
        ledger: the file that outcomes go into, and from which it goes on; none unless given.
        workers: processes of one thread each; with one, this process does all by itself.

    Raises:
        AuditError: something that the spec names is missing, broken, or does not fit the rest.
    """
    return _audited(spec, progress, clock or Clock(spec.time_limit), ledger, workers)


def _audited(
    spec: Spec,
    progress: Progress,
    clock: Clock,
    ledger: Path | None,
    workers: int,
    refuse: Callable[[Case], None] = lambda case: None,
) -> Report:
    """Audits a case, unless it is refused once it is prepared."""
    with ExitStack() as stack:
        # They load the case while this process does.
        others = _started(stack, workers, spec, progress, clock)
        case = prepare(spec)
        refuse(case)
        experiments = plan_experiments(case)
        declared = declare(case, experiments[0].suite, experiments)
        schedule = others or InThisProcess(by_name(experiments), progress.advance, clock)
        written, said = _opened(stack, ledger, declared, experiments)
        progress.start(planned_evaluations(declared.plans))
        progress.advance(written.evaluations)
        for sentence in (*case.remarks, *said):
            progress.say(sentence)
        cut_short = conduct(experiments, declared.plans, written, schedule, progress, clock)
    memory = peak_memory_bytes(case.model.device)
    return assemble(declared, written, clock.seconds, memory, cut_short)


def run_again(
    report: Report,
    folders: Sequence[Path],
    progress: Progress,
    *,
    ledger: Path | None = None,
    workers: int = 1,
) -> Report:
    """Runs the audit of a report again, on the same files.

    Args:
        report: whose declaration and inputs are taken.
        folders: where the files may be; the first that has the captured gradient counts.
        progress: shown how far it is.
        ledger: the file that outcomes go into; none unless given.
        workers: processes of one thread each.

    Raises:
        AuditError: the declaration is of another version, or a file is missing or another one.
    """
    spec = declared_in(report, folders)
    for path in own_code(spec):
        progress.say(f"runs {path}, as the report declares")

    def refuse(case: Case) -> None:
        check_inputs(report, dict(case.files))

    return _audited(spec, progress, Clock(spec.time_limit), ledger, workers, refuse)


def judge_ledger(path: Path) -> Report:
    """Judges what is in a ledger, without the model and without any computation.

    Raises:
        InputError: it is no ledger, or one of another version.
    """
    header, declaration, lines = read_declared(path)
    try:
        declared = Declared.model_validate_json(declaration)
        if _header_of(declared) != header:
            raise ValueError("of another audit")
    except ValueError:
        raise InputError(path, NO_DECLARATION()) from None
    results = {kind.name: kind.result for kind in known_experiments()}
    outcomes = read_outcomes(path, lines, results, declared.plans)
    ledger = Ledger(outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return assemble(declared, ledger, seconds, cut_short=unfinished(declared, ledger))


def plan_experiments(case: Case) -> list[Experiment[Result]]:
    """The experiments on a case, in the order in which they are begun; those of packages last."""
    suite = choose_attacks(case)
    return [kind(case, suite) for kind in known_experiments()]


def known_experiments() -> list[type[Experiment[Result]]]:
    """All experiments, those of packages last."""
    return [*with_packages("experiments", {one.name: one for one in EXPERIMENTS}).values()]


def by_name(experiments: Sequence[Experiment[Result]]) -> dict[str, Experiment[Result]]:
    """Experiments by their names."""
    return {one.name: one for one in experiments}


def load_experiments(spec: Spec) -> dict[str, Experiment[Result]]:
    """What a worker works with."""
    return by_name(plan_experiments(prepare(spec)))


def _started(
    stack: ExitStack, workers: int, spec: Spec, progress: Progress, clock: Clock
) -> Workers | None:
    if workers == 1:
        return None
    told = progress.advance, progress.say
    return stack.enter_context(Workers(load_experiments, spec, workers, *told, clock))


def _header_of(declared: Declared) -> Header:
    digests = {file.path: file.sha256 for file in declared.inputs}
    return header_of(declared.version, declared.environment, declared.spec, digests)


def _opened(
    stack: ExitStack,
    path: Path | None,
    declared: Declared,
    experiments: Sequence[Experiment[Result]],
) -> tuple[Ledger, list[str]]:
    """The ledger, in memory unless it has a file, and what there is to say of that."""
    if path is None:
        return Ledger(), []
    header = _header_of(declared)
    results = {one.name: one.result for one in experiments}
    return stack.enter_context(open_ledger(path, header, declared, results, declared.plans))
