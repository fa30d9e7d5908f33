"""The null control: the same attack on a gradient that holds nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ggl_audit.basics.gradient import Gradient, each, norm, unstack
from ggl_audit.defenses import Context, Noise, Pipeline


def median_norm(gradients: Gradient) -> float:
    """The median norm of n gradients, stacked."""
    return float(np.median([float(norm(gradient)) for gradient in unstack(gradients)]))


def null_gradient(
    observed: Gradient, defense: Pipeline, context: Context, usual_norm: float
) -> Gradient:
    """A random gradient that went through the declared defense and has the observed norm.

    Guo et al. (TPAMI 2026) attack noise in place of the gradient: what still comes out is the
    prior and the label, not the gradient.

    Args:
        observed: what the null is a control of.
        defense: the declared steps.
        context: the client's randomness.
        usual_norm: of a gradient before the defense, which the random one is given.
    """
    observed, clear = defense.clear.parted(observed)
    nothing = each(torch.zeros_like, observed)

    def random() -> Gradient:
        drawn = Noise(std=1.0).apply(nothing, context)
        size = usual_norm / norm(drawn)
        return each(lambda tensor: tensor * size, drawn)

    plain, *earlier = (random() for _ in range(1 + defense.earlier_rounds))
    defended = defense.apply(plain, replace(context, earlier=earlier))
    if not bool(norm(defended) > 0):  # as where no value reaches a threshold
        defended = plain
    null = _of_norm(defended, norm(observed))
    if not clear:
        return null
    drawn = Noise(std=1.0).apply(each(torch.zeros_like, clear), context)
    return {**null, **_of_norm(drawn, norm(clear))}


def _of_norm(gradient: Gradient, length: torch.Tensor) -> Gradient:
    scale = length / norm(gradient)
    return each(lambda tensor: tensor * scale, gradient)
