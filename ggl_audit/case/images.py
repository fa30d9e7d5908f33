"""The public images of an audit, and the private ones where the auditor holds them."""

from __future__ import annotations

import numpy as np
import torch

from ggl_audit.basics.randomness import stream
from ggl_audit.errors import SpecError
from ggl_audit.inputs.images import ImageSet, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message
from ggl_audit.priors.loading import sample_images
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import Spec

SAMPLED_CLASSES = 10

SAMPLES_HAVE_NO_TARGETS = Message(
    "loss/samples-have-no-targets",
    "not given, but what images are to give is more than a class, and the prior's samples have no "
    "such targets",
    "Give an npz whose labels are such targets.",
    advice="Give an `evidence.reference` whose labels are such targets.",
)
NO_CLASS_OF_MODEL = Message(
    "image/no-class-of-model",
    "{source} has the label {label}; the model has {classes} classes, 0 to {last}",
    advice="Leave out images of other classes, or correct the model.",
)
NOT_ALL_PRIVATE_IMAGES = Message(
    "image/not-all-private-images",
    "names {count} images; the capture is made of {members}",
    "Give all of them, in the order of capture.labels and client by client, or none.",
    advice="Give all private images in `evidence.truth`, in the order of `capture.labels` and "
    "client by client, or none.",
)


def read_reference(spec: Spec, model: ClientModel, prior: Prior) -> ImageSet:
    """Reads the public images, or has the prior draw them where none are declared.

    Raises:
        AuditError: they cannot be read, or do not fit the model.
    """
    evidence = spec.evidence
    if evidence.reference is None:
        others = np.linspace(0, model.classes - 1, min(SAMPLED_CLASSES, model.classes)).round()
        if model.targets is not None:
            raise SpecError(("evidence", "reference"), SAMPLES_HAVE_NO_TARGETS())
        declared = spec.capture.labels if isinstance(spec.capture.labels, list) else []
        classes = sorted({*declared, *map(int, others)})
        trials = max(evidence.matching_trials, evidence.reconstruction_trials)
        many = max(2 * evidence.candidates, -(-trials // len(classes)))
        labels = torch.tensor(classes, device=model.device).repeat_interleave(many)
        return sample_images(prior, labels, stream(spec.seed, "prior samples"))
    reference = read_image_set(
        evidence.reference,
        spec.folder,
        ("evidence", "reference"),
        "reference",
        model.shape,
        targets=True,
    ).to(model.device)
    if reference.classes > model.classes:
        raise SpecError(
            ("evidence", "reference"),
            NO_CLASS_OF_MODEL(
                source=reference.source,
                label=reference.classes - 1,
                classes=model.classes,
                last=model.classes - 1,
            ),
        )
    return reference


def read_truths(spec: Spec, model: ClientModel, members: int) -> torch.Tensor:
    """Reads the private images, (k, channels, height, width); none where they are not held.

    Raises:
        AuditError: one cannot be read, or there are more or fewer than the capture is made of.
    """
    paths = spec.evidence.truth
    if len(paths) not in (0, members):
        raise SpecError(
            ("evidence", "truth"), NOT_ALL_PRIVATE_IMAGES(count=len(paths), members=members)
        )
    images = [read_image(spec.resolve(path), model.shape) for path in paths]
    return torch.stack(images).to(model.device) if images else torch.zeros(0, *model.shape)
