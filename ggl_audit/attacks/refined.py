"""The latent search's pictures, refined by derivatives (after GIFD; Fang et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ggl_audit.attack.refine import refine, refinement_steps
from ggl_audit.attacks.attack import Advance, Attempt
from ggl_audit.attacks.by_derivatives import ByDerivatives
from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.basics.gradient import Gradient
from ggl_audit.optimizers import DERIVATIVE_COST


class Refined(ByDerivatives):
    """The search's latents, then the generator's features, then the pixels."""

    name = "refined"
    source = "then its features and the pixels (after GIFD; Fang et al., ICCV 2023)"
    turn = 1

    def evaluations(self) -> int:
        """The steps of Adam, shared out evenly among its stages."""
        steps = self.case.spec.attack.steps
        return DERIVATIVE_COST * refinement_steps(self.case.prior, steps)

    def attack(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        before: Mapping[str, Attempt],
        advance: Advance,
    ) -> Attempt:
        """Follows derivatives from where the search has ended."""
        case, declared = self.case, self.case.spec.attack
        nearer = self.derivatives(declared.distance, observed)
        latents = before[GenerativeGradientLeakage.name].latents
        assert latents is not None
        found = refine(case.prior, nearer, latents, labels, observed, declared.steps, advance)
        return Attempt(found.images, found.losses)
