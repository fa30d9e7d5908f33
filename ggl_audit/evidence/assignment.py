"""Which of several things is which, where a release is made of several images.

The Hungarian method finds the pairs whose costs have the smallest sum (Kuhn, Naval Research
Logistics Quarterly 2, 1955). Who assigns knows the private images; a rank of an attack never comes
of an assignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.evidence.identification import Distances
from ggl_audit.inputs.model import ClientModel

FARTHEST = 1e30


def assign(pictures: torch.Tensor, truths: torch.Tensor, distance: Distances) -> list[int]:
    """Assigns each of k pictures to one of k images, so that their distances sum to the least.

    Args:
        pictures: (k, channels, height, width).
        truths: (k, channels, height, width).
        distance: from candidates (k, k, ...) and pictures (k, ...) to (k, k); one that is not
            finite is the farthest.

    Returns:
        For each picture, the index of its image.
    """
    costs = distance(truths.expand(len(pictures), *truths.shape), pictures)
    return _cheapest(costs)


def assign_labels(
    observed: Gradient,
    model: ClientModel,
    truths: torch.Tensor,
    labels: Sequence[int],
    scale: float | None,
) -> list[int]:
    """Assigns the labels of a release to its images, by the gradient of the last linear layer.

    Row y of that gradient is the sum over all images of s p_y h, less s h of those with the label
    y. A label goes to the image whose h is most like the mean h that its row so lacks.

    Args:
        observed: the release.
        model: the client's, which ends in a linear layer.
        truths: (k, channels, height, width), all of its images.
        labels: of these, in any order.
        scale: s, or None where it is not known; the predictions are then left out.

    Returns:
        The label of each image.
    """
    assert model.head is not None
    with torch.no_grad():
        representations = model.representation(truths)
        predictions = model.logits(model.parameters, truths).softmax(1)
    assert representations is not None
    features, sent = representations, observed[model.head.weight]
    if model.head.bias is not None:
        features = F.pad(features, (0, 1), value=1.0)
        sent = torch.cat([sent, observed[model.head.bias][:, None]], dim=1)
    lacking = (scale or 0.0) * (predictions.T @ features) - sent
    counts = torch.bincount(torch.tensor(labels, device=sent.device), minlength=len(sent))
    mean = lacking / counts.clamp(min=1)[:, None]
    costs = -(features @ mean[list(labels)].T)
    return [labels[place] for place in _cheapest(costs)]


def _cheapest(costs: torch.Tensor) -> list[int]:
    """For each row of a square table its column."""
    from scipy.optimize import linear_sum_assignment

    finite = np.nan_to_num(widened(costs).cpu().numpy(), nan=FARTHEST, posinf=FARTHEST)
    _, columns = linear_sum_assignment(finite)
    return [int(column) for column in columns]
