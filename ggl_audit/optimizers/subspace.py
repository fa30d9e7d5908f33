"""A few directions of the latent space, for what can search only a few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ggl_audit.basics.device import widened
from ggl_audit.optimizers.base import Array, Principal
from ggl_audit.spec import SubspaceSpec

BOUND = 2.0
"""The box that is searched, in prior deviations to both sides of the origin, as in GGL."""


@dataclass(frozen=True)
class Subspace:
    """The box around the origin in the span of k orthonormal directions.

    Attributes:
        directions: (k, d).
    """

    directions: Array

    @property
    def dimension(self) -> int:
        """How many directions there are, k."""
        return len(self.directions)

    def latents(self, places: Array) -> Array:
        """Maps places in the unit cube, (..., k), to latents, (..., d)."""
        return (2 * places - 1) * BOUND @ self.directions


def make_subspace(
    declared: SubspaceSpec | None, dimension: int, seed: int, principal: Principal | None
) -> Subspace:
    """Chooses the directions.

    Args:
        declared: how many, and which; without, all of the latent space.
        dimension: of the latent space, d.
        seed: of random directions, which are uniform over all rotations.
        principal: computes principal directions; only needed where they are declared.
    """
    if declared is None:
        return Subspace(np.eye(dimension))
    count = min(declared.dimension, dimension)
    if declared.directions == "principal":
        assert principal is not None
        return Subspace(widened(principal(count)).cpu().numpy())
    drawn = np.random.default_rng(seed).standard_normal((dimension, count))
    return Subspace(np.linalg.qr(drawn).Q.T)
