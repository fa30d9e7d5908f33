"""Models and generators of the known answers, as a user's own file."""

from pathlib import Path

import torch
from torch import nn

from ggl_audit.priors.loading import bundled_folder, load_trained


def tiny_cnn(batch_norm: bool = False) -> nn.Module:
    """Three convolutions, two of one shape, and two linear layers: about 5,000 parameters."""
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 2), (8, 2), (8, 1)):
        layers.append(nn.Conv2d(inputs, 8, 3, stride=stride, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(8))
        layers.append(nn.ReLU())
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(8 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, 10)
    )


class OtherDomain(nn.Module):
    """A good generator of another domain: bundled digits in black on white, lying on their side."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = load_trained(Path(bundled_folder() / "digits")).generator

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -self.generator(latents, labels).transpose(2, 3)


class Broken(nn.Module):
    """Draws the same grey whatever the latent."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(latents), 1, 16, 16) + 0 * latents.sum()
