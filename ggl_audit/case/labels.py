"""The labels of the captured images, as declared or as the capture gives them away."""

from __future__ import annotations

import torch

from ggl_audit.attack.labels import (
    infer_labels,
    infer_ones,
    infer_several,
    scale_of_one,
    usual_head,
    why_not_inferred,
)
from ggl_audit.basics.gradient import Gradient, stack
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import Key, SpecError
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import Spec


def labels_of(
    spec: Spec,
    model: ClientModel,
    defense: Pipeline,
    observed: Gradient,
    members: int,
    reference: ImageSet,
) -> list[int]:
    """The labels of the captured images, as declared or as the capture gives them away.

    Raises:
        SpecError: they cannot be inferred, are not of the model, or are too few or too many.
    """
    declared, targets = spec.capture.labels, model.targets
    key: Key = ("capture", "targets" if declared is None else "labels")
    if declared == "infer":
        reason = why_not_inferred(model, members)
        if reason:
            raise SpecError(key, reason, _declare_labels(model))
        inferred = infer(model, defense, stack([observed]), members, reference)
        labels = inferred.flatten().tolist()
        if targets is not None and model.head is not None:
            ones = infer_ones(stack([observed]), model.head)[0]
            if not torch.equal(ones, targets.rows[labels[0]].bool()):
                shown = ", ".join(map(str, ones.nonzero().flatten().tolist())) or "none"
                raise SpecError(
                    key,
                    f"the capture gives away that of the labels {shown} apply, which is so for no "
                    f"image of {reference.source}",
                    _declare_labels(model),
                )
        return labels
    if declared is None:
        assert targets is not None
        labels = list(targets.captured)
    elif targets is not None:
        raise SpecError(key, "class indices, but reference labels are not", _declare_labels(model))
    else:
        labels = declared
    for index, label in enumerate(labels):
        if label >= model.classes:
            raise SpecError(
                (*key, index),
                f"{label}; the model has {model.classes} classes, 0 to {model.classes - 1}",
            )
    if len(labels) != members:
        raise SpecError(
            key,
            f"{key[1]} has {len(labels)} entries; the capture is made of {members} images",
        )
    return labels


def _declare_labels(model: ClientModel) -> str:
    if model.targets is None:
        return "Declare it: labels: [3]."
    return "Declare capture.targets, a file of one tensor with a row for each captured image."


def infer(
    model: ClientModel, defense: Pipeline, observed: Gradient, members: int, reference: ImageSet
) -> torch.Tensor:
    """The labels that t gradients give away, (t,) or (t, members).

    Args:
        model: the client's, which ends in a linear layer.
        defense: what the clients did to the gradients.
        observed: tensors with a leading dimension t.
        members: how many images each is of.
        reference: public images.
    """
    assert model.head is not None
    if members > 1:
        scale = scale_of_one(model, defense, members)
        return infer_several(observed, model, usual_head(model, reference), members, scale)
    if model.criterion.shows == "lowest":
        return infer_labels(observed, model.head)
    ones = infer_ones(observed, model.head)
    if model.targets is None:
        return ones[:, 0].long()
    return torch.cdist(ones.to(model.targets.rows), model.targets.rows, p=1).argmin(dim=1)
