"""What an audit will take: trials for each grade, and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from ggl_audit.evidence.bounds import hits_needed, trials_needed
from ggl_audit.evidence.grade import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    RECONSTRUCTED,
    fewest_significant,
)
from ggl_audit.experiments import (
    evaluations_each,
    planned_matching,
    planned_searches,
    predict_seconds,
)
from ggl_audit.setting import Setting


@dataclass(frozen=True)
class Need:
    """The trials that a grade takes.

    Attributes:
        grade: A, B, D or F; a C needs what rules out A and B, and no more.
        experiment: matching or reconstruction.
        trials: the fewest that can give it.
        planned: how many the spec asks for, and the reference set has.
        condition: what has to come out for so few to be enough.
        seconds: that these trials take.
    """

    grade: str
    experiment: str
    trials: int
    planned: int
    condition: str
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """Of an audit, before it is run.

    Attributes:
        needs: the trials for each grade.
        seconds: of the whole audit as declared.
    """

    needs: list[Need]
    seconds: float


def forecast(setting: Setting) -> Forecast:
    """Says which grades the declared trials can give, and what they take, from a short run."""
    evidence = setting.spec.evidence
    chance = 1 / evidence.candidates
    matching, searching = predict_seconds(setting)
    trials = setting.trials()
    match_trials = len(trials.first(evidence.matching_trials))
    search_trials = len(trials.first(evidence.reconstruction_trials))
    needs = [
        Need(
            grade=grade,
            experiment="matching",
            trials=(needed := trials_needed(bound, chance)),
            planned=match_trials,
            condition="matching identifies no more than chance",
            seconds=needed * matching * (evidence.candidates + 1),
        )
        for grade, bound in (("A", NO_LEAKAGE), ("B", LITTLE_LEAKAGE))
    ]
    needs += [
        Need(
            grade=grade,
            experiment="reconstruction",
            trials=(needed := hits_needed(bound, chance, fewest_significant())),
            planned=search_trials,
            condition="every picture identifies its canary, none of the null control's does",
            seconds=needed * 2 * searching * evaluations_each(setting),
        )
        for grade, bound in (("D", PARTLY_RECONSTRUCTED), ("F", RECONSTRUCTED))
    ]
    whole = matching * planned_matching(setting)
    whole += searching * planned_searches(setting) * evaluations_each(setting)
    return Forecast(needs, whole)
