from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ggl_audit.evidence.bounds import empirical_mu, measure_rate
from ggl_audit.evidence.promise import (
    CANDIDATES,
    cancelling,
    farthest,
    guesses,
    largest,
    pool_size,
    scores_of,
    smallest,
)


def test_the_farthest_are_large_and_unlike_each_other() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(50, 8)).Q.T
    small = 0.1 * torch.randn(100, 50)
    near = directions.repeat_interleave(4, 0) + 0.01 * torch.randn(32, 50)
    rows = torch.cat([small, near])
    likely = largest(rows.norm(dim=1))
    chosen = likely[farthest(rows[likely], 8)]
    assert len(set(chosen.tolist())) == 8
    assert bool((chosen >= 100).all())
    assert sorted(((chosen - 100) // 4).tolist()) == list(range(8))


def test_companions_cancel_better_than_most_draws() -> None:
    """The best of 64 draws is not below the quantile of 15 % in one of 30,000 attempts."""
    torch.manual_seed(0)
    gradients = torch.randn(60, 200) + 1
    random = np.random.default_rng(0)
    chosen = cancelling(gradients, 3, random)
    size = float(gradients[chosen].sum(0).norm())
    drawn = [float(gradients[torch.randperm(60)[:3]].sum(0).norm()) for _ in range(1000)]
    assert size < np.quantile(drawn, 0.15)
    assert len(cancelling(gradients, 0, random)) == 0


def identified(mu: float, offset: float, trials: int, seed: int) -> int:
    """Hits on releases of a mechanism with exactly this mu and a constant offset."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    contributions = torch.linalg.qr(torch.randn(300, CANDIDATES)).Q.T
    shift = offset * torch.randn(300)
    truths = random.integers(CANDIDATES, size=trials)
    releases = [contributions[truth] + shift + torch.randn(300) / mu for truth in truths]
    scores = [scores_of(contributions, release) for release in releases]
    return int((np.array(guesses(scores, random.random(trials))) == truths).sum())


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_a_mechanism_that_keeps_its_promise_is_rarely_accused(mu: float, offset: float) -> None:
    """In at most one of 40 audits; a right one fails here once in 10,000."""
    accused = 0
    for seed in range(60):
        rate = measure_rate(identified(mu, offset, 100, seed), 100, 1 / CANDIDATES)
        accused += empirical_mu(rate) > mu
    assert accused <= binom.ppf(1 - 1e-4, 60, 0.025)


def test_an_offset_is_learned_and_does_not_drown_the_differences() -> None:
    plain = sum(identified(3.0, 0.0, 200, seed) for seed in range(3))
    shifted = sum(identified(3.0, 5.0, 200, seed) for seed in range(3))
    assert shifted > 0.85 * plain


def test_the_pool_fits_its_memory() -> None:
    for memory in (2**24, 2**28, 2**32):
        for parameters in (10_000, 1_000_000, 3_000_000):
            pool = pool_size(memory // (2 * 4 * parameters))
            held = len(largest(torch.rand(pool)))
            assert pool in (2 * CANDIDATES, 640) or 0.9 < 8 * parameters * held / memory <= 1
            assert len(smallest(torch.rand(pool))) <= held
    assert pool_size(2**15) == 640
    assert pool_size(0) == 2 * CANDIDATES
