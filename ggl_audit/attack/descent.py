"""Descent on whatever makes pictures: latents, a generator's features, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.basics.gradient import Gradient
from ggl_audit.optimizers import DERIVATIVE_COST

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Descent:
    """How to descend.

    Attributes:
        steps: of Adam (Kingma and Ba, ICLR 2015), each a candidate with its derivative.
        step: the first, in the variable's own units; falls to zero by half a cosine.
        variation: weight of the pictures' total variation, a mean over neighbouring pixels, against
            the matching distance.
        pixels: whether the variables are pixels, which stay in [0, 1].
        by_sign: whether only the signs of derivatives count, as in Inverting Gradients (Geiping et
            al., NeurIPS 2020).
    """

    steps: int
    step: float
    variation: float = 0.0
    pixels: bool = False
    by_sign: bool = False


@dataclass(frozen=True)
class Found:
    """What t descents found.

    Attributes:
        variables: (t, ...), at the least sum of distance and variation.
        images: (t, k, channels, height, width) in [0, 1], of these.
        losses: (t,), the distances.
    """

    variables: torch.Tensor
    images: torch.Tensor
    losses: torch.Tensor


def descend(
    start: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    derivatives: Derivatives,
    labels: torch.Tensor,
    observed: Gradient,
    descent: Descent,
    advance: Advance,
) -> Found:
    """Descends from t starts, each towards an observed gradient of its own.

    Args:
        start: (t, ...), the variables.
        decode: from these to images (t, k, channels, height, width) in [0, 1].
        derivatives: of the distance by the pixels.
        labels: (t, k).
        observed: tensors with a leading dimension t.
        descent: how.
        advance: told after each step how many candidates it was worth.
    """
    variable = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([variable], lr=descent.step)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, descent.steps))
    best_scores = torch.full((len(labels),), torch.inf, device=labels.device)
    best = Found(start, decode(start.detach()).detach(), best_scores)
    for _ in range(descent.steps):
        with torch.enable_grad():
            images = decode(variable)
            variation = total_variation(images)
            distances, slopes = derivatives(images.detach(), labels, observed)
            adam.zero_grad()
            ((images * slopes).sum() + descent.variation * variation.sum()).backward()
        scores = distances + descent.variation * variation.detach()
        better = scores < best_scores
        best_scores = torch.where(better, scores, best_scores)
        best = Found(
            _where(better, variable.detach(), best.variables),
            _where(better, images.detach(), best.images),
            torch.where(better, distances, best.losses),
        )
        assert variable.grad is not None
        variable.grad.nan_to_num_(0.0, 0.0, 0.0)
        if descent.by_sign:
            variable.grad.sign_()
        adam.step()
        if descent.pixels:
            variable.data.clamp_(0, 1)
        falling.step()
        advance(DERIVATIVE_COST * len(labels))
    return best


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """The mean difference of neighbouring pixels, summed over both directions; (t, ...) to (t,)."""
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


def _where(which: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(which.view(-1, *[1] * (new.ndim - 1)), new, old)
