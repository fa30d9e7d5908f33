"""Rates with exact intervals, and what they imply about privacy."""

from __future__ import annotations

import functools
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, computed_field
from scipy.special import bdtrc, betaincinv, ndtri

CONFIDENCE = 0.95

Share = Annotated[float, Field(ge=0, le=1)]


class Rate(BaseModel):
    """A success rate over independent trials with its exact two-sided 95 % interval.

    The interval is Clopper and Pearson's (Biometrika 1934), which covers at least 95 % for every
    true rate. The advantage is (rate - chance) / (1 - chance), at the interval's ends too.

    Where trials ended early, the interval spans those of every way in which the planned trials
    could have gone on. It holds the interval of the full run, so it covers at least as often,
    whatever ended the trials.
    """

    model_config = ConfigDict(frozen=True)

    successes: Annotated[int, Field(ge=0)]
    trials: Annotated[int, Field(ge=1)]
    planned: Annotated[int, Field(ge=1)]
    rate: Share
    lower: Share
    upper: Share
    chance: Annotated[float, Field(gt=0, lt=1)]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def advantage_lower(self) -> float:
        """The advantage over guessing at the interval's lower end; it can be negative."""
        return (self.lower - self.chance) / (1 - self.chance)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def advantage_upper(self) -> float:
        """The advantage over guessing at the interval's upper end."""
        return (self.upper - self.chance) / (1 - self.chance)


class ReconstructionRate(Rate):
    """A rate of canaries that reconstructions identify.

    Attributes:
        psnr_db: mean over the pictures, in dB.
        null_p_value: of the exact paired test against the null control; for the floor only.
    """

    psnr_db: float
    null_p_value: float | None = None


def measure_rate(
    successes: int, trials: int, chance: float, planned: int | None = None, attacks: int = 1
) -> Rate:
    """Estimates a success probability.

    Args:
        successes: 0 to trials.
        trials: 1 or more, independent.
        chance: the success probability of guessing, in [0, 1).
        planned: how many trials there would have been, had they not ended early.
        attacks: from how many rates the largest may be picked, so that the intervals hold for all
            of them together (Bonferroni).
    """
    planned = planned or trials
    most = successes + planned - trials
    return Rate(
        successes=successes,
        trials=trials,
        planned=planned,
        rate=successes / trials,
        lower=_interval(successes, planned, attacks)[0],
        upper=_interval(most, planned, attacks)[1],
        chance=chance,
    )


@functools.cache
def _interval(successes: int, trials: int, attacks: int) -> tuple[float, float]:
    missed, failures = (1 - CONFIDENCE) / attacks / 2, trials - successes
    lower = betaincinv(successes, failures + 1, missed) if successes else 0.0
    upper = betaincinv(successes + 1, failures, 1 - missed) if failures else 1.0
    return float(lower), float(upper)


@functools.cache
def paired_p_value(only_attack: int, only_null: int, attacks: int = 1) -> float:
    """The exact one-sided test of whether the attack identifies more than its null control.

    McNemar's test in its exact form: of the canaries that only one of the two identifies, each is
    equally likely to be either's, if the gradient gives nothing.

    Args:
        only_attack: canaries that the attack identified and the null control did not.
        only_null: the reverse.
        attacks: from how many attacks the best may be picked (Bonferroni).

    Returns:
        The probability of so many or more for any of the attacks, at most.
    """
    different = only_attack + only_null
    if different == 0:
        return 1.0
    return min(1.0, attacks * float(bdtrc(only_attack - 1, different, 0.5)))


def trials_needed(advantage: float, chance: float) -> int:
    """The fewest trials that bound the advantage, if guessing is all that succeeds.

    Args:
        advantage: the bound on the interval's upper end, in (0, 1].
        chance: the success probability of guessing.

    Returns:
        The smallest n (in steps of 10) with upper advantage at most ``advantage`` when
        ``round(n * chance)`` trials succeed.
    """
    trials = 10
    while measure_rate(round(trials * chance), trials, chance).advantage_upper > advantage:
        trials += 10
    return trials


def hits_needed(advantage: float, chance: float, least: int = 1, attacks: int = 1) -> int:
    """The fewest trials that show more than an advantage, if every one of them succeeds.

    Args:
        advantage: the lower end must be above it, in [0, 1).
        chance: the success probability of guessing.
        least: the smallest answer.
        attacks: from how many the best is picked.
    """
    trials = least
    while measure_rate(trials, trials, chance, None, attacks).advantage_lower <= advantage:
        trials += 1
    return trials


def empirical_mu(rate: Rate) -> float:
    """A lower bound on the Gaussian-DP parameter of whatever produced the rate.

    mu >= Phi^-1(g) - Phi^-1(1/N), with g the lower end of the identification rate among N equally
    likely candidates (from the trade-off function of Dong, Roth and Su, JRSS B 2022). 0 if the
    lower end is not above chance.
    """
    if rate.lower <= rate.chance:
        return 0.0
    return float(ndtri(rate.lower) - ndtri(rate.chance))
