"""The labels of the captured images, as declared or as the capture gives them away."""

from __future__ import annotations

from typing import Literal

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
from ggl_audit.case.case import Case
from ggl_audit.errors import Key, SpecError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message

LABELS_OF_NO_IMAGE = Message(
    "labels/of-no-image",
    "the capture gives away that of the labels {labels} apply, which is so for no image of "
    "{source}",
    "{what_to_declare}",
    advice="Declare `capture.targets`, or give reference images that have these labels.",
)
INDICES_BESIDE_TARGETS = Message(
    "loss/indices-beside-targets",
    "class indices, but reference labels are not",
    "{what_to_declare}",
    advice="Declare `capture.targets` in place of `capture.labels`.",
)
BEYOND_CLASSES = Message(
    "labels/beyond-classes",
    "{label}; the model has {classes} classes, 0 to {last}",
    advice="Count classes from 0, or correct the model.",
)
OTHER_NUMBER = Message(
    "labels/other-number",
    "{key} has {count} entries; the capture is made of {members} images",
    advice="Declare a label for each image, `capture.batch_size` for each client, in the order of "
    "the clients.",
)


def labels_of(
    case: Case, observed: Gradient, declared: list[int] | Literal["infer"] | None
) -> list[int]:
    """The labels of the captured images, as declared or as the capture gives them away.

    Args:
        case: what was handed in.
        observed: the captured gradient.
        declared: the labels; None where targets are declared in their place.

    Raises:
        SpecError: they cannot be inferred, are not of the model, or are too few or too many.
    """
    model, members, targets = case.model, case.members, case.model.targets
    key: Key = ("capture", "targets" if declared is None else "labels")
    if declared == "infer":
        hidden = why_not_inferred(model, members)
        if hidden is not None:
            raise SpecError(key, hidden.advising(_declare_labels(model)))
        labels = infer(case, stack([observed])).flatten().tolist()
        if targets is not None and model.head is not None:
            ones = infer_ones(stack([observed]), model.head)[0]
            if not torch.equal(ones, targets.rows[labels[0]].bool()):
                shown = ", ".join(map(str, ones.nonzero().flatten().tolist())) or "none"
                raise SpecError(
                    key,
                    LABELS_OF_NO_IMAGE(
                        labels=shown,
                        source=case.reference.source,
                        what_to_declare=_declare_labels(model),
                    ),
                )
        return labels
    if declared is None:
        assert targets is not None
        labels = list(targets.captured)
    elif targets is not None:
        raise SpecError(key, INDICES_BESIDE_TARGETS(what_to_declare=_declare_labels(model)))
    else:
        labels = declared
    for index, label in enumerate(labels):
        if label >= model.classes:
            raise SpecError(
                (*key, index),
                BEYOND_CLASSES(label=label, classes=model.classes, last=model.classes - 1),
            )
    if len(labels) != members:
        raise SpecError(key, OTHER_NUMBER(key=key[1], count=len(labels), members=members))
    return labels


def _declare_labels(model: ClientModel) -> str:
    if model.targets is None:
        return "Declare it: labels: [3]."
    return "Declare capture.targets, a file of one tensor with a row for each captured image."


def infer(case: Case, observed: Gradient) -> torch.Tensor:
    """The labels that t gradients give away, (t, k).

    Args:
        case: what was handed in, with a model that ends in a linear layer.
        observed: tensors with a leading dimension t.
    """
    model, members = case.model, case.members
    assert model.head is not None
    if members > 1:
        scale = scale_of_one(model, case.defense, members)
        return infer_several(observed, model, usual_head(model, case.reference), members, scale)
    if model.criterion.shows == "lowest":
        return infer_labels(observed, model.head)[:, None]
    ones = infer_ones(observed, model.head)
    if model.targets is None:
        return ones[:, :1].long()
    rows = model.targets.rows
    return torch.cdist(ones.to(rows), rows, p=1).argmin(dim=1, keepdim=True)
