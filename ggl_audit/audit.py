"""The audit: from what was declared to what can be said, in the order of a method section."""

from __future__ import annotations

from typing import Protocol

from ggl_audit.basics.clock import Clock
from ggl_audit.case.setting import prepare
from ggl_audit.experiments.attacks import choose_attacks
from ggl_audit.experiments.candidate_matching import match_candidates
from ggl_audit.experiments.capture import attack_capture
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.experiments.measurements import Measurements
from ggl_audit.experiments.membership import MEMBERSHIP_TRIALS, identify_members
from ggl_audit.experiments.noise import try_noise
from ggl_audit.experiments.promise import try_promise
from ggl_audit.experiments.reconstruction import reconstruct, reconstruct_undefended
from ggl_audit.report.assembly import assemble
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec


class Progress(Protocol):
    """Shown how far an audit is, in evaluated candidates."""

    def start(self, evaluations: int) -> None:
        """The audit begins; it will evaluate this many candidates."""
        ...

    def stage(self, name: str) -> None:
        """A part of the audit begins."""
        ...

    def advance(self, evaluations: int) -> None:
        """This many candidates were evaluated."""
        ...


def run_audit(spec: Spec, progress: Progress, clock: Clock | None = None) -> Report:
    """Audits a captured gradient.

    An interrupt (Ctrl-C) ends the audit early, with a report of what was measured until then, which
    says so and is graded inconclusive. A time limit leaves each experiment the trials that fit, and
    is graded for these.

    Args:
        spec: what was declared.
        progress: shown how far it is.
        clock: of the spec's time limit, if it runs already.

    Raises:
        AuditError: something that the spec names is missing, broken, or does not fit the rest.
    """
    clock = clock or Clock(spec.time_limit)
    setting = prepare(spec)
    evidence = spec.evidence
    suite = choose_attacks(setting)
    others = [Measurements(clock=clock, suite=suite) for _ in setting.others]
    measured = Measurements(clock=clock, suite=suite, others=others)

    def begin(stage: str) -> None:
        measured.stage = stage
        progress.stage(stage)

    def advance(evaluations: int) -> None:
        measured.evaluations += evaluations
        progress.advance(evaluations)
        clock.check()

    try:
        progress.start(planned_evaluations(setting, suite))
        trials = setting.trials()
        canaries = trials.first(evidence.reconstruction_trials)

        begin("candidate matching")
        match_candidates(setting, trials.first(evidence.matching_trials), measured, advance)

        begin("membership")
        identify_members(setting, trials.first(MEMBERSHIP_TRIALS), measured, advance)

        begin("the test of the noise")
        try_noise(setting, measured, advance)

        begin("the test of the promise")
        try_promise(setting, evidence.matching_trials, measured, advance)

        begin("the attack on the capture")
        attack_capture(setting, measured, advance)
        for other, its in zip(setting.others, measured.others, strict=True):
            attack_capture(other, its, advance)

        begin("reconstruction and the null control")
        reconstruct(setting, canaries, measured, advance)

        begin("the undefended control")
        controls = canaries.first(evidence.control_trials)
        if clock.reaches(measured.seconds_each * len(controls)):
            reconstruct_undefended(setting, controls, measured, advance)
        measured.stage = None
    except KeyboardInterrupt:
        pass  # measured.stage says what was cut short
    return assemble(setting, measured, clock.seconds)
