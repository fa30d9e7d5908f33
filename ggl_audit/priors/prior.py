"""A prior: a generator, what it takes, and images in [0, 1] out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.messages import Said
from ggl_audit.priors.latents import LatentSpace

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's ``convert("L")``."""


@dataclass(frozen=True)
class Conversion:
    """From a generator's output to the images that the model takes.

    Attributes:
        output_range: the generator's values for black and white.
        colour: what is done to the channels; None for nothing.
        resize: height and width to resize to; None for nothing.
    """

    output_range: tuple[float, float] = (-1.0, 1.0)
    colour: Literal["grey_to_rgb", "rgb_to_grey"] | None = None
    resize: tuple[int, int] | None = None

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Maps (n, channels, height, width) to images in [0, 1]; what is beyond is cut off."""
        black, white = self.output_range
        images = ((output - black) / (white - black)).clamp(0, 1)
        if self.colour == "grey_to_rgb":
            images = images.expand(-1, 3, -1, -1)
        elif self.colour == "rgb_to_grey":
            luma = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
            images = (images * luma.view(3, 1, 1)).sum(dim=1, keepdim=True)
        if self.resize is not None:
            images = F.interpolate(
                images, self.resize, mode="bilinear", antialias=True, align_corners=False
            ).clamp(0, 1)
        return images


@dataclass(frozen=True)
class Prior:
    """A generator whose latent space can be searched.

    The search runs in standard normal coordinates of dimension ``size`` whatever the generator's
    own latents are; :meth:`decode` maps them.

    Attributes:
        generator: the module, in eval mode, on its device.
        space: from coordinates to latents.
        classes: the number of labels it knows, or None when it takes no label.
        source: what it is, for the report.
        labels: what it takes for a label; of no matter where it takes none.
        embedding: (classes, features), for labels: embedding.
        conversion: from its output to the model's images.
        seen: fingerprints of the images it was trained on; None where they are not known.
        doubts: why its pictures may not be what it was trained to draw.
    """

    generator: nn.Module
    space: LatentSpace
    classes: int | None
    source: str
    labels: Literal["index", "one_hot", "embedding"] = "index"
    embedding: torch.Tensor | None = None
    conversion: Conversion = Conversion()
    seen: frozenset[int] | None = None
    doubts: tuple[Said, ...] = ()

    @property
    def size(self) -> int:
        """The number of latent coordinates."""
        return self.space.size

    def inputs(self, latents: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the generator is called with: its own latents, and its own form of the labels."""
        own = self.space(latents)
        if self.classes is None:
            return (own,)
        if self.labels == "one_hot":
            return own, F.one_hot(labels, self.classes).to(own.dtype)
        return own, labels if self.embedding is None else self.embedding[labels].to(own.dtype)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps latents to images.

        Args:
            latents: (n, size), standard normal coordinates.
            labels: (n,), class indices; not used by an unconditional generator.

        Returns:
            (n, channels, height, width) in [0, 1].
        """
        output: torch.Tensor = self.generator(*self.inputs(latents, labels))
        return self.conversion(output.to(latents.dtype))
