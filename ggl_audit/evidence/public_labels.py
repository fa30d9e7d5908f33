"""Are the labels of the public images theirs, and numbered as the model numbers its classes?"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said

FEWEST_TO_TELL, MOST_LOOKED_AT, MOST_PREDICTED = 100, 1000, 256
SIDE = 16

SHUFFLES = 499
SIGNIFICANT = 0.002

EXPLAINED = 0.5
"""Of the loss of a guess, below which the model explains a numbering."""

SHUFFLED = Message(
    "doubt/labels-shuffled",
    "nothing shows that the labels of {source} are those of its images: in their pixels, their "
    "contrast and what the model makes of them, classes differ no more than those of shuffled "
    "labels do (p = {p_value:.2g})",
    advice="Compare the order of images and labels in `evidence.reference`.",
)
OTHER_ORDER = Message(
    "doubt/labels-in-another-order",
    "the labels of {source} are in another order than the model's classes: its loss is {loss:.2g} "
    "with them, and {other_loss:.2g} with the classes in another order",
    advice="Number the classes as the model was trained with them.",
)


def public_label_doubts(
    model: ClientModel, public: ImageSet, random: np.random.Generator
) -> list[Said]:
    """Compares the labels of public images with the images, and with what the model predicts.

    Of labels that are shuffled the means of the classes are no farther apart than those of other
    shuffles (a permutation test): of the images, of their contrast from pixel to pixel, and of the
    model's logits. True labels are doubted only where none of the three sets them apart. Classes in
    another order are seen where the model is trained: it explains the labels well in that order
    alone.

    Args:
        model: the client's.
        public: labelled images.
        random: draws images and shuffles.

    Returns:
        None or one, in words.
    """
    drawn = random.permutation(len(public))[:MOST_LOOKED_AT]
    chosen = torch.as_tensor(drawn, device=public.labels.device)
    images, labels = public.images[chosen], public.labels[chosen]
    if model.targets is not None or len(labels) < FEWEST_TO_TELL or len(labels.unique()) < 2:
        return []
    with torch.no_grad():
        logits = model.logits(model.parameters, images[:MOST_PREDICTED])
    # The first that sets the classes apart is enough.
    p_value = min(
        shuffled_p_value(images, labels, random),
        shuffled_p_value(contrast(images), labels, random),
        shuffled_p_value(logits[:, :, None, None], labels[:MOST_PREDICTED], random),
    )
    if p_value > SIGNIFICANT:
        return [SHUFFLED(source=public.source, p_value=p_value)]
    if logits.shape[1] != model.classes:
        return []
    other = other_order(logits, labels[:MOST_PREDICTED])
    if other is None:
        return []
    declared, fitting = other
    return [OTHER_ORDER(source=public.source, loss=declared, other_loss=fitting)]


def contrast(images: torch.Tensor) -> torch.Tensor:
    """The squared differences of neighbouring pixels, by both directions; shaped as the images."""
    across = F.pad(images.diff(dim=3), (0, 1)).square()
    return across + F.pad(images.diff(dim=2), (0, 0, 0, 1)).square()


def shuffled_p_value(
    images: torch.Tensor, labels: torch.Tensor, random: np.random.Generator
) -> float:
    """The share of shuffles of the labels by which the classes' means are as far apart.

    Args:
        images: (n, channels, height, width), looked at with 16 pixels a side at most.
        labels: (n,).
        random: shuffles.

    Returns:
        From 1 in 500 to 1.
    """
    height, width = (min(SIDE, size) for size in images.shape[2:])
    rows = F.adaptive_avg_pool2d(images, (height, width)).flatten(1).cpu().double()
    rows = rows - rows.mean(0)
    _, numbers = labels.cpu().unique(return_inverse=True)
    members = F.one_hot(numbers).double()

    def apart(members: torch.Tensor) -> float:
        counts = members.sum(0)
        return float(((members.T @ rows).square().sum(1) / counts).sum())

    found = apart(members)
    shuffles = (torch.as_tensor(random.permutation(len(rows))) for _ in range(SHUFFLES))
    return (1 + sum(apart(members[order]) >= found for order in shuffles)) / (1 + SHUFFLES)


def other_order(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float] | None:
    """The losses of the labels, and of those in the order of classes that fits best.

    Args:
        logits: (n, classes), of the labels' images.
        labels: (n,).

    Returns:
        None where the labels fit better than a guess, or no order does so clearly.
    """
    losses = -logits.cpu().double().log_softmax(1)
    members = F.one_hot(labels.cpu(), logits.shape[1]).to(losses)
    table = (members.T @ losses / len(labels)).numpy()
    rows, columns = linear_sum_assignment(table)
    declared, fitting = float(np.trace(table)), float(table[rows, columns].sum())
    guess = math.log(logits.shape[1])
    return (declared, fitting) if declared > guess and fitting < EXPLAINED * guess else None
