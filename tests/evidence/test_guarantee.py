from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.stats import norm as normal

from ggl_audit.defenses import GaussianMechanism
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.spec import GuaranteeSpec


def accounted(
    multiplier: float, batch_size: int = 1, chance: float = 1 / 32, **changes: Any
) -> Guarantee:
    declared = {"unit": "sample", "reduction": "sum", "rounds": 1, "sampling_rate": 1}
    spec = GuaranteeSpec.model_validate({**declared, "delta": 1e-5, **changes})
    mechanism = GaussianMechanism(bound=2.0, std=2.0 * multiplier)
    return account(mechanism, spec, batch_size, chance)


def exact_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(
        normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
    )


@pytest.mark.parametrize(("multiplier", "bound"), [(0.5, 0.372), (1.0, 0.092), (2.0, 0.034)])
def test_the_reconstruction_bound_at_one_percent(multiplier: float, bound: float) -> None:
    found = accounted(multiplier, chance=0.01).reconstruction_bound
    assert found == pytest.approx(bound, abs=5e-4)


def test_epsilon_is_the_published_one_and_solves_its_equation() -> None:
    guarantee = accounted(1.0)
    assert guarantee.mu == 1.0
    assert guarantee.epsilon == pytest.approx(4.3772, abs=1e-4)
    for multiplier in (0.3, 2.5):
        found = accounted(multiplier)
        assert exact_delta(1 / multiplier, found.epsilon) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("rounds", [4, 100])
def test_rounds_compose_as_one_gaussian_of_a_larger_mu(rounds: int) -> None:
    found = accounted(5.0, rounds=rounds)
    assert found.mu == pytest.approx(0.2)
    assert exact_delta(math.sqrt(rounds) / 5, found.epsilon) == pytest.approx(1e-5, rel=1e-3)


def test_the_mean_over_a_batch_divides_what_one_unit_adds() -> None:
    """Noise on the mean of 8 hides a unit as eight times as much noise on the sum does."""
    mean = accounted(0.25, batch_size=8, reduction="mean")
    assert mean.mu == pytest.approx(0.5)
    assert mean.epsilon == pytest.approx(accounted(2.0).epsilon)
    assert accounted(0.25, batch_size=8, reduction="sum").mu == pytest.approx(4.0)


def test_poisson_sampling_amplifies_and_its_limit_is_no_sampling() -> None:
    full = accounted(1.0, rounds=20).epsilon
    sampled = [accounted(1.0, rounds=20, sampling_rate=q).epsilon for q in (0.01, 0.1, 0.999)]
    assert sampled == sorted(sampled)
    assert sampled[0] < full / 10
    assert sampled[2] == pytest.approx(full, rel=0.01)
    assert accounted(1.0, rounds=20, sampling_rate=0.01).mu == 1.0


def test_the_abadi_figure_for_sampled_rounds() -> None:
    """Abadi et al. 2016, section 5.1: q 0.01, sigma 4, 10,000 rounds: (1.26, 1e-5) by moments.

    Privacy loss distributions are tighter than their moments accountant.
    """
    epsilon = accounted(4.0, rounds=10_000, sampling_rate=0.01).epsilon
    assert 0.85 < epsilon < 1.26


def test_a_claimed_epsilon_is_compared() -> None:
    assert accounted(1.0, epsilon=1.0).claims_too_much
    assert not accounted(1.0, epsilon=4.378).claims_too_much
    assert not accounted(1.0).claims_too_much


@pytest.mark.parametrize("missing", ["unit", "reduction", "rounds", "sampling_rate", "delta"])
def test_nothing_is_guessed(missing: str) -> None:
    declared = {
        "unit": "client",
        "reduction": "mean",
        "rounds": 10,
        "sampling_rate": 0.1,
        "delta": 1e-6,
    }
    del declared[missing]
    with pytest.raises(ValueError, match=missing):
        GuaranteeSpec.model_validate(declared)
