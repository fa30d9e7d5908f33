"""Derivatives of the matching distance, for the attacks that follow them."""

from __future__ import annotations

import torch
from torch.func import grad_and_value, vmap

from ggl_audit.attack.matching import COPIES_OF_A_GRADIENT, Distance, cosine
from ggl_audit.contribution import Contribution
from ggl_audit.defenses import Drawn, Pipeline, relative_l2
from ggl_audit.gradient import Gradient, each
from ggl_audit.inputs.model import ClientModel

HELD_BYTES = 2**28

COPIES = 3 * COPIES_OF_A_GRADIENT
"""Of a gradient, while it is differentiated once more."""


class Derivatives:
    """Distances of sets of images to observed gradients, and how they change with each pixel.

    By the smooth replica (:meth:`Pipeline.smooth`).

    Args:
        model: the client's.
        defense: to replicate.
        distance: ``l2`` or ``cosine``.
    """

    def __init__(self, model: ClientModel, defense: Pipeline, distance: Distance) -> None:
        self._batch_size = model.batch_size
        self._defense = defense
        self._contribution = Contribution(model, defense)
        self._measure = cosine if distance == "cosine" else relative_l2
        self._sloped = vmap(grad_and_value(self._distance))
        self._together = max(1, HELD_BYTES // (COPIES * 4 * model.size))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compares one set of images with each of t observed gradients.

        Args:
            images: (t, k, channels, height, width) in [0, 1].
            labels: (t, k).
            observed: tensors with a leading dimension t.

        Returns:
            The distances (t,), and their derivatives, shaped as the images.
        """
        with torch.no_grad():
            drawn = vmap(self._defense.guesses)(observed)[0]
        slopes, distances = [], []
        for start in range(0, len(labels), self._together):
            part = slice(start, start + self._together)
            seen, guess = (each(lambda tensor: tensor[part], one) for one in (observed, drawn))  # noqa: B023
            slope, distance = self._sloped(images[part], labels[part], seen, guess)
            slopes.append(slope)
            distances.append(distance)
        return torch.cat(distances).detach(), torch.cat(slopes).detach()

    def _distance(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient, drawn: Drawn
    ) -> torch.Tensor:
        size = min(self._batch_size, len(labels))
        gradients = [
            self._contribution(own, labelled, drawn)
            for own, labelled in zip(images.split(size), labels.split(size), strict=True)
        ]
        return self._measure(self._defense.smooth(gradients, observed), observed)
