"""What the steps do while a client computes its gradient: to data, model and each sample."""

from __future__ import annotations

import torch
from torch import nn

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, DataDefense, Drawn, ModelDefense, Place
from ggl_audit.defenses.capabilities import Draws, DrawsForEachImage
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.replica import usual


class Training:
    """The steps that act before there is a client's gradient.

    Attributes:
        changes_images: whether a step acts on the data.
        per_sample: whether a step acts on each sample's gradient.
    """

    def __init__(self, chain: Chain) -> None:
        self._drawing = [step for step in chain.steps if isinstance(step, Draws)]
        of_images = [step for step in chain.steps if isinstance(step, DrawsForEachImage)]
        self._rows = {name for step in of_images for name in step.drawn_for_each_image}
        self._on_data = [step for step in chain.steps if isinstance(step, DataDefense)]
        self._on_model = [step for step in chain.steps if isinstance(step, ModelDefense)]
        on_samples = [step for step in chain.steps if step.place is Place.SAMPLE]
        self._of_samples = [usual(step) for step in on_samples]
        self.changes_images = bool(self._on_data)
        self.per_sample = bool(on_samples)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Adds to the client's model what the steps need.

        Raises:
            ValueError: the model has no place for it.
        """
        for step in self._on_model:
            module = step.wrap(module)
        return module

    def draw(self, context: Context, images: int) -> Drawn:
        """What a client draws before it computes the gradient of so many images."""
        drawn: Drawn = {}
        for step in self._drawing:
            drawn |= step.draw(context, images)
        return drawn

    def drawn_for(self, drawn: Drawn, images: torch.Tensor) -> Drawn:
        """The draws for some images of a batch.

        Args:
            drawn: for all of them.
            images: (n,), indices.
        """
        return {
            name: tensor[images] if name in self._rows and len(tensor) > 1 else tensor
            for name, tensor in drawn.items()
        }

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the steps on the data make of a batch."""
        for step in self._on_data:
            images, targets = step.transform(images, targets, drawn)
        return images, targets

    def penalty(self, module: nn.Module) -> torch.Tensor | float:
        """What the steps on the model add to the loss, right after a forward pass."""
        return sum((step.penalty(module) for step in self._on_model), 0.0)

    def clip_samples(self, gradient: Gradient) -> Gradient:
        """What the steps on each sample make of one sample's gradient."""
        for of_sample in self._of_samples:
            gradient = of_sample(gradient, None)
        return gradient
