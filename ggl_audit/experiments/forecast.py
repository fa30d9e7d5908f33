"""What an audit will take: trials for each grade, and seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attack.refine import refinement_steps
from ggl_audit.basics.clock import Clock
from ggl_audit.basics.gradient import stack
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.bounds import hits_needed, trials_needed
from ggl_audit.evidence.grade import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    RECONSTRUCTED,
    fewest_significant,
)
from ggl_audit.experiments.attacks import PIXELS, REFINED, Suite, captured_labels, run_search
from ggl_audit.experiments.candidate_matching import MATCHING_CONTROL_TRIALS, run_matching
from ggl_audit.experiments.capture import SEARCHES_COMPARED
from ggl_audit.experiments.membership import MEMBERSHIP_TRIALS, can_identify_members
from ggl_audit.experiments.noise import planned_releases
from ggl_audit.experiments.promise import tests_promise
from ggl_audit.optimizers import DERIVATIVE_COST, find_family

TRIALS_TO_PREDICT = 8
SEARCHES_TO_PREDICT = 20
"""At a time, as many as an audit usually has canaries: few of them take longer each."""

ROUNDS_TO_PREDICT = (1, 3)
"""Of a search, each as long as the latent has coordinates."""

STEPS_TO_PREDICT = (1, 5)

SECONDS_TO_PREDICT = 10.0
"""That candidates of one kind are tried for; a slow model's are then fewer."""


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


def forecast(setting: Setting, suite: Suite) -> Forecast:
    """Says which grades the declared trials can give, and what they take, from a short run."""
    evidence = setting.spec.evidence
    chance = 1 / evidence.candidates
    matching, searching, descending = predict_seconds(setting, suite)
    attacks = len(suite.names)
    each = searching * evaluations_each(setting) + descending * planned_descents(setting, suite)
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
            trials=(needed := hits_needed(bound, chance, fewest_significant(attacks), attacks)),
            planned=search_trials,
            condition="every picture identifies its canary, none of the null control's does",
            seconds=needed * 2 * each,
        )
        for grade, bound in (("D", PARTLY_RECONSTRUCTED), ("F", RECONSTRUCTED))
    ]
    whole = matching * planned_matching(setting)
    captures, controls = planned_searches(setting)
    whole += captures * each + controls * searching * evaluations_each(setting)
    return Forecast(needs, whole)


def planned_evaluations(setting: Setting, suite: Suite) -> int:
    """The candidates that an audit evaluates, but for the search for a misfit's cause."""
    captures, controls = planned_searches(setting)
    beyond = planned_descents(setting, suite) * DERIVATIVE_COST
    searched = (captures + controls) * evaluations_each(setting)
    return planned_matching(setting) + searched + captures * beyond


def planned_matching(setting: Setting) -> int:
    """The candidates of the ceiling, its control, the noise and the promise."""
    evidence = setting.spec.evidence
    matched = min(evidence.matching_trials, len(setting.trials()))
    promised = evidence.matching_trials if tests_promise(setting) else 0
    if setting.defense.steps:
        matched += min(matched, MATCHING_CONTROL_TRIALS)
    if can_identify_members(setting):
        matched += min(len(setting.trials()), MEMBERSHIP_TRIALS)
    return matched * (evidence.candidates + 1) + promised + planned_releases(setting)


def planned_searches(setting: Setting) -> tuple[int, int]:
    """The gradients that all attacks are made on, and those of the undefended control."""
    evidence = setting.spec.evidence
    canaries = len(setting.trials().first(evidence.reconstruction_trials))
    controls = min(evidence.control_trials, canaries) if setting.defense.steps else 0
    captures = 1 + len(setting.others)
    return 2 * (captures * SEARCHES_COMPARED + canaries), controls


def planned_descents(setting: Setting, suite: Suite) -> int:
    """The candidates with derivatives for each gradient."""
    steps = setting.spec.attack.steps
    refined = refinement_steps(setting.prior, steps) if REFINED in suite.names else 0
    return refined + (steps if PIXELS in suite.names else 0)


def evaluations_each(setting: Setting) -> int:
    """The candidates of one search."""
    attack = setting.spec.attack
    step = attack.restarts * find_family(attack.optimizer).evaluation_cost()
    return step * (attack.evaluations // step)


def predict_seconds(setting: Setting, suite: Suite) -> tuple[float, float, float]:
    """Predicts the seconds that a candidate takes, from a few of each kind.

    Returns:
        Seconds for each candidate of the matching trials, of the searches, and with derivatives.
    """
    attack = setting.spec.attack
    trials = setting.trials().first(TRIALS_TO_PREDICT)
    planned, _ = planned_searches(setting)
    count = min(planned, SEARCHES_TO_PREDICT)
    observed = stack([setting.observed] * count)
    labels = captured_labels(setting, count)

    def matched(tried: int, candidates: int) -> int:
        part = trials.first(tried)
        part = replace(part, candidates=part.candidates[:, : candidates - 1])
        run_matching(
            setting, setting.client, setting.defense, part, "prediction", _nothing, Clock()
        )
        return part.candidates.numel() + len(part)

    def searched(searches: int, evaluations: int) -> int:
        part = {name: tensor[:searches] for name, tensor in observed.items()}
        found, _ = run_search(
            setting,
            setting.defense,
            part,
            labels[:searches],
            "prediction",
            _nothing,
            evaluations,
        )
        return found.evaluations

    def descended(searches: int, steps: int) -> int:
        derivatives = setting.derivatives("cosine")
        random = setting.random("prediction")
        part = {name: tensor[:searches] for name, tensor in observed.items()}
        of_each = labels[:searches].reshape(searches, -1)
        attack_pixels(setting.model, derivatives, of_each, part, steps, random, _nothing)
        return steps * searches

    candidates = setting.spec.evidence.candidates + 1
    matching = seconds_each(matched, [(1, 3), (1, candidates), (len(trials), candidates)])
    size = setting.prior.size * setting.members + attack.population
    least = attack.restarts * (attack.population + 1)
    short = attack.restarts * min(ROUNDS_TO_PREDICT[0] * size, attack.evaluations)
    long = attack.restarts * min(ROUNDS_TO_PREDICT[1] * size, 2 * attack.evaluations)
    # The difference of two lengths leaves out what a search costs once.
    searching = seconds_each(searched, [(1, least), (count, short), (count, long)], matching)
    descending = 0.0
    if planned_descents(setting, suite):
        few, more = STEPS_TO_PREDICT
        guess = DERIVATIVE_COST * searching
        descending = seconds_each(descended, [(1, few), (count, few), (count, more)], guess)
    return matching, searching, descending


def seconds_each(
    experiment: Callable[[int, int], int],
    sizes: Sequence[tuple[int, int]],
    guess: float = 0.0,
    most: float = SECONDS_TO_PREDICT,
) -> float:
    """The seconds that an experiment takes for each candidate, from ever more of them.

    The next size is only begun if it can be expected to end in time. What counts is how much longer
    the last took than the one before, as the first also warms up.

    Args:
        experiment: called with a size, it evaluates about its product and tells how many exactly.
        sizes: in rising order.
        guess: the seconds of a candidate, before any was tried.
        most: seconds for all sizes together.
    """
    each, total, last = guess, 0.0, (0.0, 0)
    for size in sizes:
        if total + each * math.prod(size) > most:
            break
        started = time.perf_counter()
        count = experiment(*size)
        seconds = time.perf_counter() - started
        if count > last[1]:
            each = max(seconds - last[0], 0.0) / (count - last[1])
        total, last = total + seconds, (seconds, count)
    return each


def _nothing(_evaluations: int) -> None:
    """Nobody is told."""
