"""What one client computes from its images: a gradient, or the update of its local training.

A pure function of images, labels and draws, so that the attacker evaluates it for many candidates
in one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import grad, vmap

from ggl_audit.basics.gradient import Gradient, added, each
from ggl_audit.client.local_training import OPTIMIZERS, clip_norm
from ggl_audit.defenses import Context, Drawn, Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.statistics import Batch, batches_seen
from ggl_audit.messages import Message
from ggl_audit.spec import LocalTrainingSpec

ORDER = "local.order"

CHANGES_UNKNOWN_TARGETS = Message(
    "defense/changes-unknown-targets",
    "{defense} changes images and may change what they are to give, which is not known for a loss "
    "of one's own or a target for each pixel",
    advice="Declare a loss that is known by its name, or leave out the step that mixes or "
    "transforms images.",
)


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
        if defense.training.changes_images and model.mixable_targets_of(first) is None:
            raise SpecError(("defense",), CHANGES_UNKNOWN_TARGETS(defense=defense))
        self._model = model
        self._defense = defense
        self._reduced: Callable[..., tuple[Gradient, Batch]] = grad(self._loss, has_aux=True)
        self._each = vmap(self._one, in_dims=(None, 0, 0, 0, None))

    def draw(self, context: Context, images: int) -> Drawn:
        """What the client draws before it begins."""
        drawn = self._defense.training.draw(context, images)
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
        seen: list[Batch] = []
        if self._model.local is not None:
            sent = self._update(self._model.local, images, labels, drawn, seen)
        else:
            sent = self._gradient(self._model.parameters, images, labels, drawn, seen)
        statistics = self._model.statistics
        return sent if statistics is None else {**sent, **statistics.changes(seen)}

    def _gradient(
        self,
        parameters: Gradient,
        images: torch.Tensor,
        labels: torch.Tensor,
        drawn: Drawn,
        seen: list[Batch],
    ) -> Gradient:
        targets = self._model.targets_of(labels)
        if self._defense.training.changes_images:
            mixable = self._model.mixable_targets_of(labels)
            assert mixable is not None
            images, targets = self._defense.training.transform(
                images, mixable.to(images.dtype), drawn
            )
        if not self._defense.training.per_sample:
            gradient, batch = self._reduced(parameters, images, targets, drawn)
            seen.append(batch)
            return gradient
        order = torch.arange(len(images), device=images.device)
        gradients, batches = self._each(parameters, images, targets, order, drawn)
        seen.append(each(lambda tensor: tensor.mean(0), batches))
        clipped = vmap(self._defense.training.clip_samples)(gradients)
        reduce = torch.sum if self._model.loss_sum else torch.mean
        return each(lambda tensor: reduce(tensor, dim=0), clipped)

    def _update(
        self,
        local: LocalTrainingSpec,
        images: torch.Tensor,
        labels: torch.Tensor,
        drawn: Drawn,
        seen: list[Batch],
    ) -> Gradient:
        before = self._model.parameters
        optimizer = OPTIMIZERS[local.optimizer](local)
        weights, state = before, optimizer.start(before)
        together, step = local.batch_size or len(images), 0
        for epoch in range(local.epochs):
            order = torch.arange(len(images), device=images.device)
            if ORDER in drawn:
                order = drawn[ORDER][epoch]
            parts = order.split(together)
            for start in range(0, len(parts), local.accumulate):
                shares = []
                for part in parts[start : start + local.accumulate]:
                    mine = self._defense.training.drawn_for(drawn, part)
                    share = self._gradient(weights, images[part], labels[part], mine, seen)
                    if local.proximal:
                        share = {
                            name: tensor + local.proximal * (weights[name] - before[name])
                            for name, tensor in share.items()
                        }
                    shares.append(share)
                gradient = each(lambda tensor: tensor / local.accumulate, added(shares))
                if local.clip_norm is not None:
                    gradient = clip_norm(gradient, local.clip_norm)
                weights, state = optimizer.step(weights, gradient, state, step)
                step += 1
        return {name: before[name] - weight for name, weight in weights.items()}

    def _one(
        self,
        parameters: Gradient,
        image: torch.Tensor,
        target: torch.Tensor,
        index: torch.Tensor,
        drawn: Drawn,
    ) -> tuple[Gradient, Batch]:
        mine = self._defense.training.drawn_for(drawn, index[None])
        return self._reduced(parameters, image[None], target[None], mine)

    def _loss(
        self, parameters: Gradient, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, Batch]:
        module = self._model.module
        with batches_seen(module, self._model.statistics) as batch:
            loss = self._model.loss(parameters, images, targets, drawn)
        return loss + self._defense.training.penalty(module), batch
