"""Does the client's own code keep the promise of differential privacy?

The promise is for every image, so it is tested where it is hardest to keep: on candidates, of any
class and with any label, whose contributions are as large and as unlike each other as can be found.
Natural images of one class have much alike in their gradients and would hide most faults.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ggl_audit.basics.device import widened

CANDIDATES = 8
LARGEST_POOL = 640
WARM_UP = 10
SETS_COMPARED = 64


def pool_size(room: int) -> int:
    """How many possible candidates are tried, a quarter of which are held twice.

    Args:
        room: how many gradients may be held, each twice.
    """
    return max(2 * CANDIDATES, min(LARGEST_POOL, 4 * room))


def largest(norms: torch.Tensor) -> torch.Tensor:
    """The quarter with the largest gradients, of which candidates are chosen; (m,), indices.

    A clip that comes too late, or that bounds the wrong thing, shows most in them.

    Args:
        norms: (n,), of the gradients before any defense.
    """
    return norms.topk(max(CANDIDATES, len(norms) // 4)).indices


def smallest(norms: torch.Tensor) -> torch.Tensor:
    """The quarter with the smallest gradients, of which companions are; (m,), indices.

    Args:
        norms: (n,), of the gradients before any defense.
    """
    return norms.topk(max(1, len(norms) // 4), largest=False).indices


def farthest(contributions: torch.Tensor, count: int) -> torch.Tensor:
    """Chooses rows by pivoted Gram-Schmidt: each has the most that the earlier ones do not have.

    Args:
        contributions: (n, size), what each adds to a release under the declaration.
        count: at most n.

    Returns:
        (count,), indices.
    """
    rest = contributions.clone()
    chosen = []
    for _ in range(count):
        index = int(rest.norm(dim=1).argmax())
        chosen.append(index)
        direction = rest[index] / rest[index].norm().clamp(min=1e-30)
        for row in rest:
            row -= (row @ direction) * direction
        rest[index] = 0
    return torch.tensor(chosen, device=contributions.device)


def cancelling(gradients: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    """Chooses companions whose gradients cancel, so that one more image stands out of the batch.

    Args:
        gradients: (n, size), before any defense.
        count: how many.
        random: draws the sets that are compared.

    Returns:
        (count,), indices.
    """
    sets = torch.as_tensor(
        random.integers(len(gradients), size=(SETS_COMPARED, count)), device=gradients.device
    )
    sums = torch.stack([gradients[members].sum(0).norm() for members in sets])
    return sets[int(sums.argmin())]


def scores_of(contributions: torch.Tensor, release: torch.Tensor) -> list[float]:
    """How well each candidate explains a release, less what it would if the release were its own.

    The score of a candidate is its inner product with the release, as for a likelihood.

    Args:
        contributions: (N, size), what each candidate adds to a release under the declaration.
        release: (size,).

    Returns:
        N scores.
    """
    seen = widened(release)
    inner = torch.stack([widened(row) @ seen for row in contributions])
    expected = torch.stack([widened(row).square().sum() / 2 for row in contributions])
    return [float(score) for score in inner - expected]


def guesses(scores: Sequence[Sequence[float]], lots: Sequence[float]) -> list[int]:
    """Guesses which candidate made each release, and learns the client's offset on the way.

    A client with a fault adds an offset to all releases that would otherwise drown the differences,
    so what a score has been on average is taken off. Each guess uses earlier releases only, so that
    a client that keeps its promise is identified with at most the promised probability in every
    single trial, and the exact binomial interval keeps its lower end (the hits are dominated by
    independent ones).

    Args:
        scores: of N candidates in each release, as :func:`scores_of` gives them.
        lots: drawn evenly from [0, 1), which break ties.

    Returns:
        A candidate's index for each release.
    """
    found = []
    table = np.array(scores, dtype=np.float64)
    for place, (row, lot) in enumerate(zip(table, lots, strict=True)):
        usual = table[:place].mean(axis=0) if place >= WARM_UP else 0.0
        standing = row - usual
        best = np.flatnonzero(standing == standing.max())
        found.append(int(best[int(lot * len(best))]))
    return found
