"""A prior: a generator, what it takes, and images in [0, 1] out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ggl_audit.inputs.images import Shape
from ggl_audit.spec import LatentSpec


@dataclass(frozen=True)
class Prior:
    """A generator whose latent space can be searched.

    The search runs in standard normal coordinates of dimension ``size`` whatever the generator's
    own latent distribution is; :meth:`decode` maps them.

    Attributes:
        generator: the module, in eval mode, on its device.
        latent: shape and distribution of what the generator takes.
        classes: the number of labels it knows, or None when it takes no label.
        output_range: the generator's values for black and white.
        source: what it is, for the report.
        seen: fingerprints of the images it was trained on; None where they are not known.
    """

    generator: nn.Module
    latent: LatentSpec
    classes: int | None
    output_range: tuple[float, float]
    source: str
    seen: frozenset[int] | None = None

    @property
    def size(self) -> int:
        """The number of latent coordinates."""
        return math.prod(self.latent.shape)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps latents to images.

        Args:
            latents: (n, size), standard normal coordinates.
            labels: (n,), class indices; not used by an unconditional generator.

        Returns:
            (n, channels, height, width) in [0, 1].
        """
        if self.latent.distribution == "uniform":
            latents = torch.erf(latents / math.sqrt(2))  # 2 Phi(z) - 1
        latents = latents.reshape(-1, *self.latent.shape)
        inputs = (latents,) if self.classes is None else (latents, labels)
        black, white = self.output_range
        images: torch.Tensor = (self.generator(*inputs) - black) / (white - black)
        return images.clamp(0, 1)

    def shape(self) -> Shape:
        """The (channels, height, width) of what it draws, found by drawing two images.

        Raises:
            ValueError: it does not draw an image for each latent, or draws what is not finite.
        """
        device = next((p.device for p in self.generator.parameters()), torch.device("cpu"))
        latents = torch.zeros(2, self.size, device=device)
        latents[1] = 1
        with torch.no_grad():
            images = self.decode(latents, torch.zeros(2, dtype=torch.long, device=device))
        if images.ndim != 4 or len(images) != 2:
            raise ValueError(f"it makes {tuple(images.shape)} of two latents")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("it draws values that are NaN or infinite")
        _, channels, height, width = images.shape
        return channels, height, width
