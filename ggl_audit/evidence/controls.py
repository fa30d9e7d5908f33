"""The null control: the same attack on a gradient that holds nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from ggl_audit.defenses import Context, Noise, Pipeline
from ggl_audit.gradient import Gradient, each, norm


def null_gradient(observed: Gradient, defense: Pipeline, context: Context) -> Gradient:
    """A random gradient that went through the declared defense and has the observed norm.

    Guo et al. (TPAMI 2026) attack noise in place of the gradient: what still comes out is the
    prior and the label, not the gradient.
    """
    nothing = each(torch.zeros_like, observed)
    random, *earlier = (
        Noise(std=1.0).apply(nothing, context) for _ in range(1 + defense.earlier_rounds)
    )
    defended = defense.apply(random, replace(context, earlier=earlier))
    scale = norm(observed) / norm(defended)
    return each(lambda tensor: tensor * scale, defended)
