"""Rates with exact intervals, and what they imply about privacy."""

from __future__ import annotations

from typing import Annotated

import dp_accounting
from pydantic import BaseModel, ConfigDict, Field, computed_field
from scipy.stats import binomtest
from scipy.stats import norm as normal

from ggl_audit.defenses import GaussianMechanism

CONFIDENCE = 0.95

Share = Annotated[float, Field(ge=0, le=1)]


class Rate(BaseModel):
    """A success rate over independent trials with its exact two-sided 95 % interval.

    The interval is Clopper and Pearson's (Biometrika 1934), which covers at least 95 % for every
    true rate. The advantage is (rate - chance) / (1 - chance), at the interval's ends too.
    """

    model_config = ConfigDict(frozen=True)

    successes: Annotated[int, Field(ge=0)]
    trials: Annotated[int, Field(ge=1)]
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


def measure_rate(successes: int, trials: int, chance: float) -> Rate:
    """Estimates a success probability.

    Args:
        successes: 0 to trials.
        trials: 1 or more, independent.
        chance: the success probability of guessing, in [0, 1).
    """
    interval = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return Rate(
        successes=successes,
        trials=trials,
        rate=successes / trials,
        lower=float(interval.low),
        upper=float(interval.high),
        chance=chance,
    )


def paired_p_value(only_attack: int, only_null: int) -> float:
    """The exact one-sided test of whether the attack identifies more than its null control.

    McNemar's test in its exact form: of the canaries that only one of the two identifies, each is
    equally likely to be either's, if the gradient gives nothing.

    Args:
        only_attack: canaries that the attack identified and the null control did not.
        only_null: the reverse.

    Returns:
        The probability of so many or more for the attack.
    """
    different = only_attack + only_null
    if different == 0:
        return 1.0
    return float(binomtest(only_attack, different, 0.5, alternative="greater").pvalue)


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


def empirical_mu(rate: Rate) -> float:
    """A lower bound on the Gaussian-DP parameter of whatever produced the rate.

    mu >= Phi^-1(g) - Phi^-1(1/N), with g the lower end of the identification rate among N equally
    likely candidates (from the trade-off function of Dong, Roth and Su, JRSS B 2022). 0 if the
    lower end is not above chance.
    """
    if rate.lower <= rate.chance:
        return 0.0
    return float(normal.ppf(rate.lower) - normal.ppf(rate.chance))


class Guarantee(BaseModel):
    """What a declared differentially private defense promises for one image and one release.

    Attributes:
        epsilon: at ``delta``, for adding or removing the image.
        delta: as declared in ``evidence.delta``.
        mu: the Gaussian-DP parameter.
        reconstruction_bound: no attack identifies the image among N equally likely candidates with
            a higher probability.
    """

    model_config = ConfigDict(frozen=True)

    epsilon: float
    delta: float
    mu: float
    reconstruction_bound: float


def account(mechanism: GaussianMechanism, delta: float, chance: float) -> Guarantee:
    """Computes the guarantee of one release of the Gaussian mechanism.

    Epsilon is exact (Balle and Wang, ICML 2018) by dp-accounting. The reconstruction bound is
    Phi(Phi^-1(chance) + mu) (Hayes, Mahloujifar and Balle, NeurIPS 2023, for one Gaussian release).

    Args:
        mechanism: the bound on the norm and the noise.
        delta: in (0, 1).
        chance: the success probability of the best blind guess.
    """
    return Guarantee(
        epsilon=float(dp_accounting.get_epsilon_gaussian(1 / mechanism.mu, delta)),
        delta=delta,
        mu=mechanism.mu,
        reconstruction_bound=float(normal.cdf(normal.ppf(chance) + mechanism.mu)),
    )
