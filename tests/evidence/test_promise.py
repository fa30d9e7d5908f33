from __future__ import annotations

import numpy as np
import pytest
import torch

from ggl_audit.evidence.bounds import empirical_mu, measure_rate
from ggl_audit.evidence.promise import CANDIDATES, Identifier, cancelling, farthest, pool_size


def test_the_farthest_are_large_and_unlike_each_other() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(50, 8)).Q.T
    small = 0.1 * torch.randn(100, 50)
    near = directions.repeat_interleave(4, 0) + 0.01 * torch.randn(32, 50)
    rows = torch.cat([small, near])
    chosen = farthest(rows, rows.norm(dim=1), 8)
    assert len(set(chosen.tolist())) == 8
    assert bool((chosen >= 100).all())
    assert sorted(((chosen - 100) // 4).tolist()) == list(range(8))


def test_companions_cancel_better_than_most_draws() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(60, 200) + 1
    random = np.random.default_rng(0)
    chosen = cancelling(gradients, 3, random)
    size = float(gradients[chosen].sum(0).norm())
    drawn = [float(gradients[torch.randperm(60)[:3]].sum(0).norm()) for _ in range(200)]
    assert size < np.quantile(drawn, 0.1)
    assert len(cancelling(gradients, 0, random)) == 0


def identified(mu: float, offset: float, trials: int, seed: int) -> int:
    """Hits on releases of a mechanism with exactly this mu and a constant offset."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    contributions = torch.linalg.qr(torch.randn(300, CANDIDATES)).Q.T
    shift = offset * torch.randn(300)
    identifier = Identifier(contributions)
    hits = 0
    for truth in random.integers(CANDIDATES, size=trials):
        release = contributions[truth] + shift + torch.randn(300) / mu
        hits += identifier.guess(release, random) == int(truth)
    return hits


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_a_mechanism_that_keeps_its_promise_is_rarely_accused(mu: float, offset: float) -> None:
    accused = 0
    for seed in range(60):
        rate = measure_rate(identified(mu, offset, 100, seed), 100, 1 / CANDIDATES)
        accused += empirical_mu(rate) > mu
    assert accused <= 4


def test_an_offset_is_learned_and_does_not_drown_the_differences() -> None:
    plain = sum(identified(3.0, 0.0, 200, seed) for seed in range(3))
    shifted = sum(identified(3.0, 5.0, 200, seed) for seed in range(3))
    assert shifted > 0.85 * plain


def test_the_pool_fits_its_memory() -> None:
    assert pool_size(1000) == 640
    assert pool_size(11_000_000) * 11_000_000 * 4 <= 2 * 512 * 2**20
    assert pool_size(10**9) == 2 * CANDIDATES
