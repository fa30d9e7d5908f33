"""Makes a capture: what clients of the declared model send for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.case.loading import load_client
from ggl_audit.client.contribution import Contribution
from ggl_audit.client.randomness import client_context
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.inputs.images import read_image
from ggl_audit.inputs.layouts import CHANNELS_LAST
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

WRITES_PYTORCHS_LAYOUT = Message(
    "capturing/writes-pytorchs-layout",
    "{layout}, but 'ggl-audit capture' writes PyTorch's layout",
    "Leave it out.",
    advice="Leave `capture.layout` out of this spec.",
)
LABELS_AND_TARGETS = Message(
    "capturing/labels-and-targets",
    "labels are given, and capture.targets too: give one of them",
    advice="Leave out `--label` where the spec has `capture.targets`.",
)
NEEDS_TARGETS = Message(
    "loss/needs-targets",
    "not given, but reference labels are more than class indices",
    advice="Declare `capture.targets` for `ggl-audit capture`.",
)
NO_SUCH_CLASS = Message(
    "capturing/no-such-class",
    "has {classes} classes, 0 to {last}; the label is {label}",
    advice="Count classes from 0.",
)
OTHER_COUNTS = Message(
    "capturing/other-counts",
    "{images} images and {labels} labels; {batch_size} (capture.batch_size) for each of {clients} "
    "clients are expected",
    advice="Give `--image` and `--label` as often as the release has images.",
)
CARRIES_OVER = Message(
    "capturing/carries-over",
    "{defense} carries something over from {rounds} earlier rounds, whose images are not given "
    "here",
    advice="Capture it from a client that has had these rounds, or declare no error feedback and "
    "`round: 1`.",
)
ZERO_EVERYWHERE = Message(
    "capturing/zero-everywhere",
    "the gradient of {pictures} is zero everywhere: there is nothing to capture",
    advice="Look at the weights, `model.input` and the defense: a dead layer or a threshold "
    "leaves nothing.",
)


def capture_gradient(spec: Spec, images: Sequence[Path], labels: Sequence[int]) -> Gradient:
    """Computes what clients send for their images, under the declared defense.

    With ``capture.stage: raw`` the defense of the whole is left out. Computed on the CPU in double
    precision and rounded to single at the end, so that the file is the same, bit for bit, on other
    machines.

    Args:
        spec: declares the model, the defense and the seed of the clients' randomness.
        images: picture files of the model's size, ``capture.batch_size`` for each client.
        labels: their class indices; none where the spec has ``capture.targets``.

    Returns:
        What is seen, float32.

    Raises:
        AuditError: an image, a label, the model or the defense cannot be used.
    """
    if spec.capture.layout == CHANNELS_LAST:
        raise SpecError(("capture", "layout"), WRITES_PYTORCHS_LAYOUT(layout=CHANNELS_LAST))
    cpu = torch.device("cpu")
    defense, model = load_client(spec, cpu, torch.float64)
    if spec.capture.targets is not None:
        if labels:
            raise AuditError(LABELS_AND_TARGETS())
        assert model.targets is not None
        labels = model.targets.captured
    elif model.targets is not None:
        raise SpecError(("capture", "targets"), NEEDS_TARGETS())
    for label in labels:
        if not 0 <= label < model.classes:
            raise SpecError(
                ("model",),
                NO_SUCH_CLASS(classes=model.classes, last=model.classes - 1, label=label),
            )
    batch_size, clients = model.batch_size, defense.aggregation.clients
    if not len(images) == len(labels) == batch_size * clients:
        raise AuditError(
            OTHER_COUNTS(
                images=len(images), labels=len(labels), batch_size=batch_size, clients=clients
            )
        )
    if defense.earlier_rounds:
        raise SpecError(("defense",), CARRIES_OVER(defense=defense, rounds=defense.earlier_rounds))
    private = torch.stack([read_image(path, model.shape).double() for path in images])
    context = client_context(spec.seed, "captured client", cpu)
    contribution = Contribution(model, defense)
    shares, contexts = [], []
    for own, own_labels in zip(
        private.split(batch_size), torch.tensor(labels).split(batch_size), strict=True
    ):
        drawn = contribution.draw(context, batch_size)
        share = contribution(own, own_labels, drawn)
        shares.append({name: share[name] for name in model.parameters})
        contexts.append(replace(context, images=own, drawn=drawn))
    whole = Pipeline() if spec.capture.stage == "raw" else defense
    sent = whole.release(shares, contexts)
    if not any(bool(tensor.any()) for tensor in sent.values()):
        shown = ", ".join(map(str, images))
        raise AuditError(ZERO_EVERYWHERE(pictures=shown))
    return each(lambda tensor: tensor.float(), sent)
