"""The ledger: what came out of each trial of an audit. It is only ever added to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from ggl_audit.experiments.experiment import Experiment, Group, Result

ResultOf = TypeVar("ResultOf", bound=Result)


class Outcome(BaseModel):
    """What came out of one trial, and what it took.

    Attributes:
        experiment: its name.
        trial: its number.
        evaluations: gradients of candidates, its share of its group's.
        seconds: likewise.
        result: what came out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    experiment: str
    trial: int
    evaluations: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    result: SerializeAsAny[Result]


class Ledger:
    """The outcomes of one audit: all that experiments write, and all that judgement reads.

    Args:
        outcomes: that there are already.
        keep: given the outcomes of a group before they count, to store them.
    """

    def __init__(
        self,
        outcomes: Iterable[Outcome] = (),
        keep: Callable[[Sequence[Outcome]], None] = lambda _: None,
    ) -> None:
        self._outcomes: dict[str, dict[int, Outcome]] = defaultdict(dict)
        self._keep = keep
        for outcome in outcomes:
            self._outcomes[outcome.experiment][outcome.trial] = outcome

    def of(self, experiment: str) -> list[Outcome]:
        """The outcomes of an experiment, in the order of their trials."""
        return [outcome for _, outcome in sorted(self._outcomes[experiment].items())]

    def results(self, experiment: type[Experiment[ResultOf]]) -> list[ResultOf]:
        """What came out of an experiment's trials, in their order."""
        return [outcome.result for outcome in self.of(experiment.name)]  # type: ignore[misc]

    def by_trial(self, experiment: type[Experiment[ResultOf]]) -> dict[int, ResultOf]:
        """What came out of an experiment's trials, by their numbers."""
        outcomes = self._outcomes[experiment.name]
        return {trial: outcome.result for trial, outcome in outcomes.items()}  # type: ignore[misc]

    def holds(self, group: Group) -> bool:
        """Whether all trials of a group are there."""
        return set(group.trials) <= self._outcomes[group.experiment].keys()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Adds the outcomes of a group; those that are there already are left as they are.

        Raises:
            AuditError: they cannot be stored.
        """
        new = [one for one in outcomes if one.trial not in self._outcomes[one.experiment]]
        self._keep(new)
        for outcome in new:
            self._outcomes[outcome.experiment][outcome.trial] = outcome

    def said(self, experiment: str) -> list[str]:
        """What came out of an experiment, in sentences, where it says so itself."""
        results = [outcome.result for outcome in self.of(experiment)]
        return type(results[0]).said(results) if results else []

    def seconds_each(self, experiment: str) -> float | None:
        """The mean of what a trial of an experiment took; None where there is none."""
        seconds = [one.seconds for one in self._outcomes[experiment].values()]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def evaluations(self) -> int:
        """Gradients of candidates, all experiments together."""
        return sum(one.evaluations for own in self._outcomes.values() for one in own.values())
