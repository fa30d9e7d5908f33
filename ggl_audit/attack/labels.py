"""Label inference from the gradient of the last linear layer, where the loss lets it show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from ggl_audit.basics.device import widened, widest_float
from ggl_audit.basics.gradient import Gradient, unstack
from ggl_audit.defenses import Pipeline
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel, Head
from ggl_audit.messages import Message, Said
from ggl_audit.optimizers import Array

PUBLIC_IMAGES = 256
LARGEST_TABLE = 2**20
"""Values that the labels' shares in a head may take; of a larger one only the errors are used."""

CLEARLY = 0.8
"""How much nearer a guess of the predictions must come that is itself made from the gradient."""

ROUNDING = 1e-12

MORE_THAN_A_CLASS = Message(
    "labels/more-than-a-class",
    "what the images were to give is more than a class, and cannot be inferred",
    advice="Declare `capture.targets`.",
)
DECLARE_LABELS = "Declare `capture.labels`; the attacker is then taken to know them."
LOSS_HIDES_LABEL = Message(
    "labels/loss-hides-label",
    "a gradient of the declared loss does not tell the label for sure",
    advice=DECLARE_LABELS,
)
NO_LAST_LAYER = Message(
    "labels/no-last-layer",
    "the model does not end in a trained linear layer, so the label cannot be inferred",
    advice=DECLARE_LABELS,
)
LOSS_HIDES_LABELS = Message(
    "labels/loss-hides-labels",
    "a gradient of the declared loss does not tell the labels of several images",
    advice=DECLARE_LABELS,
)
OPTIMIZER_HIDES_LABELS = Message(
    "labels/optimizer-hides-labels",
    "{optimizer} divides each value by its own size, so an update does not tell the labels of "
    "several images",
    advice=DECLARE_LABELS,
)


def why_not_inferred(model: ClientModel, members: int) -> Said | None:
    """Why labels cannot be inferred from a gradient; None where they can.

    Args:
        model: with its loss.
        members: how many images the gradient is of.
    """
    criterion = model.criterion
    if model.targets is not None and criterion.shows != "negative":
        return MORE_THAN_A_CLASS()
    if criterion.shows is None:
        return LOSS_HIDES_LABEL()
    if model.head is None:
        return NO_LAST_LAYER()
    if members > 1 and not criterion.counts:
        return LOSS_HIDES_LABELS()
    if members > 1 and model.local is not None and model.local.optimizer != "sgd":
        return OPTIMIZER_HIDES_LABELS(optimizer=model.local.optimizer)
    return None


def infer_labels(observed: Gradient, head: Head) -> torch.Tensor:
    """Infers the labels of t gradients, each of a single image.

    With softmax cross-entropy the error (p - y)'s only negative entry is the label's (Zhao et al.,
    iDLG, 2020).

    Args:
        observed: captured gradients, defended or not; tensors with a leading dimension t.
        head: which parameters the linear layer has.

    Returns:
        (t,), class indices.
    """
    return _head_errors(observed, head).argmin(dim=1)


def infer_ones(observed: Gradient, head: Head) -> torch.Tensor:
    """Infers for which logits the target is 1, from t gradients, each of a single image.

    With binary cross-entropy the error (p - y) of a logit is negative where that is so, and only
    there, as p is between 0 and 1.

    Args:
        observed: captured gradients, defended or not; tensors with a leading dimension t.
        head: which parameters the linear layer has.

    Returns:
        (t, logits), of type bool.
    """
    return _head_errors(observed, head) < 0


def _head_errors(observed: Gradient, head: Head) -> torch.Tensor:
    """The error of the head's output for t single images, (t, outputs), each of norm 1.

    The head's gradient is the outer product (p - y) [h, 1] of the error and the representation with
    a 1 for the bias. It is estimated by the leading singular pair, which averages noise over all
    columns; its sign is the one that makes the bias' 1 positive or, without a bias, the sum over
    the representation (of rectified units, not negative).
    """
    columns = [observed[head.weight].flatten(2)]
    if head.bias is not None:
        columns.append(observed[head.bias][..., None])
    errors, _, features = torch.linalg.svd(widened(torch.cat(columns, dim=2)), full_matrices=False)
    error, feature = errors[:, :, 0], features[:, 0]
    orientation = feature[:, -1] if head.bias is not None else feature.sum(dim=1)
    oriented: torch.Tensor = error * torch.sign(orientation)[:, None]
    return oriented


@dataclass(frozen=True)
class UsualHead:
    """What the last linear layer takes and predicts for public images.

    Attributes:
        predictions: (classes, classes), the mean softmax output for the images of each class, or
            for all images where it has none.
        representations: (classes, features), the mean of what the layer takes, likewise.
    """

    predictions: torch.Tensor
    representations: torch.Tensor


def usual_head(model: ClientModel, public: ImageSet) -> UsualHead:
    """Looks at up to 256 public images, evenly spread over the set.

    Args:
        model: ends in a linear layer.
        public: labelled images, of some or all of its classes.
    """
    spread = torch.linspace(0, len(public) - 1, min(PUBLIC_IMAGES, len(public)))
    chosen = spread.long().to(public.labels.device)
    images, labels = public.images[chosen], public.labels[chosen]
    with torch.no_grad():
        predictions = widened(model.logits(model.parameters, images).softmax(1))
        representations = model.representation(images)
    assert representations is not None
    members = widened(F.one_hot(labels, model.classes)).T
    members[members.sum(1) == 0] = 1
    shares = members / members.sum(1, keepdim=True)
    return UsualHead(shares @ predictions, shares @ widened(representations))


def scale_of_one(model: ClientModel, defense: Pipeline, images: int) -> float | None:
    """What the p - y of one image is multiplied by in a release; None where it cannot be told.

    Args:
        model: with its loss, and the images of one client.
        defense: a step that changes magnitudes, as a clip does, leaves it untold.
        images: of the whole release.
    """
    if model.local is not None or not defense.effect.keeps_magnitudes():
        return None
    return model.loss_scale / (images // model.batch_size if model.loss_sum else images)


def infer_several(
    observed: Gradient,
    model: ClientModel,
    usual: UsualHead,
    images: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Infers the labels of t gradients, each of several images; one label may come up repeatedly.

    The head's gradient is the sum over the images of s (p - y) [h, 1]. With the p and the h that
    are usual for a label, each label adds a known matrix, so the labels are those whose matrices
    come nearest to the gradient in sum, wherever it is not zero. They are added one by one, and
    then each is replaced by a better one as long as there is any. If s is not known, any will do.

    The p of a label is taken as public images have it; or, where that explains the gradient better
    by a fifth, as the head computes it from the h that the label's row of the gradient gives away
    when it is divided by the bias' (iLRG; Ma et al., IJCAI 2023).

    Of 200 random batches of digits each, all labels were right with the sample model at random
    weights for 2, 4, 8 and 16 images: 200, 200, 200, 200, and the same under noise of 0.01; with
    90 % of each tensor removed 200, 200, 29, 0; where a clip hides s 200, 200, 200, 182. Training
    makes most p nearly y, so that an image may add next to nothing: after 50 steps of Adam 184, 99,
    12, 0, after 1,500 (the sample's trained model) 51, 3, 0, 0.

    Args:
        observed: captured gradients; tensors with a leading dimension t.
        model: the client's, which ends in a linear layer.
        usual: what that layer takes and predicts for public images.
        images: B, how many labels there are.
        scale: s, from :func:`scale_of_one`.

    Returns:
        (t, B), class indices, in ascending order.
    """
    labels = []
    for gradient in unstack(observed):
        tables = _tables(gradient, model, usual)
        guesses = [_nearest_sum(rows, sent, images, scale) for rows, sent in tables]
        public, own = guesses[0], guesses[-1]
        labels.append(own[1] if own[0] < CLEARLY * public[0] else public[1])
    return torch.tensor(labels, device=model.device)


def unequal_weights(
    observed: Gradient,
    model: ClientModel,
    usual: UsualHead,
    images: int,
    scale: float | None = None,
) -> torch.Tensor:
    """How much better images of any weights explain t gradients than equally weighted ones.

    Args:
        observed: captured gradients; tensors with a leading dimension t.
        model: the client's, which ends in a linear layer.
        usual: what that layer takes and predicts for public images.
        images: B, as many as are equally weighted.
        scale: of these, from :func:`scale_of_one`.

    Returns:
        (t,), of type double, the share of the gradient's square that is explained in addition.
    """
    found = []
    for gradient in unstack(observed):
        gained = []
        for rows, sent in _tables(gradient, model, usual):
            distance, _ = _nearest_sum(rows, sent, images, scale)
            size = float(sent @ sent)
            gained.append((distance - _least_distance(rows, sent)) / max(size, 1e-300))
        found.append(min(gained))
    return torch.tensor(found, dtype=widest_float(model.device), device=model.device)


def _tables(
    gradient: Gradient, model: ClientModel, usual: UsualHead
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What an image of each class adds to the head's gradient, (classes, size), and that, (size,).

    By the usual predictions, and by those that the gradient itself gives away.
    """
    head = model.head
    assert head is not None
    weight = widened(model.parameters[head.weight])
    one = torch.eye(model.classes, dtype=weight.dtype, device=weight.device)
    sent, features = widened(gradient[head.weight]), usual.representations
    predictions = [usual.predictions]
    if head.bias is not None:
        bias, offset = widened(gradient[head.bias]), widened(model.parameters[head.bias])
        shown = torch.where((bias < 0)[:, None], sent / bias[:, None], features)
        predictions.append((shown @ weight.T + offset).softmax(1))
        sent = torch.cat([sent, bias[:, None]], dim=1)
        features = F.pad(features, (0, 1), value=1.0)
    if model.classes * sent.numel() > LARGEST_TABLE:
        column = slice(-1, None) if head.bias is not None else slice(None)
        sent, features = (t[:, column].sum(1, keepdim=True) for t in (sent, features))
    kept = (sent != 0).to(sent.dtype)
    for prediction in predictions:
        added = (prediction - one)[:, :, None] * features[:, None] * kept
        yield added.flatten(1), sent.flatten()


def _least_distance(rows: torch.Tensor, sent: torch.Tensor) -> float:
    """The squared distance of the nearest sum of a table's rows, none of them taken away."""
    directions, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
    table: Array = (directions * sizes).T.cpu().numpy()
    inverse = torch.where(sizes > ROUNDING * sizes[0], 1 / sizes.clamp(min=1e-300), 0)
    wanted: Array = (inverse * (directions.T @ (rows @ sent))).cpu().numpy()
    _, rest = nnls(table, wanted)
    within = float(wanted @ wanted)
    return max(0.0, float(sent @ sent) - within + float(rest) ** 2)


def _nearest_sum(
    rows: torch.Tensor, sent: torch.Tensor, count: int, scale: float | None
) -> tuple[float, list[int]]:
    """Chooses so many rows of a table, any of them repeatedly, whose sum is near to what was sent.

    Args:
        rows: (n, size).
        sent: (size,).
        count: how many.
        scale: of the sum; without, the one that fits best.

    Returns:
        The squared distance, and the indices of the rows in ascending order.
    """
    inner: Array = (rows @ sent).cpu().numpy()
    products: Array = (rows @ rows.T).cpu().numpy()
    squares, size = products.diagonal(), float(sent @ sent)

    def distances_with_one_more(chosen: list[int]) -> Array:
        counts = np.bincount(chosen, minlength=len(rows))
        along = inner[chosen].sum() + inner
        square = counts @ products @ counts + 2 * (products @ counts) + squares
        fitting = along.clip(min=0) / square.clip(min=1e-300) if scale is None else scale
        distances: Array = size - 2 * fitting * along + fitting**2 * square
        return distances

    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distances_with_one_more(chosen).argmin()))
    unchanged = 0
    while unchanged < count:
        oldest, *others = chosen
        distances = distances_with_one_more(others)
        best = int(distances.argmin())
        if distances[best] >= distances[oldest] - ROUNDING * size:
            best = oldest
        unchanged = unchanged + 1 if best == oldest else 0
        chosen = [*others, best]
    return float(distances[chosen[-1]]), sorted(chosen)
