"""What the gradient of the last layer tells by itself, without a picture of the image.

With softmax cross-entropy and one image, the gradients of the head's weight and bias are s (p - y)
h^T and s (p - y), with the representation h, the prediction p = softmax(W h + b), the label y and
the loss' scale s (Zhao et al., iDLG, 2020). The quotient of the two is h, and h gives p: an
equation that knows neither the image nor the rest of the model, and that holds for no other scale,
no other weights of the head and no more images than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ggl_audit.attack.labels import infer_labels
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, norm, stack
from ggl_audit.client.local_training import rate_of_one_step
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.defenses.capabilities import BoundsNorm
from ggl_audit.inputs.model import ClientModel, has_batch_norm
from ggl_audit.messages import Message

MODEL_AND_LOSS = "the declared model and loss"
ROUNDINGS = 25
"""What may be off, in roundings of the file's numbers."""

CLEAR_RANK, FINE_RANK, LEAST_ROUNDING, MOST_ROUNDING = 0.02, 1e-5, 0.1, 0.3
"""Relative, of singular values and of the scale; with more rounding than the last nothing is told.
"""

COARSE, LOGIT_ROUNDINGS = 2**-7, 5
"""One image's gradient that is not of rank one to the second of these was computed in bfloat16,
whose rounding of the logits comes in full into p."""

SINGLE, HALF = torch.finfo(torch.float32).eps, torch.finfo(torch.float16).eps
HALF_GRAIN = torch.finfo(torch.float16).smallest_normal * HALF
"""What the smallest numbers of half precision are apart."""

CONFIDENT, IMBALANCES = 1e-3, 10
"""p - y below the first may be lost in rounding, of which its sum tells, that should be zero."""

TENSOR_CORES = 2**-11
"""Rounding of what a layer takes on hardware that multiplies in TF32."""

SMOOTHINGS = (0.005, 0.9)
"""The label smoothing that is looked for."""

BELOW_A_CLIP = 0.99
"""Share of a clip's bound below which nothing was clipped."""

FOCAL_GAMMAS, FOCAL_ALPHAS = (1, 2, 3, 5), (1, 0.25, 0.75)
"""What focal losses are usually set to (Lin et al., ICCV 2017)."""

ERROR_ROUNDING = 1e-6
"""The rounding of p - y in single precision, absolute."""

RANK = Message(
    "contradiction/rank",
    "its last layer's gradient has the rank {rank}, so it is of {rank} images or more, of more "
    "than one step, or of none; of {images} by the declaration, and cross-entropy gives {most} at "
    "most",
    advice="Declare the number of images in `capture.batch_size`, or `kind: update` with `local`; "
    "call `zero_grad()` before each backward pass.",
)
RANK_AGREES = Message(
    "check/rank-agrees",
    "its last layer's gradient has the rank {rank}",
    advice="Nothing.",
)
SMOOTHING = Message(
    "contradiction/smoothing",
    "its last layer's gradient is {share:.0%} off the prediction that the layer's weights make: "
    "model.loss.label_smoothing {smoothing:.2g} would fit",
    advice="Declare `model.loss.label_smoothing`, if the client's loss has it.",
)
OFF_PREDICTION = Message(
    "contradiction/off-prediction",
    "its last layer's gradient is {share:.0%} off the prediction that the layer's weights make, "
    "so they are of another model or round, or the loss is another",
    advice="Give the weights that the client began the step with, and its loss with label "
    "smoothing and class weights.",
)
SCALE_AGREES = Message(
    "check/scale-agrees",
    "its last layer's gradient is {times:.3g} times that of the declared loss",
    advice="Nothing.",
)
SCALE = Message(
    "contradiction/scale",
    "its last layer's gradient is {times:.3g} times that of the declared loss{which_is}: "
    "{focal_loss}model.loss.scale {scale:.3g} would fit; or {rate}, or are the weights of another "
    "round?",
    advice="Find the factor in the client's code: a loss weight, `GradScaler`, gradient "
    "accumulation, a learning rate, a mean taken twice; then declare it.",
)
SCALE_BELOW_CLIP = Message(
    "contradiction/scale-below-clip",
    "its last layer's gradient is {times:.3g} times that of the declared loss{which_is}, and its "
    "norm is below the bound, so that nothing was clipped: {focal_loss}model.loss.scale "
    "{scale:.3g} would fit; or {rate}, or are the weights of another round?",
    advice="Find the factor: a power of two is a gradient scaler that was not taken out "
    "(`scaler.unscale_` before the capture); a clip over more than is sent would act below its "
    "bound too.",
)


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
        precision: what may be off where nothing was computed in less than single precision.
        confidence: p of the label; None where it cannot be told.
        smoothing: the label smoothing that explains the gradient where none does not.
    """

    rank: int
    fine_rank: int
    full: int
    rounding: float
    scale: float | None = None
    misfit: float | None = None
    precision: float = LEAST_ROUNDING
    confidence: float | None = None
    smoothing: float | None = None


def look_at_last_layer(model: ClientModel, observed: Gradient, rounding: float) -> LastLayer | None:
    """Takes the gradient of the head apart.

    Args:
        model: with softmax cross-entropy.
        observed: a gradient.
        rounding: of the file's numbers, relative.

    Returns:
        None where the model has no linear head, or its gradient is lost in rounding.
    """
    head = model.head
    if head is None or not bool(observed[head.bias or head.weight].any()):
        return None
    rounding = _rounding_of_head(model, observed, rounding)
    weight = widened(observed[head.weight])
    columns = [weight] if head.bias is None else [weight, widened(observed[head.bias])[:, None]]
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
    bias = widened(observed[head.bias])
    representation = (errors[:, 0] @ weight) / (errors[:, 0] @ bias)
    logits = widened(model.parameters[head.weight]) @ representation
    prediction = (logits + widened(model.parameters[head.bias])).softmax(0)
    label = int(infer_labels(stack([observed]), head))
    error, largest = prediction.clone(), float(logits.abs().max())
    error[label] -= 1
    grain = own if fine_rank == 1 else max(own, COARSE)
    lost = ERROR_ROUNDING / float(error.abs().max())
    unit = model.loss_scale * (1 if model.local is None else model.local.lr_of(0))
    if bool(bias.abs().max() < CONFIDENT * unit):
        lost += IMBALANCES * float(bias.sum().abs() / bias.abs().max())
        if lost > MOST_ROUNDING:
            return None
    precision = rounding + LOGIT_ROUNDINGS * max(grain, TENSOR_CORES) * (1 + largest) + lost
    rounding = max(LEAST_ROUNDING, rounding) + LOGIT_ROUNDINGS * grain * largest + lost
    if rounding > MOST_ROUNDING:
        return LastLayer(rank, fine_rank, full, rounding)
    scale = (bias @ error) / (error @ error)
    misfit = float((bias - scale * error).norm() / bias.norm())
    smoothing = _smoothing(bias, error, label, misfit, precision) if fine_rank == 1 else None
    confidence = float(prediction[label])
    return LastLayer(
        rank, fine_rank, full, rounding, float(scale), misfit, precision, confidence, smoothing
    )


def _rounding_of_head(model: ClientModel, observed: Gradient, rounding: float) -> float:
    """The rounding of the head's values, relative to the largest of them.

    An update is a difference of weights, and has their rounding; half precision has a smallest
    number.
    """
    head = model.head
    assert head is not None
    names = [name for name in (head.weight, head.bias) if name is not None]
    sent = {name: float(observed[name].norm()) for name in names if bool(observed[name].any())}
    if model.local is not None:
        weights = {name: model.parameters[name] for name in observed}
        stored = max(SINGLE, rounding * float(norm(observed) / norm(weights).clamp(min=1e-30)))
        lost = (stored * float(weights[name].norm()) / size for name, size in sent.items())
        return max(rounding, *lost) if rounding <= SINGLE else max(lost)
    if rounding < HALF:
        return rounding
    return max(rounding, *(HALF_GRAIN / float(observed[name].abs().max()) for name in sent))


def _smoothing(
    bias: torch.Tensor, error: torch.Tensor, label: int, misfit: float, precision: float
) -> float | None:
    """The label smoothing e of s (p - (1 - e) y - e / K), if it fits where e = 0 does not."""
    if len(error) < 3 or misfit <= precision:
        return None  # of two classes every error is a multiple of every other
    spread = torch.full_like(error, -1 / len(error))
    spread[label] += 1
    design = torch.stack([error, spread], dim=1)
    scale, product = torch.linalg.lstsq(design, bias[:, None]).solution.flatten().tolist()
    rest = float((bias - design @ bias.new_tensor([scale, product])).norm() / bias.norm())
    smoothing = product / scale if scale > 0 else 0.0
    fits = rest <= min(precision, misfit / 5) and SMOOTHINGS[0] <= smoothing <= SMOOTHINGS[1]
    return smoothing if fits else None


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
    local, rate_of_step = model.local, rate_of_one_step(model.local, model.batch_size)
    decays = local is not None and local.weight_decay > 0
    if not defense.effect.only_scales() or rate_of_step is None or decays:
        return None
    seen = look_at_last_layer(model, observed, rounding)
    if seen is None:
        return None
    if seen.rank > min(images, seen.full):
        said = RANK(rank=seen.rank, images=images, most=seen.full)
        return Check(MODEL_AND_LOSS, "contradicts", said)
    if images > 1 and images >= seen.full:
        return None
    if images > 1 or seen.scale is None or seen.misfit is None:
        return Check(MODEL_AND_LOSS, "agrees", RANK_AGREES(rank=seen.rank))
    if seen.smoothing is not None:
        said = SMOOTHING(share=seen.misfit, smoothing=seen.smoothing)
        return Check(MODEL_AND_LOSS, "contradicts", said)
    if seen.misfit > seen.rounding:
        return Check(MODEL_AND_LOSS, "contradicts", OFF_PREDICTION(share=seen.misfit))
    times = seen.scale / (model.loss_scale * rate_of_step)
    clips = local is not None and local.clip_norm is not None
    clips = clips or _may_be_clipped(model, defense, observed)
    too_small = times < 1 - seen.rounding and not clips
    if not (times > 1 + seen.rounding or too_small):
        return Check(MODEL_AND_LOSS, "agrees", SCALE_AGREES(times=times))
    tolerance = min(seen.precision, LEAST_ROUNDING)
    rate = (
        "is it an update with that learning rate"
        if local is None
        else f"capture.local.lr {local.lr_of(0) * times:.3g}"
    )
    scale = SCALE_BELOW_CLIP if too_small and defense.steps else SCALE
    said = scale(
        times=times,
        which_is=defense.checks.factors.name(times, tolerance),
        focal_loss=_focal(seen, times, tolerance),
        scale=model.loss_scale * times,
        rate=rate,
    )
    return Check(MODEL_AND_LOSS, "contradicts", said)


def _may_be_clipped(model: ClientModel, defense: Pipeline, observed: Gradient) -> bool:
    """Whether the capture may have been larger before a clip, as all steps are.

    A clip whose norm is over more than is seen may act below its bound, as may that of a sample
    before the update is multiplied by the learning rate.
    """
    trained = {name for name, _ in model.module.named_parameters()}
    more = trained != observed.keys() or (model.local is not None and has_batch_norm(model.module))
    if more or defense.training.per_sample:
        return bool(defense.steps)
    size = float(norm(observed))
    bounds = [step.norm_bound(None) for step in defense.steps if isinstance(step, BoundsNorm)]
    return any(bound is not None and size >= BELOW_A_CLIP * bound for bound in bounds)


def _focal(seen: LastLayer, times: float, tolerance: float) -> str:
    """A focal loss that scales one image's gradient by as much, in words (Lin et al., 2017)."""
    p = seen.confidence
    if p is None or not 0 < p < 1:
        return ""
    for alpha in FOCAL_ALPHAS:
        for gamma in FOCAL_GAMMAS:
            factor = (1 - p) ** gamma - gamma * (1 - p) ** (gamma - 1) * p * math.log(p)
            if abs(times / (alpha * factor) - 1) <= tolerance:
                own = f"{alpha:g} times " if alpha != 1 else ""
                return f"{own}a focal loss with gamma {gamma} (model.loss.factory), or "
    return ""
