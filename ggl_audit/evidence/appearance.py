"""What a capture looks like, in plain sentences, and only where that can be told."""

from __future__ import annotations

import torch

from ggl_audit.attack.labels import UsualHead, infer_several
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, flat, stack, unstack
from ggl_audit.client.local_training import rate_of_one_step
from ggl_audit.evidence.last_layer import LastLayer
from ggl_audit.inputs.model import ClientModel

FEW_VALUES = 257
"""More distinct values than 8 bits have."""

MORE_ZEROS = 0.05
NEAR_MAGNITUDE, MOST_MAGNITUDES = 0.02, 0.7
"""Relative, about one size; the share of the values that are there."""

SUM_ROUNDING = 1e-4
FITS = 0.98
"""Cosine between the bias' gradient and the mean of p - y, from which a scale may be read off."""


def appearance(
    observed: Gradient,
    usual: Gradient,
    model: ClientModel,
    last_layer: LastLayer | None,
    usual_head: UsualHead | None,
) -> list[str]:
    """Says what the values, the zeros and the last layer of a gradient look like.

    Args:
        observed: the capture.
        usual: undefended gradients of reference images, tensors with a leading dimension n.
        model: the client's.
        last_layer: of the capture, where there is one.
        usual_head: what that layer takes and predicts for reference images.
    """
    said = [*_values(observed), *_zeros(observed, usual)]
    if said or last_layer is None:
        return said  # the last layer is not what it was
    if last_layer.full < 2 and model.batch_size > 1:
        return []  # a head of two classes has one rank for any number of images
    if last_layer.fine_rank >= max(2, last_layer.full):
        return _noise(observed, usual)
    return [_images(observed, model, last_layer, usual_head)]


def gives_probabilities(outputs: torch.Tensor, loss: str | None) -> list[str]:
    """Says so where a model ends in a softmax or a sigmoid, and the loss takes logits.

    Args:
        outputs: (n, ...), of images.
        loss: the name of a built-in one; None for one of the client's own.
    """
    layer = {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}.get(loss or "")
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    sums = layer == "sigmoid" or bool((outputs.flatten(1).sum(1) - 1).abs().max() < SUM_ROUNDING)
    if layer is None or not within or not sums:
        return []
    return [
        f"The model's outputs are probabilities, as of a {layer}, and the declared loss takes "
        "logits: leave out that layer, or give the client's own loss (model.loss.factory)."
    ]


def distinct_values(tensor: torch.Tensor) -> int:
    """The number of distinct values."""
    return len(torch.unique(tensor))


def _values(observed: Gradient) -> list[str]:
    whole = flat(observed)
    magnitudes = torch.unique(whole[whole != 0].abs())
    if len(magnitudes) == 1:
        return [f"Every value is zero or {float(magnitudes[0]):.4g}, with a sign: like a sign."]
    full = [tensor for tensor in observed.values() if bool(tensor.any())]
    large = [tensor for tensor in full if tensor.numel() > 4 * FEW_VALUES]
    if not large:
        return []
    if all(len(torch.unique(tensor[tensor != 0].abs())) == 1 for tensor in full):
        return ["Each tensor has one magnitude: like a sign with a scale of its own."]
    values = distinct_values(whole)
    if values <= FEW_VALUES:
        return [f"It has {values} distinct values: like a quantization of the whole."]
    values = max(map(distinct_values, large))
    if values <= FEW_VALUES:
        return [f"No large tensor has more than {values} values: like a quantization of each."]
    return _one_step_of_adam(whole)


def _one_step_of_adam(whole: torch.Tensor) -> list[str]:
    """From fresh moments each value is divided by its own size, and by a tenth of it in RMSprop."""
    magnitudes = whole[whole != 0].abs()
    usual = magnitudes.median()
    near = (magnitudes - usual).abs() <= NEAR_MAGNITUDE * usual
    if float(widened(near).mean()) < MOST_MAGNITUDES:
        return []
    return [
        f"Nearly every value that is not zero is {float(usual):.3g} in size: like one step of Adam "
        f"with that learning rate, or of RMSprop with {float(usual) / 10:.3g}."
    ]


def _zeros(observed: Gradient, usual: Gradient) -> list[str]:
    empty = [name for name, tensor in observed.items() if not bool(tensor.any())]
    lacking = [
        name for name in empty if bool(usual[name].reshape(len(usual[name]), -1).any(1).all())
    ]
    said = []
    if lacking:
        said.append(
            f"Nothing is in {', '.join(lacking)}, where reference images' gradients hold "
            "something: frozen, or out of the client's loss?"
        )
    # A tensor without any value is no sign of a sparsification.
    kept = [name for name in observed if name not in empty]
    observed, usual = ({name: of[name] for name in kept} for of in (observed, usual))
    own = float(widened(flat(observed) == 0).mean())
    theirs = max(float(widened(flat(one) == 0).mean()) for one in unstack(usual))
    if own <= theirs + MORE_ZEROS:
        return said
    return [
        *said,
        f"{own:.1%} of its values are zero, of reference images' gradients {theirs:.1%} at most: "
        "like a sparsification, or a model in another mode.",
    ]


def _noise(observed: Gradient, usual: Gradient) -> list[str]:
    own = bool((flat(observed) == 0).any())
    theirs = float(widened(flat(usual) == 0).mean())
    if own or theirs < MORE_ZEROS:
        return []
    return [
        f"None of its values is zero, of reference images' gradients {theirs:.1%}: like noise that "
        "was added, or a mean over many images."
    ]


def _images(
    observed: Gradient,
    model: ClientModel,
    last_layer: LastLayer,
    usual_head: UsualHead | None,
) -> str:
    rank, scale = last_layer.fine_rank, last_layer.scale
    if rank > 1 and usual_head is not None:
        scale = _scale_of_several(observed, model, rank, usual_head)
    elif last_layer.misfit is not None and last_layer.misfit > last_layer.rounding:
        scale = None
    looks = "It looks like the gradient of one image"
    if rank > 1:
        looks = f"It looks like a mean over {rank} images, or over as many of them and local steps"
    local, rate_of_step = model.local, rate_of_one_step(model.local, model.batch_size)
    if scale is None or rate_of_step is None:
        return f"{looks}."
    times = scale / model.loss_scale / rate_of_step
    declared = "with the declared loss" + ("" if local is None else " and learning rate")
    if abs(times - 1) <= max(last_layer.rounding, 0.1 if rank > 1 else 0):
        return f"{looks}, {declared}."
    if rank > 1 and abs(times / rank - 1) <= 0.1:
        return f"It looks like a sum over {rank} images, {declared}."
    rate = ": an update with that learning rate?" if local is None and times < 1 else ""
    return f"{looks}, {times:.2g} times that {declared}{rate or '.'}"


def _scale_of_several(
    observed: Gradient, model: ClientModel, images: int, usual_head: UsualHead
) -> float | None:
    """s, from the bias' gradient s mean(p - y) with the usual p; None where that fits badly."""
    assert model.head is not None
    if model.head.bias is None:
        return None
    labels = infer_several(stack([observed]), model, usual_head, images)[0]
    counts = widened(torch.bincount(labels, minlength=model.classes))
    prediction = usual_head.predictions[labels].mean(0)
    error, bias = prediction - counts / images, widened(observed[model.head.bias])
    if bool(error @ bias < FITS * error.norm() * bias.norm()):
        return None
    return float(error @ bias / (error @ error))
