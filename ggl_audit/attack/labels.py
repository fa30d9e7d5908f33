"""Label inference from the gradient of the last linear layer."""

from __future__ import annotations

import torch

from ggl_audit.gradient import Gradient
from ggl_audit.inputs.model import Head

MOST_SWAPPED = 64


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


def infer_several(observed: Gradient, head: Head, usual: torch.Tensor, images: int) -> torch.Tensor:
    """Infers the labels of t gradients, each of several images; one label may come up repeatedly.

    The rows of the head's gradient sum to the mean of (p - y) times the representation's sum, and
    its bias is the mean of p - y alone. With p as public images have it, what remains is the counts
    of the labels, up to a scale that a defense may have changed: labels are added one by one, each
    the one that brings p - counts / B closest in direction (as iLRG and LLBG count them; Ma et
    al., IJCAI 2023); then labels are
    swapped for others as long as that brings it closer (up to 64 classes).

    Args:
        observed: captured gradients; tensors with a leading dimension t.
        head: which parameters the linear layer has.
        usual: (classes,), the mean prediction on public images.
        images: B, how many labels there are.

    Returns:
        (t, B), class indices, in ascending order.
    """
    rows = observed[head.weight].flatten(2).sum(2) if head.bias is None else observed[head.bias]
    rows = rows.double()
    one = torch.eye(len(usual), dtype=rows.dtype, device=rows.device)

    def best(counts: torch.Tensor, changes: torch.Tensor, images: int) -> torch.Tensor:
        """Changes the counts of each gradient in the way that fits best."""
        possible = counts[:, None] + changes
        error = images * usual.double() - possible
        closeness = (error * rows[:, None]).sum(2) / error.norm(dim=2).clamp(min=1e-30)
        closeness = torch.where(possible.amin(2) < 0, -torch.inf, closeness)
        return counts + changes[closeness.argmax(dim=1)]

    counts = torch.zeros_like(rows)
    for taken in range(1, images + 1):
        counts = best(counts, one, taken)
    # The greedy count may be off by pairs. No swap at all, an entry of the diagonal, is a swap too.
    swaps = (one[:, None] - one).flatten(0, 1)
    for _ in range(images if len(usual) <= MOST_SWAPPED else 0):
        counts = best(counts, swaps, images)
    labels = [torch.repeat_interleave(row.long()) for row in counts]
    return torch.stack(labels)
