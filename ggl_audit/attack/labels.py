"""Label inference from the gradient of the last linear layer."""

from __future__ import annotations

import torch

from ggl_audit.gradient import Gradient
from ggl_audit.inputs.model import Head


def infer_labels(observed: Gradient, head: Head) -> torch.Tensor:
    """Infers the labels of t gradients, each of a single image.

    With softmax cross-entropy the head's gradient is the outer product (p - y) [h, 1] of the
    prediction error and the representation with a 1 for the bias. The error's only negative entry
    is the label's (Zhao et al., iDLG, 2020). The outer product is estimated by the leading singular
    pair, which averages noise over all columns; its sign is the one that makes the bias' 1
    positive or, without a bias, the sum over the representation (of rectified units, not negative).

    Args:
        observed: captured gradients, defended or not; tensors with a leading dimension t.
        head: which parameters the linear layer has.

    Returns:
        (t,), class indices.
    """
    columns = [observed[head.weight].flatten(2)]
    if head.bias is not None:
        columns.append(observed[head.bias][..., None])
    errors, _, features = torch.linalg.svd(torch.cat(columns, dim=2).double(), full_matrices=False)
    error, feature = errors[:, :, 0], features[:, 0]
    orientation = feature[:, -1] if head.bias is not None else feature.sum(dim=1)
    labels: torch.Tensor = (error * torch.sign(orientation)[:, None]).argmin(dim=1)
    return labels
