"""An attack without any prior, so that a weak generator cannot hide a leak."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.descent import Advance, Descent, Found, descend
from ggl_audit.basics.gradient import Gradient
from ggl_audit.inputs.model import ClientModel

GREY, SPREAD = 0.5, 0.1
"""Brightness of the noise that it starts from: mean and standard deviation."""

STEP, VARIATION = 0.05, 1e-2
"""See :class:`Descent`. On undefended faces 0.1 and 0.001 give 24.6 and 23.2 dB, this 29.6."""


def attack_pixels(
    model: ClientModel,
    derivatives: Derivatives,
    labels: torch.Tensor,
    observed: Gradient,
    steps: int,
    randoms: Sequence[np.random.Generator],
    advance: Advance,
) -> Found:
    """Searches the pixels: cosine distance and total variation, by the signs of derivatives.

    Inverting Gradients (Geiping et al., NeurIPS 2020, section 4).

    Args:
        model: takes the images.
        derivatives: of the cosine distance.
        labels: (t, k).
        observed: tensors with a leading dimension t.
        steps: of Adam.
        randoms: t streams, for the noise that each starts from.
        advance: told of the candidates.
    """
    shape = (labels.shape[1], *model.shape)
    noise = torch.as_tensor(np.stack([one.standard_normal(shape) for one in randoms]))
    start = (GREY + SPREAD * noise).clamp(0, 1).to(labels.device, torch.float32)
    descent = Descent(steps, STEP, VARIATION, pixels=True, by_sign=True)
    return descend(start, torch.clone, derivatives, labels, observed, descent, advance)
