"""What an audit will take: trials for each grade, and seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attacks.by_derivatives import derivatives_of
from ggl_audit.attacks.ggl import search_latents
from ggl_audit.attacks.suite import Suite
from ggl_audit.basics.gradient import stack
from ggl_audit.case.case import Case
from ggl_audit.evidence.bounds import hits_needed, trials_needed
from ggl_audit.evidence.standing import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    RECONSTRUCTED,
    fewest_significant,
)
from ggl_audit.experiments.candidate_matching import CandidateMatching, match_canaries
from ggl_audit.experiments.capture import SEARCHES_COMPARED
from ggl_audit.experiments.experiment import NotMeasured, Plan
from ggl_audit.experiments.reconstruction import CANARIES_TOGETHER, Reconstruction
from ggl_audit.optimizers import DERIVATIVE_COST

TRIALS_TO_PREDICT = 8
SEARCHES_TO_PREDICT = 20
"""At a time, as many as an audit usually has canaries: few of them take longer each."""

ROUNDS_TO_PREDICT = (1, 3)
"""Rounds of a search, each as long as the latent has coordinates."""

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
    """What an audit will take and can give, before it is run.

    Attributes:
        needs: the trials for each grade.
        evaluations: candidates of the whole audit as declared.
        seconds: of the whole audit as declared.
    """

    needs: list[Need]
    evaluations: int
    seconds: float


def forecast(case: Case, suite: Suite, plans: Mapping[str, Plan | NotMeasured]) -> Forecast:
    """Says which grades the declared trials can give, and what they take, from a short run.

    Args:
        case: what was handed in.
        suite: the attacks that are made.
        plans: of the experiments, by name.
    """
    evidence = case.spec.evidence
    chance, attacks = 1 / evidence.candidates, len(suite.names)
    matching, searching, descending = predict_seconds(case, suite, plans)
    a_canary = 2 * (searching * suite.searched() + descending * suite.descended())
    needs = [
        Need(
            grade=grade,
            experiment="matching",
            trials=(needed := trials_needed(bound, chance)),
            planned=_trials(plans[CandidateMatching.name]),
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
            planned=_trials(plans[Reconstruction.name]),
            condition="every picture identifies its canary, none of the null control's does",
            seconds=needed * a_canary,
        )
        for grade, bound in (("D", PARTLY_RECONSTRUCTED), ("F", RECONSTRUCTED))
    ]
    made = [plan for plan in plans.values() if isinstance(plan, Plan)]
    seconds = sum(
        matching * plan.matched + searching * plan.searched + descending * plan.descended
        for plan in made
    )
    return Forecast(needs, planned_evaluations(plans), seconds)


def planned_evaluations(plans: Mapping[str, Plan | NotMeasured]) -> int:
    """The candidates that an audit evaluates, but for the search for a misfit's cause."""
    return sum(plan.evaluations for plan in plans.values() if isinstance(plan, Plan))


def _trials(plan: Plan | NotMeasured) -> int:
    return plan.trials if isinstance(plan, Plan) else 0


def predict_seconds(
    case: Case, suite: Suite, plans: Mapping[str, Plan | NotMeasured]
) -> tuple[float, float, float]:
    """Predicts the seconds that a candidate takes, from a few of each kind.

    Returns:
        Seconds for each candidate of the matching trials, of the searches, and with derivatives.
    """
    declared, canaries = case.spec.attack, case.trials.first(TRIALS_TO_PREDICT)
    planned = 2 * (SEARCHES_COMPARED + min(_trials(plans[Reconstruction.name]), CANARIES_TOGETHER))
    count = min(planned, SEARCHES_TO_PREDICT)
    observed, labels = stack([case.audited.observed] * count), case.audited.repeated_labels(count)
    randoms = [case.random("prediction", number) for number in range(count)]

    def matched(trials: int, candidates: int) -> int:
        tried = range(trials)
        found = match_canaries(
            case, case.client, case.defense, "prediction", tried, _nothing, candidates - 1
        )
        return candidates * len(list(found))

    def searched(searches: int, evaluations: int) -> int:
        own = {name: tensor[:searches] for name, tensor in observed.items()}
        tried = own, labels[:searches], randoms[:searches]
        found = search_latents(case, case.defense, *tried, _nothing, evaluations)
        return searches * found.curves[0][-1][0]

    def descended(searches: int, steps: int) -> int:
        own = {name: tensor[:searches] for name, tensor in observed.items()}
        tried = labels[:searches], own, steps, randoms[:searches]
        attack_pixels(case.model, derivatives_of(case, "cosine"), *tried, _nothing)
        return DERIVATIVE_COST * steps * searches

    candidates = case.spec.evidence.candidates + 1
    matching = seconds_each(matched, [(1, 3), (1, candidates), (len(canaries), candidates)])
    size = case.prior.size * case.members + declared.population
    least = declared.restarts * (declared.population + 1)
    short = declared.restarts * min(ROUNDS_TO_PREDICT[0] * size, declared.evaluations)
    long = declared.restarts * min(ROUNDS_TO_PREDICT[1] * size, 2 * declared.evaluations)
    # The difference of two lengths leaves out what a search costs once.
    searching = seconds_each(searched, [(1, least), (count, short), (count, long)], matching)
    descending = 0.0
    if suite.descended():
        few, more = STEPS_TO_PREDICT
        sizes = [(1, few), (count, few), (count, more)]
        descending = seconds_each(descended, sizes, searching)
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
