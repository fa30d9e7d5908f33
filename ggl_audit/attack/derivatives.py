"""Derivatives of the matching distance, for the attacks that follow them."""

from __future__ import annotations

import torch
from torch.func import grad_and_value, vmap

from ggl_audit.attack.layers import slices
from ggl_audit.attack.matching import Distance, cosine
from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.basics.replay import Replayed
from ggl_audit.client.contribution import Contribution
from ggl_audit.client.gradients import COPIES_OF_A_GRADIENT, MEMORY, ClientGradients
from ggl_audit.defenses import Drawn, Pipeline, relative_l2
from ggl_audit.inputs.model import ClientModel

COPIES = 3 * COPIES_OF_A_GRADIENT
"""The copies of a gradient that are held while it is differentiated once more."""


class Derivatives:
    """Distances of sets of images to observed gradients, and how they change with each pixel.

    By the smooth replica (``Pipeline.replica``).

    Args:
        model: the client's.
        defense: to replicate.
        distance: ``l2`` or ``cosine``.
        shown: (t, features), what each observed gradient shows that the head took
            (:func:`ggl_audit.attack.analytic.representation`), for gradients of one image.
        weight: of an extra term, the squared relative distance of what it takes of the candidate
            from that.
        memory: bytes that candidates' gradients may take at a time, about.
    """

    def __init__(
        self,
        model: ClientModel,
        defense: Pipeline,
        distance: Distance,
        shown: torch.Tensor | None = None,
        weight: float = 0.0,
        memory: int = MEMORY,
    ) -> None:
        self._model = model
        self._shown = shown
        self._weight = weight
        self._batch_size = model.batch_size
        self._defense = defense
        self._contribution = Contribution(model, defense)
        self._measure = cosine if distance == "cosine" else relative_l2
        self._sloped = Replayed(vmap(grad_and_value(self._distance)))
        self._together = max(1, ClientGradients(model, defense, memory).room(COPIES))

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
            drawn = vmap(self._defense.replica.guesses)(observed)[0]
        slopes, distances = [], []
        for part in slices(len(labels), self._together):
            seen, guess = (each(lambda tensor: tensor[part], one) for one in (observed, drawn))  # noqa: B023
            shown = () if self._shown is None else (self._shown[part],)
            slope, distance = self._sloped(images[part], labels[part], seen, guess, *shown)
            slopes.append(slope)
            distances.append(distance)
        return torch.cat(distances).detach(), torch.cat(slopes).detach()

    def _distance(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        drawn: Drawn,
        shown: torch.Tensor | None = None,
    ) -> torch.Tensor:
        size = min(self._batch_size, len(labels))
        gradients = [
            self._contribution(own, labelled, drawn)
            for own, labelled in zip(images.split(size), labels.split(size), strict=True)
        ]
        distance = self._measure(self._defense.replica.smooth(gradients, observed), observed)
        taken = None if shown is None else self._model.representation(images)
        if taken is None or shown is None:
            return distance
        # Where it is zero, the gradient held nothing.
        away = torch.where(shown == 0, 0.0, taken[0] - shown).square().sum()
        return distance + self._weight * away / shown.square().sum().clamp(min=1e-30)
