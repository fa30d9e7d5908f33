"""Conducts the experiments of an audit: every outcome goes into the ledger, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from ggl_audit.basics.clock import Clock, OutOfTimeError
from ggl_audit.experiments.experiment import Experiment, Group, NotMeasured, Plan, Result
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.schedule import Outcomes, Schedule

LAST_SHARE = 0.25
"""More time than trials took that the next ones, and what follows them, may take."""


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

    def say(self, sentence: str) -> None:
        """Something happened that a user should know of."""
        ...


def conduct(
    experiments: Sequence[Experiment[Result]],
    plans: Mapping[str, Plan | NotMeasured],
    ledger: Ledger,
    schedule: Schedule,
    progress: Progress,
    clock: Clock,
) -> str | None:
    """Runs what is planned and not in the ledger yet, as far as the time goes.

    Args:
        experiments: in the order in which they are begun.
        plans: of each, by name.
        ledger: is added to.
        schedule: who runs the trials.
        progress: told of the stages.
        clock: of the time limit.

    Returns:
        The stage in which the audit was cut short, by an interrupt or before the time had let
        anything of it be measured; None where it was not.
    """
    made = {name: plan for name, plan in plans.items() if isinstance(plan, Plan)}
    by_name = {one.name: one for one in experiments}
    conducted = _Conducted(by_name, made, ledger, progress, clock)
    groups = [
        Group(name, trials) for name in by_name if name in made for trials in made[name].groups()
    ]
    left = [group for group in groups if not ledger.holds(group)]
    try:
        # What depends on all that was measured before is only begun when that is there.
        for _, together in itertools.groupby(left, conducted.wave):
            for group, outcomes in schedule.run(list(together), conducted.is_wanted):
                conducted.add(group, outcomes)
    except OutOfTimeError:
        return conducted.stage if conducted.lacks_what_runs() else None
    except KeyboardInterrupt:
        return conducted.stage
    return None


class _Conducted:
    """What is running, and what of it can be added to the ledger.

    Where trials may end early they are added in their order, so that the ledger is the same whoever
    ran them; elsewhere as they are done.
    """

    def __init__(
        self,
        experiments: Mapping[str, Experiment[Result]],
        plans: Mapping[str, Plan],
        ledger: Ledger,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._experiments = experiments
        self._plans = plans
        self._ledger = ledger
        self._progress = progress
        self._clock = clock
        self._begun: list[Group] = []
        self._done: dict[Group, Outcomes] = {}
        self._shown = ""

    @property
    def running(self) -> str:
        """The experiment whose trials have been running for longest; empty before the first."""
        return self._begun[0].experiment if self._begun else ""

    @property
    def stage(self) -> str:
        """What is going on, in words."""
        return self._experiments[self.running].stage if self.running else "preparation"

    def lacks_what_runs(self) -> bool:
        """Whether a verdict needs what is running, and has nothing of it."""
        experiment = self._experiments[self.running]
        return not self._ledger.of(self.running) and not experiment.explains

    def wave(self, group: Group) -> int:
        """How many experiments up to a group's have to wait for all that comes before them."""
        names = list(self._experiments)
        upto = names[: names.index(group.experiment) + 1]
        return sum(self._experiments[name].waits for name in upto)

    def is_wanted(self, group: Group) -> bool:
        """Whether a group is worth its time, and there is time for it; then it has begun."""
        experiment, clock = self._experiments[group.experiment], self._clock
        if not experiment.is_wanted(group.trials, self._ledger):
            return False
        if self._ledger.of(group.experiment) and clock.used(experiment.share):
            return False
        seconds = self._ledger.seconds_each(group.experiment)
        if seconds is None and experiment.as_long_as:
            seconds = self._ledger.seconds_each(experiment.as_long_as)
        needed = (1 + LAST_SHARE) * (seconds or 0.0) * len(group.trials)
        if seconds is not None and not clock.reaches(needed):
            return False
        self._begun.append(group)
        if experiment.stage != self._shown:
            self._shown = experiment.stage
            self._progress.stage(experiment.stage)
        return True

    def add(self, group: Group, outcomes: Outcomes) -> None:
        """Takes what came out of a group."""
        if not self._plans[group.experiment].at_most:
            self._begun.remove(group)
            self._ledger.add(outcomes)
            return
        self._done[group] = outcomes
        for waiting in [one for one in self._begun if one.experiment == group.experiment]:
            if waiting not in self._done:
                break
            self._begun.remove(waiting)
            found = self._done.pop(waiting)
            if self._experiments[waiting.experiment].is_wanted(waiting.trials, self._ledger):
                self._ledger.add(found)
