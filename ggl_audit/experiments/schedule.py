"""Who runs the trials: this process, one group after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ggl_audit.attacks.attack import Advance
from ggl_audit.basics.clock import Clock
from ggl_audit.experiments.experiment import Experiment, Group, Result, Wanted
from ggl_audit.experiments.ledger import Outcome

Outcomes = list[Outcome]


class Schedule(Protocol):
    """Hands groups of trials out, and takes what comes of them."""

    def run(self, groups: Sequence[Group], wanted: Wanted) -> Iterator[tuple[Group, Outcomes]]:
        """Runs groups, in any order and anywhere.

        Args:
            groups: each of which is begun at most once, in their order.
            wanted: asked right before a group is begun; what is not wanted is left out.

        Yields:
            Each group with the outcomes of its trials, as it is done.

        Raises:
            KeyboardInterrupt: interrupted, or the time is up.
        """
        ...


class InThisProcess:
    """Runs one group after the other.

    Args:
        experiments: by name.
        advance: told of the candidates that are evaluated.
        clock: ends what is running when the time is up.
    """

    def __init__(
        self, experiments: Mapping[str, Experiment[Result]], advance: Advance, clock: Clock
    ) -> None:
        self._experiments = experiments
        self._advance = advance
        self._clock = clock

    def run(self, groups: Sequence[Group], wanted: Wanted) -> Iterator[tuple[Group, Outcomes]]:
        """Runs groups in their order."""
        for group in groups:
            if wanted(group):
                experiment = self._experiments[group.experiment]
                yield group, run_group(experiment, group, self._timed, self._clock)

    def _timed(self, evaluations: int) -> None:
        self._advance(evaluations)
        self._clock.check()


def run_group(
    experiment: Experiment[Result], group: Group, advance: Advance, clock: Clock
) -> Outcomes:
    """Runs the trials of a group, and shares out among them what they took together.

    Args:
        experiment: whose trials they are.
        group: their numbers.
        advance: told of the candidates that are evaluated.
        clock: takes the time.
    """
    began, spent = clock.seconds, 0

    def counted(evaluations: int) -> None:
        nonlocal spent
        spent += evaluations
        advance(evaluations)

    results = list(experiment.run(group.trials, counted))
    count, seconds = len(group.trials), clock.seconds - began
    return [
        Outcome(
            experiment=group.experiment,
            trial=trial,
            evaluations=spent // count + (place < spent % count),
            seconds=seconds / count,
            result=result,
        )
        for place, (trial, result) in enumerate(zip(group.trials, results, strict=True))
    ]
