"""What a declared differentially private defense promises, and for what."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict
from scipy.special import ndtr, ndtri

from ggl_audit.defenses import GaussianMechanism
from ggl_audit.spec import GuaranteeSpec

ROUNDING = 1.005


class Guarantee(BaseModel):
    """What the declared defense promises for adding or removing one unit.

    Attributes:
        unit: whose presence is hidden: one sample, or all that one client has.
        rounds: how many releases epsilon is for.
        sampling_rate: how likely a unit takes part in a round, independently of the others.
        epsilon: at ``delta``, over all rounds.
        delta: as declared.
        mu: the Gaussian-DP parameter of one release that the unit takes part in, as the audited.
        reconstruction_bound: no attack on that release identifies the image among N equally likely
            candidates with a higher probability.
        claimed_epsilon: what the client says that epsilon is, where declared.
    """

    model_config = ConfigDict(frozen=True)

    unit: Literal["sample", "client"]
    rounds: int
    sampling_rate: float
    epsilon: float
    delta: float
    mu: float
    reconstruction_bound: float
    claimed_epsilon: float | None = None

    @property
    def claims_too_much(self) -> bool:
        """Whether the claimed epsilon is smaller than the declared noise gives."""
        return self.claimed_epsilon is not None and self.epsilon > ROUNDING * self.claimed_epsilon


def largest_advantage(mechanism: GaussianMechanism | None, chance: float) -> float:
    """The advantage that nobody exceeds on one release; 1 where there is no such mechanism."""
    if mechanism is None:
        return 1.0
    rate = float(ndtr(ndtri(chance) + mechanism.mu))
    return (rate - chance) / (1 - chance)


def account(
    mechanism: GaussianMechanism, declared: GuaranteeSpec, batch_size: int, chance: float
) -> Guarantee:
    """Computes the guarantee of the Gaussian mechanism.

    One release, and rounds that all take part in, are exact (Balle and Wang, ICML 2018; mu grows
    with the root of the rounds: Dong, Roth and Su, JRSS B 2022). Poisson-sampled rounds are
    composed by their privacy loss distributions, rounded up. Both by dp-accounting. The
    reconstruction bound is Phi(Phi^-1(chance) + mu) (Hayes, Mahloujifar and Balle, NeurIPS 2023).

    Args:
        mechanism: the bound on one unit's norm and the noise on what is sent.
        declared: unit, reduction, rounds, sampling and delta.
        batch_size: units in a release.
        chance: the success probability of the best blind guess.
    """
    import dp_accounting
    from dp_accounting import pld

    bound = mechanism.bound / (batch_size if declared.reduction == "mean" else 1)
    multiplier = mechanism.std / bound
    if declared.sampling_rate == 1:
        combined = multiplier / math.sqrt(declared.rounds)
        epsilon = dp_accounting.get_epsilon_gaussian(combined, declared.delta)
    else:
        accountant = pld.PLDAccountant()
        release = dp_accounting.PoissonSampledDpEvent(
            declared.sampling_rate, dp_accounting.GaussianDpEvent(multiplier)
        )
        accountant.compose(release, declared.rounds)
        epsilon = accountant.get_epsilon(declared.delta)
    return Guarantee(
        unit=declared.unit,
        rounds=declared.rounds,
        sampling_rate=declared.sampling_rate,
        epsilon=float(epsilon),
        delta=declared.delta,
        mu=1 / multiplier,
        reconstruction_bound=float(ndtr(ndtri(chance) + 1 / multiplier)),
        claimed_epsilon=declared.epsilon,
    )
