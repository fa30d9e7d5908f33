"""What the gradient of the last layer tells by itself, without a picture of the image.

With softmax cross-entropy and one image, the gradients of the head's weight and bias are s (p - y)
h^T and s (p - y), with the representation h, the prediction p = softmax(W h + b), the label y and
the loss' scale s (Zhao et al., iDLG, 2020). The quotient of the two is h, and h gives p: an
equation that knows neither the image nor the rest of the model, and that holds for no other scale,
no other weights of the head and no more images than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ggl_audit.attack.labels import infer_labels
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.gradient import Gradient, stack
from ggl_audit.inputs.model import ClientModel

MODEL_AND_LOSS = "the declared model and loss"
ROUNDINGS = 25
"""What may be off, in roundings of the file's numbers."""

CLEAR_RANK, FINE_RANK, LEAST_ROUNDING, MOST_ROUNDING = 0.02, 1e-5, 0.1, 0.3
"""Relative, of singular values and of the scale; with more rounding than the last nothing is told.
"""

COARSE, LOGIT_ROUNDINGS = 2**-7, 5
"""One image's gradient that is not of rank one to the second of these was computed in bfloat16,
whose rounding of the logits comes in full into p."""

SMALLEST = 1e-3
"""Of the largest value: below, half precision may have lost too much."""

ERROR_ROUNDING = 1e-6
"""Of p - y in single precision, absolute."""


@dataclass(frozen=True)
class LastLayer:
    """What the head's gradient looks like.

    Attributes:
        rank: the number of singular values clearly above rounding: it is of this many images at
            least.
        fine_rank: the number of those above the file's own rounding.
        full: the largest rank that the head's gradient could have.
        rounding: what may be off, relative.
        scale: s, for one image and a head with a bias; None where it cannot be told.
        misfit: how far the gradient is from s (p - y), relative; None where it cannot be told.
    """

    rank: int
    fine_rank: int
    full: int
    rounding: float
    scale: float | None = None
    misfit: float | None = None


def look_at_last_layer(model: ClientModel, observed: Gradient, rounding: float) -> LastLayer | None:
    """Takes the gradient of the head apart.

    Args:
        model: with softmax cross-entropy.
        observed: a gradient.
        rounding: of the file's numbers, relative.

    Returns:
        None where the model has no linear head, or its gradient is too small to tell.
    """
    head = model.head
    if head is None or not bool(observed[head.bias or head.weight].abs().max() > SMALLEST):
        return None
    weight = observed[head.weight].double()
    columns = [weight] if head.bias is None else [weight, observed[head.bias].double()[:, None]]
    errors, sizes, _ = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)
    own, rounding = rounding, ROUNDINGS * rounding
    if rounding > MOST_ROUNDING:
        return None
    rank, fine_rank = (
        int((sizes > max(least, rounding) * sizes[0]).sum()) for least in (CLEAR_RANK, FINE_RANK)
    )
    full = min(model.classes - 1, len(sizes))  # the rows of p - y sum to zero
    if rank > 1 or head.bias is None:
        return LastLayer(rank, fine_rank, full, rounding)
    bias = observed[head.bias].double()
    representation = (errors[:, 0] @ weight) / (errors[:, 0] @ bias)
    logits = model.parameters[head.weight].double() @ representation
    error = (logits + model.parameters[head.bias].double()).softmax(0)
    error[infer_labels(stack([observed]), head)] -= 1
    grain = own if fine_rank == 1 else max(own, COARSE)
    rounding = max(LEAST_ROUNDING, rounding) + LOGIT_ROUNDINGS * grain * float(logits.abs().max())
    if rounding > MOST_ROUNDING:
        return LastLayer(rank, fine_rank, full, rounding)
    rounding += ERROR_ROUNDING / float(error.abs().max())
    scale = (bias @ error) / (error @ error)
    misfit = (bias - scale * error).norm() / bias.norm()
    return LastLayer(rank, fine_rank, full, rounding, float(scale), float(misfit))


def check_last_layer(
    model: ClientModel, defense: Pipeline, observed: Gradient, images: int, rounding: float
) -> Check | None:
    """Compares the head's gradient with the declaration.

    Args:
        model: with softmax cross-entropy.
        defense: what the client did to the gradient.
        observed: the gradient.
        images: that it is declared to be of.
        rounding: of the file's numbers, relative.

    Returns:
        None where it cannot be told: the defense does more than to scale the gradient, it is of
        more than one step, there is no linear head, its gradient is too small or rounded too much,
        or so many images may have any rank.
    """
    local = model.local
    steps = 1 if local is None else local.steps(model.batch_size)
    if not defense.only_scales() or steps > 1 or (local is not None and local.weight_decay > 0):
        return None
    seen = look_at_last_layer(model, observed, rounding)
    if seen is None:
        return None
    if seen.rank > min(images, seen.full):
        return Check(
            MODEL_AND_LOSS,
            "contradicts",
            f"its last layer's gradient has the rank {seen.rank}, so it is of {seen.rank} images "
            f"or more, of more than one step, or of none; of {images} by the declaration, and "
            f"cross-entropy gives {seen.full} at most",
        )
    if images > 1 and images >= seen.full:
        return None
    if images > 1 or seen.scale is None or seen.misfit is None:
        return Check(
            MODEL_AND_LOSS, "agrees", f"its last layer's gradient has the rank {seen.rank}"
        )
    if seen.misfit > seen.rounding:
        return Check(
            MODEL_AND_LOSS,
            "contradicts",
            f"its last layer's gradient is {seen.misfit:.0%} off the prediction that the layer's "
            "weights make, so they are of another model or round, or the loss is another",
        )
    declared = model.loss_scale * (1 if local is None else local.lr)
    times = seen.scale / declared
    too_small = times < 1 - seen.rounding and not defense.steps
    wrong = times > 1 + seen.rounding or too_small
    detail = f"its last layer's gradient is {times:.3g} times that of the declared loss"
    if wrong:
        rate = (
            "is it an update with that learning rate"
            if local is None
            else f"capture.local.lr {local.lr * times:.3g}"
        )
        detail += (
            f": model.loss.scale {model.loss_scale * times:.3g} would fit; or {rate}, or are the "
            "weights of another round?"
        )
    return Check(MODEL_AND_LOSS, "contradicts" if wrong else "agrees", detail)
