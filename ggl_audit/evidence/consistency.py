"""Does the capture fit the model, the declaration and the private image, where that is held?"""

from __future__ import annotations

import torch
from scipy.special import chdtri

from ggl_audit.attack.matching import Matching
from ggl_audit.defenses import FALSE_ACCUSATION, Check, Pipeline, noise_norm
from ggl_audit.gradient import Gradient, flat, norm, stack, unstack

PRIVATE_IMAGE = "the private image"
DECLARED = "the declaration"
LARGEST_DISTANCE, SMALLEST_LIMIT = 0.05, 1e-4
"""Squared and relative; other hardware's rounding stays far below."""

NEAR_OTHERS, SHARE_OF_OTHERS = 0.1, 0.1
COMPARED, TOGETHER = 64, 16


def check_truth(
    matching: Matching,
    defense: Pipeline,
    observed: Gradient,
    truth: torch.Tensor,
    others: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> Check:
    """Compares the capture with what the private images give under the declaration.

    What is left between the capture and the images' own defended gradient must be the declared
    noise: a chi-squared variable, judged on both sides at 1e-6 (Laplace noise: from above); or
    nothing, without noise. Without noise it must also be ten times nearer than the nearest tenth is
    of what other images give, each in the place of one of them and with its label, which may be
    near too. A wrong picture, model, mode, normalization or loss scale shows here, and so does
    noise of another strength.

    Args:
        matching: of the client's model.
        defense: the declared steps, of which nothing but noise may follow noise.
        observed: the capture.
        truth: (channels, height, width); (k, ...) for a release of k images, client by client.
        others: public images to compare with.
        labels: (k,), of the images; without, that of the one image which leaves the least.
    """
    truths = truth.reshape(-1, *truth.shape[-3:])
    tried = torch.arange(matching.model.classes, device=truth.device)[:, None]
    if labels is not None:
        tried = labels[None]

    def remainders(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(labels) > TOGETHER:
            pairs = zip(images.split(TOGETHER), labels.split(TOGETHER), strict=True)
            return torch.cat([remainders(*pair) for pair in pairs])
        replicas = unstack(matching.replicas(images, labels, stack([observed] * len(labels))))
        return torch.stack([norm({n: r[n] - observed[n] for n in observed}) for r in replicas])

    own = remainders(truths.expand(len(tried), *truths.shape), tried)
    remainder, own_labels = float(own.min()), tried[own.argmin()]
    if noise_norm(defense.steps, 1, 0.5):
        return _noise_check(defense, remainder, flat(observed).numel())
    size = norm(observed)
    distance = float((own.min() / size) ** 2)
    exchanged = truths.repeat(len(others[:COMPARED]), 1, 1, 1, 1)
    for index, other in enumerate(others[:COMPARED]):
        exchanged[index, index % len(truths)] = other
    around = (remainders(exchanged, own_labels.expand(len(exchanged), -1)) / size) ** 2
    near = SHARE_OF_OTHERS * float(around.quantile(NEAR_OTHERS))
    limit = max(SMALLEST_LIMIT, min(LARGEST_DISTANCE, near))
    whose = "its" if len(truths) == 1 else "their"
    detail = (
        f"{whose} own defended gradient is at a relative distance of {distance:.2g}; "
        f"at most {limit:.2g} is {whose} own"
    )
    return Check(PRIVATE_IMAGE, "agrees" if distance <= limit else "contradicts", detail)


def check_remainder(defense: Pipeline, replica: Gradient, observed: Gradient) -> Check:
    """Compares a release with the replica of the very images that it was made of.

    Args:
        defense: the declared steps, of which nothing but noise may follow noise.
        replica: of the images.
        observed: the release.
    """
    difference = norm({name: replica[name] - observed[name] for name in observed})
    if noise_norm(defense.steps, 1, 0.5):
        return _noise_check(defense, float(difference), flat(observed).numel())
    distance = float((difference / norm(observed)) ** 2)
    detail = f"the declared defense is at a relative distance of {distance:.2g} from what it sends"
    return Check(DECLARED, "agrees" if distance <= SMALLEST_LIMIT else "contradicts", detail)


def _noise_check(defense: Pipeline, remainder: float, count: int) -> Check:
    high = noise_norm(defense.steps, count, 1 - FALSE_ACCUSATION / 2)
    noise = defense.total_noise()
    gaussian = noise is not None and noise.distribution == "gaussian"
    low = noise.std * chdtri(count, 1 - FALSE_ACCUSATION / 2) ** 0.5 if noise and gaussian else 0
    detail = (
        f"its own gradient leaves a remainder of norm {remainder:.4g}; "
        f"the declared noise is between {low:.4g} and {high:.4g}"
    )
    return Check(PRIVATE_IMAGE, "agrees" if low <= remainder <= high else "contradicts", detail)
