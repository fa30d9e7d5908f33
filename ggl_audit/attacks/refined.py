"""The latent search's pictures, refined by derivatives (after GIFD; Fang et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ggl_audit.attack.analytic import representation
from ggl_audit.attack.refine import refine, refinement_steps
from ggl_audit.attacks.attack import Advance, Attack, Attempt
from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.basics.gradient import Gradient
from ggl_audit.optimizers import DERIVATIVE_COST


class Refined(Attack):
    """The search's latents, then the generator's features, then the pixels."""

    name = "refined"
    source = "then its features and the pixels (after GIFD; Fang et al., ICCV 2023)"
    by_derivatives = True

    def why_not(self) -> str:
        """Derivatives of the matching distance have to lead somewhere."""
        return self.case.why_no_derivatives

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
        shown = representation(case.model, observed) if declared.representation else None
        nearer = case.derivatives(declared.distance, shown, declared.representation)
        latents = before[GenerativeGradientLeakage.name].latents
        assert latents is not None
        found = refine(case.prior, nearer, latents, labels, observed, declared.steps, advance)
        return Attempt(found.images, found.losses)
