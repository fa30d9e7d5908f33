"""The image read off the first layer (Geiping et al., NeurIPS 2020, proposition 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ggl_audit.attack.analytic import is_exact, recover_input
from ggl_audit.attacks.attack import Advance, Attack, Attempt
from ggl_audit.basics.gradient import Gradient, stack
from ggl_audit.case.capture import Capture


class Analytic(Attack):
    """A quotient of gradients; nothing is searched for."""

    name = "analytic"
    source = "read off the first layer (Geiping et al., NeurIPS 2020, proposition 3.1)"
    turn = 3

    def why_not(self) -> str:
        """The model has to begin with a linear layer, and the release to be of one image."""
        if self.case.members > 1:
            return "the release is of several images"
        if recover_input(self.case.model, stack([self.case.audited.observed])) is None:
            return "the model does not begin with a linear layer that has a bias"
        return ""

    def evaluations(self) -> int:
        """None: there are no candidates."""
        return 0

    def attack(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        before: Mapping[str, Attempt],
        advance: Advance,
    ) -> Attempt:
        """Reads the image of each gradient off it."""
        recovered = recover_input(self.case.model, observed)
        assert recovered is not None
        matching = self.case.matching(distance=self.case.spec.attack.distance)
        sets = recovered[:, None, None], labels[:, None]
        return Attempt(recovered[:, None], matching.distances(*sets, observed)[:, 0])

    def is_exact(self, capture: Capture, attempt: Attempt) -> bool:
        """Whether the first picture's own gradient is the captured one, to rounding."""
        case, rounding = self.case, capture.fitted.rounding
        labels = torch.tensor(capture.labels, device=case.model.device)
        observed = stack([capture.observed])
        picture, memory = attempt.images[:1, 0], case.clients.memory
        found = is_exact(case.model, case.defense, picture, labels, observed, rounding, memory)
        return bool(found[0])
