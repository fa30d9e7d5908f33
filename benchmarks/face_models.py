"""The models of the face benchmark: the client's random CNN, and the generator that is searched."""

from __future__ import annotations

import torch
from torch import nn


def small_cnn(classes: int = 2) -> nn.Module:
    """Three strided convolutions and a linear head for 32x32 colour, about 58,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, classes),
    )


class FaceGenerator(nn.Module):
    """The DCGAN of celeba32_dcgan_fletchersarip.pt, latents of 100 values in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.generator_deconv = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(100, 256, 4, bias=False), nn.BatchNorm2d(256)),
            _block(nn.Conv2d(256, 128, 3, padding=1, bias=False), 128),
            _block(nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), 64),
            _block(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), 32),
            nn.Sequential(nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Draws images (n, 3, 32, 32) in [-1, 1] from latents (n, 100)."""
        images: torch.Tensor = self.generator_deconv(latents.view(-1, 100, 1, 1))
        return images


def _block(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2))
