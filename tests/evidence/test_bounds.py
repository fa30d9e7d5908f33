from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta
from scipy.stats import norm as normal

from ggl_audit.defenses import GaussianMechanism
from ggl_audit.evidence.bounds import (
    account,
    empirical_mu,
    measure_rate,
    paired_p_value,
    trials_needed,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20), (1, 200), (19, 60)])
def test_the_interval_is_clopper_and_pearsons(successes: int, trials: int) -> None:
    rate = measure_rate(successes, trials, 1 / 32)
    lower = beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    upper = beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    assert rate.lower == pytest.approx(lower)
    assert rate.upper == pytest.approx(upper)
    assert rate.advantage_lower == pytest.approx((lower - 1 / 32) / (31 / 32))


@pytest.mark.parametrize("truth", [1 / 32, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("trials", [20, 200])
def test_the_interval_covers_what_it_promises(truth: float, trials: int) -> None:
    random = np.random.default_rng(0)
    drawn = random.binomial(trials, truth, 4000)
    intervals = {int(k): measure_rate(int(k), trials, 1 / 32) for k in np.unique(drawn)}
    covered = np.mean([intervals[int(k)].lower <= truth <= intervals[int(k)].upper for k in drawn])
    assert covered >= 0.95


def test_enough_trials_are_enough_and_fewer_are_not() -> None:
    for advantage in (0.05, 0.25):
        needed = trials_needed(advantage, 1 / 32)
        assert measure_rate(round(needed / 32), needed, 1 / 32).advantage_upper <= advantage
        fewer = needed - 10
        assert measure_rate(round(fewer / 32), fewer, 1 / 32).advantage_upper > advantage
    assert trials_needed(0.05, 1 / 32) <= 200


@pytest.mark.parametrize(("multiplier", "bound"), [(0.5, 0.372), (1.0, 0.092), (2.0, 0.034)])
def test_the_reconstruction_bound_at_one_percent(multiplier: float, bound: float) -> None:
    guarantee = account(GaussianMechanism(bound=1.0, std=multiplier), 1e-5, 0.01)
    assert guarantee.reconstruction_bound == pytest.approx(bound, abs=5e-4)


def test_epsilon_is_the_published_one_and_solves_its_equation() -> None:
    guarantee = account(GaussianMechanism(bound=1.0, std=1.0), 1e-5, 1 / 32)
    assert guarantee.mu == 1.0
    assert guarantee.epsilon == pytest.approx(4.3772, abs=1e-4)
    for std in (0.3, 2.5):
        found = account(GaussianMechanism(bound=1.0, std=std), 1e-5, 1 / 32)
        mu, epsilon = 1 / std, found.epsilon
        # Balle and Wang 2018, theorem 8.
        delta = normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(
            -mu / 2 - epsilon / mu
        )
        assert delta == pytest.approx(1e-5, rel=1e-3)


def test_the_empirical_mu_of_the_best_attack_stays_below_the_truth() -> None:
    """The Bayes-optimal identification of one of N orthogonal signals of norm 1."""
    random = np.random.default_rng(0)
    candidates, trials = 32, 200
    for mu in (0.5, 2.0, 4.0):
        exceeded = 0
        for _ in range(200):
            scores = random.standard_normal((trials, candidates))
            scores[:, 0] += mu
            hits = int((scores.argmax(axis=1) == 0).sum())
            exceeded += empirical_mu(measure_rate(hits, trials, 1 / candidates)) > mu
        assert exceeded <= 0.025 * 200 + 5
    assert empirical_mu(measure_rate(1, 200, 1 / 32)) == 0.0


def test_the_paired_test_is_mcnemars_exact_one() -> None:
    assert paired_p_value(5, 0) == pytest.approx(1 / 32)
    assert paired_p_value(6, 1) == pytest.approx(8 / 128)
    assert paired_p_value(0, 0) == 1.0
    random = np.random.default_rng(0)
    attack, null = (random.random((5000, 20)) < 0.1 for _ in range(2))
    only_attack = (attack & ~null).sum(axis=1)
    only_null = (null & ~attack).sum(axis=1)
    p = [paired_p_value(int(a), int(n)) for a, n in zip(only_attack, only_null, strict=True)]
    assert np.mean(np.array(p) <= 0.025) <= 0.025
