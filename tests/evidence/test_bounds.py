from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from ggl_audit.evidence.bounds import (
    empirical_mu,
    hits_needed,
    measure_rate,
    paired_p_value,
    trials_needed,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20), (1, 200), (19, 60)])
def test_the_interval_is_clopper_and_pearsons(successes: int, trials: int) -> None:
    rate = measure_rate(successes, trials, 1 / 32)
    interval = binomtest(successes, trials).proportion_ci(method="exact")
    assert rate.lower == pytest.approx(interval.low)
    assert rate.upper == pytest.approx(interval.high)
    assert rate.advantage_lower == pytest.approx((interval.low - 1 / 32) / (31 / 32))


@pytest.mark.parametrize("truth", [1 / 32, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("trials", [20, 200])
def test_the_interval_covers_what_it_promises(truth: float, trials: int) -> None:
    """By simulation, where one of 10,000 would cover too seldom by chance."""
    random = np.random.default_rng(0)
    drawn = random.binomial(trials, truth, 4000)
    intervals = {int(k): measure_rate(int(k), trials, 1 / 32) for k in np.unique(drawn)}
    covered = np.mean([intervals[int(k)].lower <= truth <= intervals[int(k)].upper for k in drawn])
    assert covered >= binom.ppf(1e-4, 4000, 0.95) / 4000


def test_enough_trials_are_enough_and_fewer_are_not() -> None:
    for advantage in (0.05, 0.25):
        needed = trials_needed(advantage, 1 / 32)
        assert measure_rate(round(needed / 32), needed, 1 / 32).advantage_upper <= advantage
        fewer = needed - 10
        assert measure_rate(round(fewer / 32), fewer, 1 / 32).advantage_upper > advantage
    assert trials_needed(0.05, 1 / 32) <= 200


def test_the_empirical_mu_of_the_best_attack_stays_below_the_truth() -> None:
    """The Bayes-optimal identification of one of N orthogonal signals of norm 1.

    A lower end of an interval at 95 % may exceed the truth once in 40; a right one fails here once
    in 10,000.
    """
    random = np.random.default_rng(0)
    candidates, trials = 32, 200
    for mu in (0.5, 2.0, 4.0):
        exceeded = 0
        for _ in range(200):
            scores = random.standard_normal((trials, candidates))
            scores[:, 0] += mu
            hits = int((scores.argmax(axis=1) == 0).sum())
            exceeded += empirical_mu(measure_rate(hits, trials, 1 / candidates)) > mu
        assert exceeded <= binom.ppf(1 - 1e-4, 200, 0.025)
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


@pytest.mark.parametrize("chance", [1 / 32, 1 / 8, 0.5])
@pytest.mark.parametrize("trials", [20, 60, 200])
def test_rate_and_advantage_are_covered_for_every_true_rate(trials: int, chance: float) -> None:
    """Exactly, by the binomial distribution, over a grid of true rates."""
    rates = [measure_rate(k, trials, chance) for k in range(trials + 1)]
    for truth in np.linspace(0.001, 0.999, 97):
        covering = [rate.lower <= truth <= rate.upper for rate in rates]
        advantage = (truth - chance) / (1 - chance)
        covering_advantage = [r.advantage_lower <= advantage <= r.advantage_upper for r in rates]
        assert covering == covering_advantage
        assert float(binom.pmf(np.flatnonzero(covering), trials, truth).sum()) >= 0.95


def test_fewest_hits_are_enough_and_one_less_is_not() -> None:
    for advantage in (0.05, 0.5):
        needed = hits_needed(advantage, 1 / 32)
        assert measure_rate(needed, needed, 1 / 32).advantage_lower > advantage
        fewer = needed - 1
        assert measure_rate(fewer, fewer, 1 / 32).advantage_lower <= advantage


@pytest.mark.parametrize("stop", [1, 7, 20, 50])
def test_an_interval_after_an_early_end_holds_that_of_the_full_run(stop: int) -> None:
    random = np.random.default_rng(0)
    for truth in (0.03, 0.3, 0.8):
        drawn = random.random(60) < truth
        early = measure_rate(int(drawn[:stop].sum()), stop, 1 / 32, planned=60)
        full = measure_rate(int(drawn.sum()), 60, 1 / 32)
        assert early.lower <= full.lower <= full.upper <= early.upper
        assert early.rate == pytest.approx(drawn[:stop].mean())
