"""An experiment plans trials and runs them. What came out of each is all that it leaves behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from ggl_audit.attacks.attack import Advance
from ggl_audit.attacks.suite import Suite
from ggl_audit.case.case import Case

if TYPE_CHECKING:
    from typing_extensions import Self

    from ggl_audit.experiments.ledger import Ledger


class Result(BaseModel):
    """What came out of one trial: all of it that judgement or a report will ever need."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @classmethod
    def said(cls, results: Sequence[Self]) -> list[str]:
        """What came out of trials, in sentences for the report.

        Our own experiments say nothing here, as the report has parts of its own for them.
        """
        return []


ResultOf = TypeVar("ResultOf", bound=Result, covariant=True)


class Plan(BaseModel):
    """What an experiment will do.

    Attributes:
        trials: how many, numbered from 0.
        matched: gradients of candidates that are compared with one gradient each, all trials
            together.
        searched: those of latents, as a search asks for them.
        descended: those with derivatives, in the same unit.
        at_most: whether trials may end early, when those left can change nothing.
        each_counts: whether each trial is of something else, so that a pass takes all of them.
        optional: whether what comes out of other experiments decides if there is any trial at all.
        together: the trials of a group, which share their batches. Groups are by number alone:
            trials 0 to ``together`` - 1 are the first, whoever runs them and when.
        chance: how often a guess is right, where it is not one of ``evidence.candidates``.
    """

    model_config = ConfigDict(frozen=True)

    trials: int
    matched: int = 0
    searched: int = 0
    descended: int = 0
    at_most: bool = False
    each_counts: bool = False
    optional: bool = False
    together: int = 1
    chance: float | None = None

    @property
    def evaluations(self) -> int:
        """Gradients of candidates, in all trials together."""
        return self.matched + self.searched + self.descended

    def groups(self) -> list[range]:
        """The numbers of the trials, group by group."""
        starts = range(0, self.trials, self.together)
        return [range(start, min(start + self.together, self.trials)) for start in starts]


class NotMeasured(BaseModel):
    """Why an experiment is not made.

    Attributes:
        reason: in words that can follow "not measured:".
    """

    model_config = ConfigDict(frozen=True)

    reason: str


class Experiment(ABC, Generic[ResultOf]):
    """Something that is measured in trials.

    A trial's randomness is decided by the seed, the experiment and the trial's number alone. So
    what comes out of it does not depend on what ran before it, beside it, or where.

    Attributes:
        name: in ledgers and reports.
        stage: what is going on while it runs, in words.
        result: what comes out of a trial.
        share: of a time limit; when it is used up no further group is begun.
        as_long_as: the experiment whose trials take at least as long, where there are none of its
            own yet to tell whether another group would end in time; empty for none.
        waits: whether it is only begun when all experiments before it are done.
        explains: whether it only explains what others have measured, so that a pass which the
            time leaves without it is as good.

    Args:
        case: what was handed in.
        suite: the attacks that are made.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    result: ClassVar[type[Result]]
    share: ClassVar[float] = 1.0
    as_long_as: ClassVar[str] = ""
    waits: ClassVar[bool] = False
    explains: ClassVar[bool] = False

    def __init__(self, case: Case, suite: Suite) -> None:
        self.case = case
        self.suite = suite

    @abstractmethod
    def plan(self) -> Plan | NotMeasured:
        """Says how many trials there will be, or why there are none."""

    @abstractmethod
    def run(self, trials: range, advance: Advance) -> Iterator[ResultOf]:
        """Runs a group of trials.

        Args:
            trials: their numbers, one of :meth:`Plan.groups`.
            advance: told of the candidates that are evaluated, now and then; it may raise
                ``KeyboardInterrupt``.

        Yields:
            What came out of each, in their order.
        """

    def is_wanted(self, trials: range, ledger: Ledger) -> bool:
        """Whether what comes out of a group could change what the ledger says.

        Args:
            trials: of a group, whose predecessors are in the ledger or were not wanted.
            ledger: what has come out so far.
        """
        return True


@dataclass(frozen=True)
class Group:
    """Some trials of one experiment, which are run together.

    Attributes:
        experiment: its name.
        trials: their numbers.
    """

    experiment: str
    trials: range


Wanted = Callable[[Group], bool]
