"""Does the capture fit the model, the declaration and the private image, where that is held?"""

from __future__ import annotations

import torch
from scipy.special import chdtri

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, flat, norm, stack, take, unstack
from ggl_audit.defenses import FALSE_ACCUSATION, Check, Pipeline, noise_norm
from ggl_audit.evidence.signs import negated
from ggl_audit.messages import Message

PRIVATE_IMAGE = "the private image"
DECLARED = "the declaration"
LARGEST_DISTANCE, SMALLEST_LIMIT = 0.05, 1e-4
"""Squared and relative; other hardware's rounding stays far below."""

NEAR_OTHERS, SHARE_OF_OTHERS = 0.1, 0.1
COMPARED, TOGETHER = 64, 16

DEVIATIONS = 5
"""The deviations of the noise's measured strength within which a factor is named."""

MOST_TOLERANCE, LEAST_TOLERANCE = 0.05, 1e-3

DISTANCE = Message(
    "contradiction/distance",
    "{its} own defended gradient is at a relative distance of {distance:.2g}; at most {limit:.2g} "
    "is {its} own{times}",
    advice="Check that `evidence.truth` is the very picture (of a batch all of them, in the order "
    "of their labels), then `mode`, `mean` and `std`, the order of channels, the weights' round "
    "and `capture.local`: one of them is not the client's.",
)
PRIVATE_IMAGE_NEGATED = Message(
    "contradiction/private-image-negated",
    "{detail}; negated it agrees: declare the other capture.sign, or negate the file",
    advice="The file holds weights after training minus those before: declare `capture.sign: "
    "after_minus_before`, and `kind: update` with `local` if it is one.",
)
WOULD_AGREE = Message(
    "contradiction/would-agree",
    "{detail}; it would agree if {cause}",
    advice="Declare what the cause says, if it is the client's: see the [likely "
    "causes](#likely-causes).",
)
STATISTICS = Message(
    "contradiction/statistics",
    "its own running statistics are at a relative distance of {distance:.2g} from those that were "
    "sent",
    advice="Check the picture, the statistics before (`model.weights`), `momentum`, the number of "
    "local steps, and what the clip is over.",
)
DECLARED_DEFENSE = Message(
    "contradiction/declared-defense",
    "the declared defense is at a relative distance of {distance:.2g} from what it sends{times}",
    advice="Compare the client's own code with the declared steps, their order and their "
    "parameters.",
)
REMAINDER = Message(
    "contradiction/remainder",
    "its own gradient leaves a remainder of norm {norm:.4g}; the declared noise is between "
    "{low:.4g} and {high:.4g}",
    advice="Check the picture, `mode`, `mean` and `std`, the order of channels and the weights' "
    "round; if the remainder is near the bounds, the noise has another strength than declared.",
)


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
    noise of another strength. Where the negated capture fits, and is ten times nearer, the sign is
    what is wrong, whatever fits as well: of two classes the other sign looks like the other label.

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

    def remainders(
        images: torch.Tensor, labels: torch.Tensor, observed: Gradient = observed
    ) -> torch.Tensor:
        if len(labels) > TOGETHER:
            pairs = zip(images.split(TOGETHER), labels.split(TOGETHER), strict=True)
            return torch.cat([remainders(*pair, observed) for pair in pairs])
        replicas = unstack(matching.replicas(images, labels, stack([observed] * len(labels))))
        return torch.stack([norm({n: r[n] - observed[n] for n in observed}) for r in replicas])

    own = remainders(truths.expand(len(tried), *truths.shape), tried)
    own_labels = tried[own.argmin()]
    mirror = negated(observed)
    mirrored = remainders(truths.expand(len(tried), *truths.shape), tried, mirror)
    if noise_norm(defense.steps, 1, 0.5):

        def check_noise(labels: torch.Tensor, observed: Gradient) -> Check:
            replicas = matching.replicas(truths[None], labels[None], stack([observed]))
            return check_remainder(defense, take(replicas, 0), observed, PRIVATE_IMAGE)

        check = check_noise(own_labels, observed)
        other = check_noise(tried[mirrored.argmin()], mirror)
        return _with_sign(check, other.outcome == "agrees" and check.outcome == "contradicts")
    size = norm(observed)
    distance = float((own.min() / size) ** 2)
    off = ""
    if distance > SMALLEST_LIMIT:
        replica = take(matching.replicas(truths[None], own_labels[None], stack([observed])), 0)
        off = _times(defense, replica, observed)
    exchanged = truths.repeat(len(others[:COMPARED]), 1, 1, 1, 1)
    for index, other in enumerate(others[:COMPARED]):
        exchanged[index, index % len(truths)] = other
    around = (remainders(exchanged, own_labels.expand(len(exchanged), -1)) / size) ** 2
    near = SHARE_OF_OTHERS * float(around.cpu().quantile(NEAR_OTHERS))
    limit = max(SMALLEST_LIMIT, min(LARGEST_DISTANCE, near))
    whose = "its" if len(truths) == 1 else "their"
    agrees = distance <= limit
    said = DISTANCE(its=whose, distance=distance, limit=limit, times="" if agrees else off)
    check = Check(PRIVATE_IMAGE, "agrees" if agrees else "contradicts", said)
    mirrored_distance = float((mirrored.min() / size) ** 2)
    nearer = mirrored_distance < SHARE_OF_OTHERS * distance
    return _with_sign(check, mirrored_distance <= limit and nearer)


def _with_sign(check: Check, negated_fits: bool) -> Check:
    """Names the sign as what is wrong, where it is."""
    if not negated_fits:
        return check
    return Check(check.step, "contradicts", PRIVATE_IMAGE_NEGATED(detail=check.detail))


def check_remainder(
    defense: Pipeline, replica: Gradient, observed: Gradient, step: str = DECLARED
) -> Check:
    """Compares a release with the replica of the very images that it was made of.

    Args:
        defense: the declared steps, of which nothing but noise may follow noise.
        replica: of the images.
        observed: the release.
        step: what it is a check of.
    """
    left = {name: replica[name] - observed[name] for name in observed}
    if noise_norm(defense.steps, 1, 0.5):
        noisy, clear = defense.clear.parted(left)
        _, shown = defense.clear.parted(observed)
        away = float((norm(clear) / norm(shown)) ** 2) if clear else 0.0
        if not away <= max(SMALLEST_LIMIT, defense.clear.rounding):
            return Check(step, "contradicts", STATISTICS(distance=away))
        return _noise_check(defense, float(norm(noisy)), flat(noisy).numel(), step)
    difference = norm(left)
    distance = float((difference / norm(observed)) ** 2)
    if distance <= SMALLEST_LIMIT:
        return Check(step, "agrees", DECLARED_DEFENSE(distance=distance, times=""))
    times = _times(defense, replica, observed)
    return Check(step, "contradicts", DECLARED_DEFENSE(distance=distance, times=times))


def _times(defense: Pipeline, replica: Gradient, observed: Gradient) -> str:
    """How many times the replica the capture is, where it is that and nothing else."""
    own, seen = widened(flat(replica)), widened(flat(observed))
    factor = float(own @ seen / (own @ own).clamp(min=1e-300))
    if factor <= 0 or float((seen - factor * own).square().sum() / (seen @ seen)) > SMALLEST_LIMIT:
        return ""
    return f"; it is {factor:.3g} times that{defense.checks.factors.name(factor, LEAST_TOLERANCE)}"


def _noise_check(defense: Pipeline, remainder: float, count: int, step: str) -> Check:
    high = noise_norm(defense.steps, count, 1 - FALSE_ACCUSATION / 2)
    noise = defense.randomness.total_noise()
    gaussian = noise is not None and noise.distribution == "gaussian"
    low = noise.std * chdtri(count, 1 - FALSE_ACCUSATION / 2) ** 0.5 if noise and gaussian else 0
    said = REMAINDER(norm=remainder, low=low, high=high)
    if low <= remainder <= high:
        return Check(step, "agrees", said)
    if noise is not None:
        std = remainder / count**0.5
        tolerance = min(MOST_TOLERANCE, LEAST_TOLERANCE + DEVIATIONS * (2 * count) ** -0.5)
        name = defense.checks.factors.name(std / noise.std, tolerance)
        fits = f": a std of {std:.3g} would fit" if name else ""
        said = said.followed_by(f"; it is {std / noise.std:.3g} of the declared{name}{fits}")
    return Check(step, "contradicts", said)
