"""What one client computes from its images: a gradient, or the update of its local training.

A pure function of images, labels and draws, so that the attacker evaluates it for many candidates
in one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import grad, vmap

from ggl_audit.defenses import Context, Drawn, Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.gradient import Gradient, each
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import LocalTrainingSpec

ORDER = "local.order"


class Contribution:
    """One client's share, before the defense of the whole.

    Args:
        model: the client's model, and how it is trained.
        defense: its steps on the data, on the model and on each sample act in here.

    Raises:
        SpecError: the defense changes targets that cannot be changed.
    """

    def __init__(self, model: ClientModel, defense: Pipeline) -> None:
        first = torch.zeros(1, dtype=torch.long, device=model.device)
        if defense.changes_images and model.mixable_targets_of(first) is None:
            raise SpecError(
                ("defense",),
                f"{defense} changes images and may change what they are to give, which is not "
                "known for a loss of one's own or a target for each pixel",
            )
        self._model = model
        self._defense = defense
        self._reduced: Callable[..., Gradient] = grad(self._loss)
        self._each = vmap(self._one, in_dims=(None, 0, 0, 0, None))

    def draw(self, context: Context, images: int) -> Drawn:
        """What the client draws before it begins."""
        drawn = self._defense.draw(context, images)
        local = self._model.local
        if local is not None and local.order == "shuffled":
            generator = context.generator
            orders = [
                torch.randperm(images, generator=generator, device=generator.device)
                for _ in range(local.epochs)
            ]
            drawn[ORDER] = torch.stack(orders)
        return drawn

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> Gradient:
        """Computes the share.

        Args:
            images: (n, channels, height, width) in [0, 1].
            labels: (n,).
            drawn: by the client, or what the attacker takes it for.
        """
        if self._model.local is not None:
            return self._update(self._model.local, images, labels, drawn)
        return self._gradient(self._model.parameters, images, labels, drawn)

    def _gradient(
        self, parameters: Gradient, images: torch.Tensor, labels: torch.Tensor, drawn: Drawn
    ) -> Gradient:
        targets = self._model.targets_of(labels)
        if self._defense.changes_images:
            mixable = self._model.mixable_targets_of(labels)
            assert mixable is not None
            images, targets = self._defense.transform(images, mixable.to(images.dtype), drawn)
        if not self._defense.per_sample:
            return self._reduced(parameters, images, targets, drawn)
        order = torch.arange(len(images), device=images.device)
        gradients = self._each(parameters, images, targets, order, drawn)
        clipped = vmap(self._defense.clip_samples)(gradients)
        reduce = torch.sum if self._model.loss_sum else torch.mean
        return each(lambda tensor: reduce(tensor, dim=0), clipped)

    def _update(
        self,
        local: LocalTrainingSpec,
        images: torch.Tensor,
        labels: torch.Tensor,
        drawn: Drawn,
    ) -> Gradient:
        before = self._model.parameters
        weights, velocity = dict(before), each(torch.zeros_like, before)
        together = local.batch_size or len(images)
        for epoch in range(local.epochs):
            order = torch.arange(len(images), device=images.device)
            if ORDER in drawn:
                order = drawn[ORDER][epoch]
            for part in order.split(together):
                mine = self._defense.drawn_for(drawn, part)
                gradient = self._gradient(weights, images[part], labels[part], mine)
                for name, weight in weights.items():
                    pull = local.weight_decay * weight + local.proximal * (weight - before[name])
                    velocity[name] = local.momentum * velocity[name] + gradient[name] + pull
                    weights[name] = weight - local.lr * velocity[name]
        return {name: before[name] - weight for name, weight in weights.items()}

    def _one(
        self,
        parameters: Gradient,
        image: torch.Tensor,
        target: torch.Tensor,
        index: torch.Tensor,
        drawn: Drawn,
    ) -> Gradient:
        mine = self._defense.drawn_for(drawn, index[None])
        return self._reduced(parameters, image[None], target[None], mine)

    def _loss(
        self, parameters: Gradient, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> torch.Tensor:
        loss = self._model.loss(parameters, images, targets, drawn)
        return loss + self._defense.penalty(self._model.module)
