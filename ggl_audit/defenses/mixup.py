"""Mixing of the images of a batch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.special import betaincinv

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, DataDefense, Drawn

WEIGHT = "mixup.weight"


class Mixup(DataDefense):
    """Trains on weighted means of two images and of their labels, with one weight for a batch.

    Each image is mixed with the next of the batch, the last with the first; the order of a batch
    carries no meaning. The weight w follows Beta(alpha, alpha); the image itself gets the larger of
    w and 1 - w, as the other way round is the same batch in reverse order. Usual settings: alpha
    0.2 to 1 (Zhang et al., ICLR 2018, sections 3.1 and 3.2). It does nothing to a single image.
    """

    name: ClassVar[str] = "mixup"
    source: ClassVar[str] = "Zhang et al., ICLR 2018"
    broken_by: ClassVar[str] = "the mixed label shows in the gradient (Wang et al., ICLR 2024)"

    alpha: float = Field(default=1.0, gt=0, description="of the Beta distribution of the weight")
    tries: int = Field(default=8, ge=1, description="number of weights that the attacker tries")

    def draw(self, context: Context, images: int) -> Drawn:
        """Draws the weight of the image itself, a scalar in [0.5, 1]."""
        random, device = context.generator, context.generator.device
        seed = int(torch.randint(2**62, (), generator=random, device=device))
        weight = np.random.default_rng(seed).beta(self.alpha, self.alpha)
        return {WEIGHT: torch.tensor(max(weight, 1 - weight), device=device)}

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        """The middles of as many intervals of [0.5, 1], all as probable as one another."""
        middles = (np.arange(self.tries) + 0.5) / self.tries
        weights = betaincinv(self.alpha, self.alpha, (1 + middles) / 2)
        return [{WEIGHT: torch.tensor(float(weight))} for weight in weights]

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes images and labels with those that come next in the batch."""

        def mixed(values: torch.Tensor) -> torch.Tensor:
            weight = drawn[WEIGHT].to(values)
            return weight * values + (1 - weight) * values.roll(-1, 0)

        return mixed(images), mixed(targets)
