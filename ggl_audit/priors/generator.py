"""The generator that ``ggl-audit prior train`` trains, conditional or not."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ggl_audit.errors import ReasonError
from ggl_audit.messages import Message

LARGEST_START = 7
SLOPE = 0.2

CANNOT_BE_HALVED = Message(
    "training/cannot-be-halved",
    "size {size} cannot be halved down to 4 to {largest} pixels; 16, 20, 24, 28, 32, 40, 48, 56 "
    "and 64 can",
    advice="Resize or crop the images to one of these sizes.",
)


class Architecture(BaseModel):
    """What decides the networks' shapes; stands in the card of a trained prior.

    Attributes:
        channels: 1 or 3.
        size: height and width in pixels, such that halving leads to 4 to 7 pixels.
        classes: the labels are 0 to classes - 1; None for a generator that takes no label.
        latent: the dimension of the latent, standard normal.
        width: feature maps of the first block; each further block has half as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[int, Field(ge=1, le=4)]
    size: Annotated[int, Field(ge=8, le=128)]
    classes: Annotated[int, Field(ge=1, le=10_000)] | None
    latent: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=8, le=1024)] = 48

    @model_validator(mode="after")
    def _size_can_be_halved(self) -> Architecture:
        if not 4 <= self.start <= LARGEST_START:
            raise ReasonError(CANNOT_BE_HALVED(size=self.size, largest=LARGEST_START))
        return self

    @property
    def doublings(self) -> int:
        """How often the start is doubled to reach the size."""
        count, size = 0, self.size
        while size > LARGEST_START and size % 2 == 0:
            count, size = count + 1, size // 2
        return count

    @property
    def start(self) -> int:
        """The size of the first feature maps."""
        return self.size >> self.doublings

    @property
    def groups(self) -> int:
        """The parts of the data with a code distribution each: the classes, or all as one."""
        return self.classes or 1


def activate(features: torch.Tensor) -> torch.Tensor:
    """The leaky rectifier of all networks here."""
    return F.leaky_relu(features, SLOPE)


class Generator(nn.Module):
    """Latent and label to an image in [-1, 1], each computed by itself: no batch statistics.

    A latent first becomes a code of its class, ``code_mean + code_axes @ latent``: a Gaussian with
    the mean and covariance that the class' training images have in the code space, along its
    principal axes. So standard normal latents draw the class, and a search starts in its middle.
    Without classes all images are of one group, and no labels are given.
    """

    code_mean: torch.Tensor
    code_axes: torch.Tensor

    def __init__(self, architecture: Architecture, hidden: int = 128) -> None:
        super().__init__()
        self.architecture = architecture
        groups, latent = architecture.groups, architecture.latent
        doublings = architecture.doublings
        widths = [max(16, architecture.width >> i) for i in range(doublings)]
        self.register_buffer("code_mean", torch.zeros(groups, latent))
        self.register_buffer("code_axes", torch.eye(latent).repeat(groups, 1, 1))
        self.hidden = nn.Linear(latent + groups, hidden)
        self.spread = nn.Linear(hidden, widths[0] * architecture.start**2)
        # Each convolution makes four maps for one, which pixel_shuffle lays out at twice the size.
        self.blocks = nn.ModuleList(
            nn.Conv2d(before, 4 * after, 3, padding=1) for before, after in pairwise(widths)
        )
        self.output = nn.Conv2d(widths[-1], 4 * architecture.channels, 3, padding=1)
        initialize(self)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (n, latent) and (n,) to (n, channels, size, size) in [-1, 1].

        Raises:
            ValueError: there are classes, but no labels are given.
        """
        if labels is None:
            if self.architecture.classes is not None:
                raise ValueError("a conditional generator takes latents and labels")
            labels = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        turned = torch.bmm(self.code_axes[labels], latents[:, :, None])[:, :, 0]
        return self.decode(self.code_mean[labels] + turned, labels)

    def decode(self, codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps codes (n, latent) and labels (n,) to images."""
        start = self.architecture.start
        labels_hot = F.one_hot(labels, self.architecture.groups).to(codes.dtype)
        features = activate(self.hidden(torch.cat([codes, labels_hot], dim=1)))
        features = activate(self.spread(features)).unflatten(1, (-1, start, start))
        for block in self.blocks:
            features = activate(F.pixel_shuffle(block(features), 2))
        return torch.tanh(F.pixel_shuffle(self.output(features), 2))


def initialize(network: nn.Module) -> None:
    """He initialization for the leaky rectifier, biases zero."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
