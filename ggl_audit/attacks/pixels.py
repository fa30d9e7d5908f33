"""The pixels without a prior (Inverting Gradients; Geiping et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attacks.attack import Advance, Attempt
from ggl_audit.attacks.by_derivatives import ByDerivatives
from ggl_audit.basics.gradient import Gradient
from ggl_audit.optimizers import DERIVATIVE_COST


class Pixels(ByDerivatives):
    """Descent on the pixels by the cosine distance and total variation."""

    name = "pixels"
    source = "pixels without a prior (Inverting Gradients; Geiping et al., NeurIPS 2020)"
    turn = 2

    def evaluations(self) -> int:
        """The declared steps of Adam."""
        return DERIVATIVE_COST * self.case.spec.attack.steps

    def attack(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        before: Mapping[str, Attempt],
        advance: Advance,
    ) -> Attempt:
        """Follows derivatives from noise."""
        model, steps = self.case.model, self.case.spec.attack.steps
        aligned = self.derivatives("cosine", observed)
        found = attack_pixels(model, aligned, labels, observed, steps, randoms, advance)
        return Attempt(found.images, found.losses)
