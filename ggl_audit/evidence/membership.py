"""Is a given image among those that a release is made of, when the others are unknown?

The ceiling hands the attacker all other members of a batch or a cohort, which bounds everybody. A
server that sees a sum over clients knows none of them. To it their share is a random variable, a
sum of many independent ones and so nearly Gaussian, whose mean and covariance public images tell.
The likelihood under that Gaussian is the statistic; it is no bound, and earns no grade.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ggl_audit.basics.device import widened

LARGEST_POOL = 256
RELATIVE_FLOOR = 1e-10


def public_images(room: int) -> int:
    """How many public images the population is estimated from.

    Args:
        room: how many of their gradients may be held.
    """
    return max(16, min(LARGEST_POOL, room))


class UnknownMembers:
    """The share of unknown members of a release, as public images have it.

    The covariance is that of one half of the public images in the directions that these span, and
    isotropic elsewhere, with the variance that the other half has there.

    Args:
        public: (r, size), what single public images contribute.
        members: how many images a release is made of.
        divisor: what their sum is divided by.
        noise: the standard deviation of the noise on the release.
    """

    def __init__(self, public: torch.Tensor, members: int, divisor: int, noise: float) -> None:
        public = widened(public)
        self._weight = 1 / divisor
        others = self._weight * (members - 1)
        mean = public.mean(0)
        self._others = others * mean
        public -= mean
        spanning, held_out = public.chunk(2)
        _, values, directions = torch.linalg.svd(spanning, full_matrices=False)
        spread = self._weight**2 * (members - 1)
        self._variances = spread * values.square() / max(1, len(spanning) - 1)
        self._directions = directions
        least = RELATIVE_FLOOR * float(self._variances.sum()) / public.shape[1]
        outside = (row - (directions @ row) @ directions for row in held_out)
        beyond = sum(float(row.square().mean()) for row in outside) / len(held_out)
        self._floor = max(noise**2 + spread * beyond, least, 1e-30)

    def log_likelihoods(
        self, candidates: Iterable[torch.Tensor], release: torch.Tensor
    ) -> torch.Tensor:
        """How likely a release is with each of n candidates in it, up to a constant.

        Args:
            candidates: what each contributes, (size,), of which one is held at a time.
            release: (size,).

        Returns:
            (n,).
        """
        known = widened(release) - self._others
        return torch.stack([self._of_rest(known - self._weight * one) for one in candidates])

    def _of_rest(self, rest: torch.Tensor) -> torch.Tensor:
        along = self._directions @ rest
        outside = rest - along @ self._directions
        inside = (along.square() / (self._floor + self._variances)).sum()
        likelihood: torch.Tensor = -(inside + outside.square().sum() / self._floor) / 2
        return likelihood
