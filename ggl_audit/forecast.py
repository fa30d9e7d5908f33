"""What an audit will take: trials for each grade, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    CANARIES_TOGETHER,
    MATCHING_CONTROL_TRIALS,
    MEMBERSHIP_TRIALS,
    SEARCHES_COMPARED,
    can_identify_members,
    captured_labels,
    run_matching,
    run_search,
    tests_promise,
)
from ggl_audit.gradient import stack
from ggl_audit.setting import Setting

STEPS_TO_PREDICT = (2, 8)


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


def planned_evaluations(setting: Setting) -> int:
    """The candidates that an audit evaluates, but for the search for a misfit's cause."""
    return planned_matching(setting) + planned_searches(setting) * evaluations_each(setting)


def planned_matching(setting: Setting) -> int:
    """The candidates of the ceiling, its control and the promise."""
    evidence = setting.spec.evidence
    matched = min(evidence.matching_trials, len(setting.trials()))
    promised = evidence.matching_trials if tests_promise(setting) else 0
    if setting.defense.steps:
        matched += min(matched, MATCHING_CONTROL_TRIALS)
    if can_identify_members(setting):
        matched += min(len(setting.trials()), MEMBERSHIP_TRIALS)
    return matched * (evidence.candidates + 1) + promised


def planned_searches(setting: Setting) -> int:
    """The searches of the captures, the canaries, the null control and the undefended control."""
    evidence = setting.spec.evidence
    canaries = len(setting.trials().first(evidence.reconstruction_trials))
    controls = min(evidence.control_trials, canaries) if setting.defense.steps else 0
    captures = 1 + len(setting.others)
    return 2 * (captures * SEARCHES_COMPARED + canaries) + controls


def evaluations_each(setting: Setting) -> int:
    """The candidates of one search."""
    attack = setting.spec.attack
    rounds = (attack.evaluations // attack.restarts - 1) // attack.population
    return attack.restarts * (rounds * attack.population + 1)


def predict_seconds(setting: Setting) -> tuple[float, float]:
    """Predicts the seconds that a candidate takes in matching and in a search, from a few of each.

    Returns:
        Seconds for each candidate of the matching trials, and of the searches.
    """
    attack, evidence = setting.spec.attack, setting.spec.evidence
    trials = setting.trials().first(CANARIES_TOGETHER)
    count = 2 * max(1, evidence.reconstruction_trials)
    observed = stack([setting.observed] * count)
    labels = captured_labels(setting, count)

    def matched() -> int:
        run_matching(setting, setting.client, setting.defense, trials, "prediction", lambda _: None)
        return trials.candidates.numel() + len(trials)

    def searched(steps: int) -> int:
        budget = attack.restarts * (steps * attack.population + 1)
        found, _ = run_search(
            setting, setting.defense, observed, labels, "prediction", lambda _: None, budget
        )
        return found.evaluations

    def timed(experiment: Callable[[], int]) -> tuple[float, int]:
        started = time.perf_counter()
        evaluated = experiment()
        return time.perf_counter() - started, evaluated

    matched()  # warms up
    match_seconds, match_count = timed(matched)
    # The difference of two lengths leaves out what a search costs once.
    searched(STEPS_TO_PREDICT[1])
    short_seconds, short_count = timed(lambda: searched(STEPS_TO_PREDICT[0]))
    long_seconds, long_count = timed(lambda: searched(STEPS_TO_PREDICT[1]))
    search_seconds = max(long_seconds - short_seconds, 0.0) / (long_count - short_count)
    return match_seconds / max(match_count, 1), search_seconds
