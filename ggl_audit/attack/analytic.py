"""Exact analytic recovery: what a linear layer took is the quotient of its gradients.

For a linear layer with a bias that sees one input x, dL/dW = d x^T and dL/db = d with one error d
of its output, so x is dL/dW_i / dL/db_i for every row with dL/db_i != 0 (Phong et al., IEEE TIFS
13(5), 2018; Geiping et al., NeurIPS 2020, proposition 3.1). For the first layer x is the image, for
the last one the representation. No prior and no search are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch.func import vjp

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.client.gradients import MEMORY
from ggl_audit.client.local_training import rate_of_one_step
from ggl_audit.defenses import Pipeline
from ggl_audit.inputs.model import ClientModel

SAME = 1e-2
"""Relative, of a gradient and the product that it should be: above TF32's rounding of 2^-11 and
bfloat16's of 2^-8, while one of another layer is off by about 1."""

EXPLAINED = 1e-4
"""The largest relative distance that is put down to rounding. Each operation in float32 adds 6e-8;
between gradients computed in float64 and in float32 it came to 2e-5 at most for models of three
layers with a prediction that is 1 % off or more. A picture that differs by noise of 0.001 leaves
2e-3."""

NEARBY = 1e-3
"""The standard deviation of what is added to a picture in [0, 1] to get another one."""

NEARER = 10
"""How much nearer than those it has to be."""

NEIGHBOURS = 4


class _Layer(NamedTuple):
    weight: str
    bias: str


def recover_input(model: ClientModel, observed: Gradient) -> torch.Tensor | None:
    """Recovers the image of each of t gradients from the model's first layer.

    The rows of the layer are weighed by total least squares: the leading singular pair of
    [dL/dW, dL/db], the maximum-likelihood estimate of a matrix of rank one under equal noise on all
    entries (Golub and Van Loan, 1980). Only entries that were sent count, so a sparsified gradient
    is exact wherever something is left of a pixel; the others were small, and are taken for the
    mean that the client subtracts. A scale of the whole layer cancels (a learning rate, a clip of
    the whole gradient); one of each tensor does not.

    Whether it is the very image is another question (:func:`is_exact`): from the mean over a
    cohort, or under a step that keeps only signs, what comes out is no image at all.

    Args:
        model: the client's.
        observed: captured gradients or updates; tensors with a leading dimension t.

    Returns:
        (t, channels, height, width) in [0, 1]. None where no linear layer with a bias takes the
        normalized image, all of it and as it is; where the layer's gradient was not sent; or where
        a gradient is of several images or of several local steps.
    """
    if not _is_of_one_image(model):
        return None
    layer = _first_layer(model)
    if layer is None or not observed.keys() >= {*layer}:
        return None
    normalized = _taken(model, layer, observed).to(model.mean).unflatten(1, model.shape)
    images = normalized * model.std + model.mean
    images = images.flip(-3) if model.bgr else images
    within: torch.Tensor = images.clamp(0, 1)
    return within


def representation(model: ClientModel, observed: Gradient) -> torch.Tensor | None:
    """Recovers what the model's head took for each of t gradients, in the same way.

    Without a bias only its direction would show, and a gradient under noise or sparsification does
    not tell its sign either; so a head without one gives nothing.

    Args:
        model: the client's.
        observed: captured gradients or updates; tensors with a leading dimension t.

    Returns:
        (t, features), as of :meth:`ClientModel.representation`, and zero for the features of which
        the gradient holds nothing: those that are zero, or small, or were removed. None where there
        is no head with a bias that is used once for an image; where its gradient was not sent; or
        where a gradient is of several images or of several local steps.
    """
    head = model.head
    if not _is_of_one_image(model) or head is None or head.bias is None:
        return None
    layer = _Layer(head.weight, head.bias)
    if not observed.keys() >= {*layer} or not _takes(model, layer, model.representation):
        return None
    return _taken(model, layer, observed).to(model.mean)


def is_exact(
    model: ClientModel,
    defense: Pipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    observed: Gradient,
    rounding: float = torch.finfo(torch.float32).eps,
    memory: int = MEMORY,
) -> torch.Tensor:
    """Whether each of t pictures is the very image that its gradient was computed from.

    It is where its own gradient, through the replica of the defense, explains the observed one to
    rounding, and ten times better than pictures do that differ from it by noise of 0.001: so the
    gradient does tell such pictures apart, and this one is nearer to the image. In a file of coarse
    numbers the distance may be their rounding, and the others differ by twice that. Under any step
    that is not known to keep different images' values apart (a step that rounds them, transforms
    the images, or is the user's own) nothing is exact.

    The error p - y of a prediction that is all but certain is itself mostly rounding, so then even
    the very image may not pass: of 200 digits, all did for a fresh model and 42 % for one with a
    median 1 - p of 7e-5, though every one was recovered to 1e-7.

    Args:
        model: the client's.
        defense: the declared steps.
        images: (t, channels, height, width) in [0, 1].
        labels: (t,).
        observed: captured gradients; tensors with a leading dimension t.
        rounding: of the captured numbers, relative.
        memory: bytes that candidates' gradients may take at a time, about.

    Returns:
        (t,), of type bool.
    """
    if not defense.effect.keeps_images_apart():
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(NEIGHBOURS, *model.shape, generator=random).to(images)
    neighbours = images[:, None] + max(NEARBY, 2 * rounding) * noise
    tried = torch.cat([images[:, None], neighbours], dim=1)
    matching = Matching(model, defense, "l2", memory)
    squared = matching.distances(tried, labels[:, None].expand(tried.shape[:2]), observed)
    own, nearest = squared[:, 0].sqrt(), squared[:, 1:].amin(1).sqrt()
    return (own <= max(EXPLAINED, rounding / 2)) & (NEARER * own <= nearest)


def _is_of_one_image(model: ClientModel) -> bool:
    return model.batch_size == 1 and rate_of_one_step(model.local, 1) is not None


def _first_layer(model: ClientModel) -> _Layer | None:
    def normalized(images: torch.Tensor) -> torch.Tensor:
        return model.normalize(images).flatten(1)

    size, parameters = math.prod(model.shape), model.parameters
    weights = [name for name, p in parameters.items() if p.ndim > 1 and p[0].numel() == size]
    biases = [name for name, p in parameters.items() if p.ndim == 1]
    layers = (
        _Layer(weight, bias)
        for weight, bias in product(weights, biases)
        if len(parameters[weight]) == len(parameters[bias])
    )
    return next((layer for layer in layers if _takes(model, layer, normalized)), None)


def _takes(
    model: ClientModel, layer: _Layer, taken: Callable[[torch.Tensor], torch.Tensor | None]
) -> bool:
    """Whether the gradient of a layer is the product of its bias' and what it is said to take.

    Tried by passing two random images forward and backward. A layer that is used several times, or
    whose weight or bias is another layer's, does not pass.

    Args:
        model: the client's.
        layer: its weight and its bias.
        taken: from images (1, channels, height, width) in [0, 1] to (1, features).
    """
    own = {name: model.parameters[name] for name in layer}
    random = torch.Generator().manual_seed(0)
    for image in torch.rand(2, 1, *model.shape, generator=random).to(model.mean):
        expected = taken(image)
        if expected is None or expected.numel() != own[layer.weight][0].numel():
            return False

        def outputs(own: Gradient, image: torch.Tensor = image) -> torch.Tensor:
            return model.logits({**model.parameters, **own}, image)

        given, pull = vjp(outputs, own)  # type: ignore[misc]
        (gradient,) = pull(torch.randn(given.shape, generator=random).to(given))
        columns = gradient[layer.bias][:, None] * expected
        away = (gradient[layer.weight].flatten(1) - columns).norm()
        if not bool(away < SAME * columns.norm()):
            return False
    return True


def _taken(model: ClientModel, layer: _Layer, observed: Gradient) -> torch.Tensor:
    """What a layer took, (t, features), double, by total least squares."""
    local, rate = model.local, rate_of_one_step(model.local, 1)
    decay = 0.0 if local is None or rate is None else rate * local.weight_decay
    own = [decay * widened(model.parameters[name]) for name in layer]
    rows = []
    for weight, bias in zip(observed[layer.weight], observed[layer.bias], strict=True):
        kept = widened((weight != 0).flatten(1) & (bias != 0)[:, None])
        columns = kept * (widened(weight) - own[0]).flatten(1)
        offsets = (widened(bias) - own[1])[:, None]
        whole = torch.cat([columns, offsets], dim=1)
        errors = torch.linalg.eigh(whole @ whole.T).eigenvectors[:, -1]
        above, below = errors @ columns, errors @ (kept * offsets)
        rows.append(torch.where(below == 0, 0, above / below))
    return torch.stack(rows)
