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
from ggl_audit.spec import Spec


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
        raise SpecError(
            ("capture", "layout"),
            f"{CHANNELS_LAST}, but 'ggl-audit capture' writes PyTorch's layout",
            "Leave it out.",
        )
    cpu = torch.device("cpu")
    defense, model = load_client(spec, cpu, torch.float64)
    if spec.capture.targets is not None:
        if labels:
            raise AuditError("labels are given, and capture.targets too: give one of them")
        assert model.targets is not None
        labels = model.targets.captured
    elif model.targets is not None:
        raise SpecError(
            ("capture", "targets"), "not given, but reference labels are more than class indices"
        )
    for label in labels:
        if not 0 <= label < model.classes:
            raise SpecError(
                ("model",),
                f"has {model.classes} classes, 0 to {model.classes - 1}; the label is {label}",
            )
    batch_size, clients = model.batch_size, defense.aggregation.clients
    if not len(images) == len(labels) == batch_size * clients:
        raise AuditError(
            f"{len(images)} images and {len(labels)} labels; {batch_size} (capture.batch_size) for "
            f"each of {clients} clients are expected"
        )
    if defense.earlier_rounds:
        raise SpecError(
            ("defense",),
            f"{defense} carries something over from {defense.earlier_rounds} earlier rounds, whose "
            "images are not given here",
        )
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
        raise AuditError(f"the gradient of {shown} is zero everywhere: there is nothing to capture")
    return each(lambda tensor: tensor.float(), sent)
