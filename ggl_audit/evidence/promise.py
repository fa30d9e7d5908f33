"""Does the client's own code keep the promise of differential privacy?

The promise is for every image, so it is tested where it is hardest to keep: on candidates, of any
class and with any label, whose contributions are as large and as unlike each other as can be found.
Natural images of one class have much alike in their gradients and would hide most faults.
"""

from __future__ import annotations

import numpy as np
import torch

CANDIDATES = 8
LARGEST_POOL = 640
POOL_BYTES = 512 * 2**20
WARM_UP = 10
SETS_COMPARED = 64


def pool_size(parameters: int) -> int:
    """How many possible candidates are tried, in the memory that they may take."""
    return max(2 * CANDIDATES, min(LARGEST_POOL, POOL_BYTES // (4 * parameters)))


def farthest(contributions: torch.Tensor, norms: torch.Tensor, count: int) -> torch.Tensor:
    """Chooses rows by pivoted Gram-Schmidt: each has the most that the earlier ones do not have.

    Only the quarter with the largest gradients is chosen from: a clip that comes too late, or that
    bounds the wrong thing, shows most in them.

    Args:
        contributions: (n, size), what each adds to a release under the declaration.
        norms: (n,), of the gradients before any defense.
        count: at most n.

    Returns:
        (count,), indices.
    """
    largest = norms.topk(max(count, len(norms) // 4)).indices
    rest = contributions[largest]
    chosen = []
    for _ in range(count):
        index = int(rest.norm(dim=1).argmax())
        chosen.append(index)
        direction = rest[index] / rest[index].norm().clamp(min=1e-30)
        rest -= (rest @ direction)[:, None] * direction
        rest[index] = 0
    return largest[torch.tensor(chosen, device=contributions.device)]


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


class Identifier:
    """Guesses which candidate a release was made with, and learns the client's offset on the way.

    The score of a candidate is its inner product with the release, as for a likelihood, less what
    the score has been on average: a client with a fault adds an offset to all releases that would
    otherwise drown the differences. Each guess uses earlier releases only, so that a client that
    keeps its promise is identified with at most the promised probability in every single trial, and
    the exact binomial interval keeps its lower end (the hits are dominated by independent ones).

    Args:
        contributions: (N, size), what each candidate adds to a release under the declaration.
    """

    def __init__(self, contributions: torch.Tensor) -> None:
        self._contributions = contributions.double()
        self._expected = self._contributions.square().sum(1) / 2
        self._total = torch.zeros_like(self._expected)
        self._seen = 0

    def guess(self, release: torch.Tensor, random: np.random.Generator) -> int:
        """The index of the candidate that explains a release best; ties are broken by lot.

        Args:
            release: (size,).
            random: the lot.
        """
        scores = self._contributions @ release.double()
        usual = self._total / self._seen if self._seen >= WARM_UP else self._expected
        self._total += scores
        self._seen += 1
        standing = scores - usual
        return int(random.choice(torch.nonzero(standing == standing.max()).flatten().cpu().numpy()))
