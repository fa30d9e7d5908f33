from __future__ import annotations

import torch
from torch import nn

from ggl_audit.priors.directions import principal_directions
from ggl_audit.priors.latents import DeclaredLatents
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import LatentSpec


class Stretching(nn.Module):
    """A linear generator, whose singular vectors are known."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.turned = torch.linalg.qr(torch.randn(5, 5, generator=random)).Q
        self.spread = torch.linalg.qr(torch.randn(16, 5, generator=random)).Q
        self.sizes = torch.tensor([0.05, 0.01, 0.04, 0.02, 0.03])

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        drawn: torch.Tensor = (latents @ self.turned.T * self.sizes) @ self.spread.T
        return drawn.view(-1, 1, 4, 4)


def test_of_a_linear_generator_they_are_the_singular_vectors() -> None:
    generator = Stretching()
    prior = Prior(generator, DeclaredLatents(LatentSpec(shape=[5])), None, "a toy")
    found = principal_directions(prior, 0, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-5)
    expected = generator.turned[[0, 2, 4]]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(3), rtol=0, atol=1e-3)
