from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu
from torch.utils._python_dispatch import TorchDispatchMode

from ggl_audit.optimizers import Evaluation
from ggl_audit.optimizers.cma import DiagonalCma
from ggl_audit.optimizers.pycma import DiagonalCovariance

CPU = torch.device("cpu")
SEEDS = range(13)
Function = Callable[[torch.Tensor], torch.Tensor]


def sphere(x: torch.Tensor) -> torch.Tensor:
    return (x - 0.7).square().sum(-1)


def ellipsoid(x: torch.Tensor) -> torch.Tensor:
    """Along the axes, with a condition of 10,000."""
    return ((x - 0.7).square() * torch.logspace(0, 4, x.shape[-1], dtype=x.dtype)).sum(-1)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    first, second = x[..., :-1], x[..., 1:]
    return (100 * (second - first.square()).square() + (1 - first).square()).sum(-1)


def curve_of_ours(function: Function, d: int, population: int, batches: int) -> torch.Tensor:
    """log10 of each search's least loss after each batch, (batches, searches)."""
    search = DiagonalCma(d, population, 0.3, SEEDS, CPU)
    least = []
    for _ in range(batches):
        losses = function(search.ask())
        least.append(losses.amin(1))
        search.tell(Evaluation(losses))
    return torch.stack(least).cummin(0).values.log10()


def curve_of_pycma(function: Function, d: int, population: int, batches: int) -> torch.Tensor:
    """The same of PyCMA."""
    least = torch.zeros(batches, len(SEEDS))
    for number, seed in enumerate(SEEDS):
        search = DiagonalCovariance(d, population, 0.3, seed)
        for batch in range(batches):
            losses = function(torch.from_numpy(search.ask())).numpy()
            least[batch, number] = float(losses.min())
            search.tell(losses)
    return least.cummin(0).values.log10()


@pytest.mark.parametrize(
    ("function", "d", "population", "evaluations"),
    [
        (sphere, 10, 10, 800),
        (ellipsoid, 10, 10, 1500),
        (rosenbrock, 10, 10, 1500),
        (sphere, 48, 12, 1800),
        (ellipsoid, 48, 12, 3600),
        (rosenbrock, 48, 12, 1800),
    ],
)
def test_it_finds_as_much_as_pycma(
    function: Function, d: int, population: int, evaluations: int
) -> None:
    """With a tenth more candidates neither finds less than the other.

    Two of equal speed fail in less than one of 5,000 draws of their seeds. Over 60 seeds ours is
    a twentieth slower on the sphere in 10 dimensions; on the ellipsoid no difference is seen.
    """
    batches = evaluations // population
    more = batches * 11 // 10
    ours = curve_of_ours(function, d, population, more)
    theirs = curve_of_pycma(function, d, population, more)
    for one, other in ((ours, theirs), (theirs, ours)):
        less = mannwhitneyu(one[more - 1], other[batches - 1], alternative="greater")
        assert less.pvalue > 1e-4


class NoHostRoundTrips(TorchDispatchMode):
    """Fails where a value is read on the CPU, which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_value_of_a_candidate_is_read_on_the_cpu() -> None:
    search = DiagonalCma(6, 8, 0.3, range(3), CPU)
    with NoHostRoundTrips():
        for _ in range(70):
            search.tell(Evaluation(sphere(search.ask())))
        search.recommend()
        with pytest.raises(AssertionError):
            search.recommend().sum().item()


def test_only_a_search_that_has_converged_starts_anew() -> None:
    def losses_of(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([sphere(x[0]), x[1].abs().sum(-1) + 1e4 * x[1].square().sum(-1)])

    search = DiagonalCma(2, 6, 0.3, [0, 1], CPU)
    spreads, near = [], []
    for _ in range(300):
        asked = search.ask()
        spreads.append(asked.std(1).amax(1))
        near.append((asked.mean(1)[0] - 0.7).norm())
        search.tell(Evaluation(losses_of(asked)))
    spread = torch.stack(spreads)
    anew = (spread[1:] > 100 * spread[:-1]).sum(0)
    assert (anew >= 1).all()
    first = int((spread[1:, 0] > 100 * spread[:-1, 0]).nonzero()[0])
    assert near[first] < 1e-3
    assert near[first + 1] > 0.1
    # A flat population tells nothing more, wherever the search is.
    flat = DiagonalCma(2, 6, 0.3, [0], CPU)
    flat.ask()
    flat.tell(Evaluation(torch.ones(1, 6)))
    assert flat.recommend().norm() > 0.1
