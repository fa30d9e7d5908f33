"""Does a capture have the sign that is declared? Some tools send after minus before.

The gradient of the last layer's bias is a sum over images of s (p - y) with 0 < p < 1, so it is
below zero for labels of the images alone: for no more values than there are images. That holds for
the sum of several steps too, and for what an optimizer makes of it that divides each value by its
size. With two classes the negated gradient of one image is that of the other label, times the
quotient of their probabilities, which only a scale can tell.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.client.local_training import rate_of_one_step
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.evidence.last_layer import (
    MODEL_AND_LOSS,
    ROUNDINGS,
    check_last_layer,
    look_at_last_layer,
)
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message

NEARER = 10
"""How much nearer a scale has to be, in the logarithm, that speaks for the other sign."""

DECLARE_THE_SIGN = (
    "The file holds weights after training minus those before: declare `capture.sign: "
    "after_minus_before`, and `kind: update` with `local` if it is one."
)
BIAS_NEGATED = Message(
    "contradiction/bias-negated",
    "{count} values of its last layer's bias are below zero, where {images} can be, and negated "
    "it agrees: declare the other capture.sign, or negate the file",
    advice=DECLARE_THE_SIGN,
)
BIAS_BELOW_ZERO = Message(
    "contradiction/bias-below-zero",
    "{count} values of its last layer's bias are below zero, where {images} can be: it is of more "
    "images, or of another loss",
    advice="Declare the number of images in `capture.batch_size`, or the client's loss; only a "
    "label's value can be below zero.",
)
NEGATED = Message(
    "contradiction/negated",
    "negated its last layer's gradient is that of the declared loss: declare the other "
    "capture.sign, or negate the file",
    advice=DECLARE_THE_SIGN,
)
NEARER_NEGATED = Message(
    "contradiction/nearer-negated",
    "negated its last layer's gradient is nearer to that of the declared loss: declare the other "
    "capture.sign, or negate the file",
    advice=DECLARE_THE_SIGN,
)
EITHER_SIGN = Message(
    "check/either-sign",
    "{detail}; of two classes the other sign looks like the other label",
    advice="Nothing shows whether it is the one label, or the other and the sign: make sure of "
    "`capture.sign`, or give `evidence.truth` with `capture.labels`.",
)


def negated(gradient: Gradient) -> Gradient:
    """The same with the other sign."""
    return each(lambda tensor: -tensor, gradient)


def check_last_layer_and_sign(
    model: ClientModel, defense: Pipeline, observed: Gradient, images: int, rounding: float
) -> Check | None:
    """Compares the head's gradient with the declaration, and its negative before a cause is named.

    Args:
        model: with softmax cross-entropy.
        defense: what the client did to the gradient.
        observed: the gradient.
        images: that it is declared to be of.
        rounding: of the file's numbers, relative.

    Returns:
        None where nothing can be told.
    """
    check = check_last_layer(model, defense, observed, images, rounding)
    mirrored = check_last_layer(model, defense, negated(observed), images, rounding)
    below = _below_zero(model, defense, observed, rounding)
    above = _below_zero(model, defense, negated(observed), rounding)
    fits = (mirrored is None or mirrored.outcome == "agrees") and (above or 0) <= images
    if below is not None and below > images:
        if fits:
            said = BIAS_NEGATED(count=below, images=images)
            return Check(MODEL_AND_LOSS, "contradicts", said)
        if check is None or check.outcome == "agrees":
            said = BIAS_BELOW_ZERO(count=below, images=images)
            return Check(MODEL_AND_LOSS, "contradicts", said)
    if check is None or mirrored is None or mirrored.outcome != "agrees":
        return check
    if check.outcome == "contradicts":
        return replace(check, said=NEGATED())
    if model.classes != 2:
        return check
    return _check_scales(model, defense, observed, rounding, check)


def _below_zero(
    model: ClientModel, defense: Pipeline, observed: Gradient, rounding: float
) -> int | None:
    """How many values of the head's bias are below zero by more than rounding."""
    head, local = model.head, model.local
    pulled = local is not None and (local.weight_decay > 0 or local.proximal > 0)
    if head is None or head.bias is None or pulled or not defense.effect.only_scales():
        return None
    bias = observed[head.bias]
    return int((bias < -ROUNDINGS * rounding * bias.abs().max()).sum())


def _check_scales(
    model: ClientModel, defense: Pipeline, observed: Gradient, rounding: float, check: Check
) -> Check:
    """Asks which sign has the declared scale, as with two classes either of them fits."""
    rate = rate_of_one_step(model.local, model.batch_size)
    looks = [look_at_last_layer(model, one, rounding) for one in (observed, negated(observed))]
    scales = [None if look is None else look.scale for look in looks]
    clips = bool(defense.steps) or (model.local is not None and model.local.clip_norm is not None)
    if scales[0] and scales[1] and rate is not None and not clips:
        off, mirrored_off = (abs(math.log(scale / model.loss_scale / rate)) for scale in scales)  # type: ignore[operator]
        if off > max(ROUNDINGS * rounding, NEARER * mirrored_off):
            return replace(check, outcome="contradicts", said=NEARER_NEGATED())
        if mirrored_off > max(ROUNDINGS * rounding, NEARER * off):
            return check
    return replace(check, said=EITHER_SIGN(detail=check.detail))
