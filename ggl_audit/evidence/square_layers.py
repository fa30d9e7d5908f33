"""Whether square matrices are as PyTorch has them, (out, in), or transposed.

Their shape does not tell. But the gradients of a linear layer's weight and bias are sums over
images of d x^T and d, with what the layer takes, x, and the loss' derivative by what it gives, d
(the equation of :mod:`ggl_audit.evidence.last_layer`, which holds in every linear layer). So the
bias' gradient is in the space of the weight's columns, and in that of its rows by chance alone.
"""

from __future__ import annotations

import torch

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.messages import Message

LAYOUT = "the layout"

INSIDE, OUTSIDE = 0.01, 0.3
"""The shares of the bias gradient's norm that may, and that must, be left of it out of a space.
"""

LEAST_SIZE, ROUNDINGS = 1e-5, 25
"""The least of singular values, relative to the largest; and in the file's roundings."""

TRANSPOSED = Message(
    "contradiction/transposed",
    "{names} is transposed, as its bias' gradient is in the space of its rows and not of its "
    "columns; see capture.layout",
    advice="Transpose what was not, when the tensors were converted from another framework; or "
    "declare `capture.layout: channels_last` for a file in which nothing was.",
)
NOT_TRANSPOSED = Message(
    "check/not-transposed",
    "{names} is (out, in), as its bias' gradient tells",
    advice="Nothing.",
)


def square_layers(gradient: Gradient) -> list[str]:
    """The names of the square matrices in a gradient."""
    return [n for n, t in gradient.items() if t.ndim == 2 and t.shape[0] == t.shape[1] > 1]


def check_square_layers(defense: Pipeline, observed: Gradient, rounding: float) -> Check | None:
    """Compares the gradient of each square layer with that of its bias.

    A transposed one is accused where the bias' gradient is in the space of its rows, which has at
    most half of all dimensions, and not in that of its columns: by chance, a vector in n dimensions
    is within 0.01 of a space of n/2 with a probability below 0.01 to the power of n/2.

    Args:
        defense: what the client did to the gradient.
        observed: the gradient.
        rounding: of the file's numbers, relative.

    Returns:
        None where it cannot be told of any: the defense does more than to scale the gradient, the
        layer has no bias, or too many images are in it.
    """
    if not defense.effect.only_scales() or ROUNDINGS * rounding > INSIDE:
        return None
    told = {
        name: transposed
        for name in square_layers(observed)
        if (transposed := _is_transposed(name, observed, rounding)) is not None
    }
    wrong = [name for name, transposed in told.items() if transposed]
    if wrong:
        return Check(LAYOUT, "contradicts", TRANSPOSED(names=", ".join(wrong)))
    if not told:
        return None
    return Check(LAYOUT, "agrees", NOT_TRANSPOSED(names=", ".join(told)))


def _is_transposed(name: str, observed: Gradient, rounding: float) -> bool | None:
    bias = observed.get(f"{name.removesuffix('weight')}bias")
    weight = widened(observed[name])
    if bias is None or bias.shape != weight.shape[:1] or not bool(bias.any()):
        return None
    out, sizes, taken = torch.linalg.svd(weight)
    rank = int((sizes > max(LEAST_SIZE, ROUNDINGS * rounding) * sizes[0]).sum())
    if not 0 < rank <= len(sizes) // 2:
        return None
    direction = widened(bias) / widened(bias).norm()
    columns, rows = out[:, :rank], taken[:rank].T
    from_columns, from_rows = (
        float((direction - space @ (space.T @ direction)).norm()) for space in (columns, rows)
    )
    if from_columns < INSIDE and from_rows > OUTSIDE:
        return False
    if from_rows < INSIDE and from_columns > OUTSIDE:
        return True
    return None
