"""Does the capture fit the model, the declaration and the private image, where that is held?"""

from __future__ import annotations

import torch
from scipy.stats import chi2

from ggl_audit.attack.matching import Matching
from ggl_audit.defenses import FALSE_ACCUSATION, Check, Pipeline, noise_norm
from ggl_audit.gradient import Gradient, flat, norm, take

LARGEST_DISTANCE = 0.05
"""Squared and relative; other hardware's rounding stays far below, another image far above."""


def check_truth(
    matching: Matching, defense: Pipeline, observed: Gradient, truth: torch.Tensor
) -> Check:
    """Compares the capture with what the private image gives under the declaration.

    What is left between the capture and the image's own defended gradient must be the declared
    noise: a chi-squared variable, judged on both sides at 1e-6 (Laplace noise: from above); or
    nothing, without noise. The
    label with the smallest remainder counts. A wrong picture, model, mode, normalization or loss
    scale shows here, and so does noise of another strength.

    Args:
        matching: of the client's model.
        defense: the declared steps, of which nothing but noise may follow noise.
        observed: the capture.
        truth: (channels, height, width).
    """
    classes = matching.model.classes
    labels = torch.arange(classes, device=truth.device)
    gradients = matching.gradients(truth.expand(classes, *truth.shape), labels)
    remainders = []
    for label in range(classes):
        replica = defense.replicate(take(gradients, label), observed)
        remainders.append(norm({name: replica[name] - observed[name] for name in observed}))
    remainder = float(torch.stack(remainders).min())
    size = flat(observed).numel()
    high = noise_norm(defense.steps, size, 1 - FALSE_ACCUSATION / 2)
    step = "the private image"
    if high:
        noise = defense.total_noise()
        gaussian = noise is not None and noise.distribution == "gaussian"
        low = noise.std * chi2.ppf(FALSE_ACCUSATION / 2, size) ** 0.5 if noise and gaussian else 0
        detail = (
            f"its own gradient leaves a remainder of norm {remainder:.4g}; "
            f"the declared noise is between {low:.4g} and {high:.4g}"
        )
        return Check(step, "agrees" if low <= remainder <= high else "contradicts", detail)
    distance = (remainder / float(norm(observed))) ** 2
    detail = f"its own defended gradient is at a relative distance of {distance:.2g}"
    return Check(step, "agrees" if distance <= LARGEST_DISTANCE else "contradicts", detail)
