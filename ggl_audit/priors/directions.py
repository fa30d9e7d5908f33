"""The directions of a latent space along which a generator's pictures change most."""

from __future__ import annotations

import torch

from ggl_audit.basics.device import widened, widest_float
from ggl_audit.priors.prior import Prior

PLACES = 8
"""Latents at which the changes are looked at: the origin, and random ones."""

STEP = 0.1
"""How far a coordinate is moved to see what that changes, in prior deviations."""


def principal_directions(prior: Prior, label: int, count: int) -> torch.Tensor:
    """Computes the leading eigenvectors of the mean of J^T J, J how pixels change with a latent.

    Wang and Ponce, The Geometry of Deep Generative Image Models, ICLR 2021, section 2.

    Args:
        prior: draws the pictures.
        label: that they are drawn for.
        count: k.

    Returns:
        (k, d), orthonormal.
    """
    random = torch.Generator().manual_seed(0)
    device = next(prior.generator.parameters(), torch.zeros(0)).device
    places = torch.randn(PLACES, prior.size, generator=random).to(device)
    places[0] = 0
    products = torch.zeros(prior.size, prior.size, dtype=widest_float(device), device=device)
    with torch.no_grad():
        for place in places:
            moves = STEP * torch.eye(prior.size, device=device)
            latents = torch.cat([place + moves, place - moves])
            labels = torch.full((len(latents),), label, device=device)
            ahead, behind = widened(prior.decode(latents, labels).flatten(1)).chunk(2)
            changes = (ahead - behind) / (2 * STEP)
            products += changes @ changes.T
    vectors: torch.Tensor = torch.linalg.eigh(products).eigenvectors
    return vectors.flip(1)[:, :count].T.to(places)
