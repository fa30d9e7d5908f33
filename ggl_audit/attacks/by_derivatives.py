"""What attacks have in common that follow derivatives of the matching distance."""

from __future__ import annotations

import torch

from ggl_audit.attack.analytic import representation
from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.matching import Distance
from ggl_audit.attacks.attack import Attack
from ggl_audit.basics.gradient import Gradient, stack
from ggl_audit.case.case import Case


class ByDerivatives(Attack):
    """An attack whose candidates are evaluated with their derivatives."""

    by_derivatives = True

    def why_not(self) -> str:
        """Derivatives of the matching distance have to lead somewhere."""
        return why_no_derivatives(self.case)

    def derivatives(self, distance: Distance, observed: Gradient) -> Derivatives:
        """What it follows: those of the distance, and of the representation where declared."""
        weight = self.case.spec.attack.representation
        shown = representation(self.case.model, observed) if weight else None
        return derivatives_of(self.case, distance, shown, weight)


def derivatives_of(
    case: Case, distance: Distance, shown: torch.Tensor | None = None, weight: float = 0.0
) -> Derivatives:
    """Derivatives of the matching distance, within the memory."""
    return Derivatives(case.model, case.defense, distance, shown, weight, case.spec.memory_bytes)


def why_no_derivatives(case: Case) -> str:
    """Says why derivatives of the matching distance lead nowhere; empty where they do not."""
    random = torch.Generator().manual_seed(0)
    shape = (1, case.members, *case.model.shape)
    images = torch.rand(shape, generator=random).to(case.model.mean)
    observed = stack([case.audited.observed])
    try:
        _, slopes = derivatives_of(case, "l2")(images, case.audited.repeated_labels(1), observed)
    except (Exception, SystemExit) as error:
        # The model, the loss or a step of the defense is the user's own code.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the gradient cannot be differentiated once more ({reason})"
    if not bool(slopes.isfinite().all()) or not bool(slopes.any()):
        return "the replica of the defense has no derivative to follow"
    return ""
