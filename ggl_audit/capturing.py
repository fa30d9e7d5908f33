"""Makes a capture: what a client of the declared model sends for one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.func import grad

from ggl_audit.defenses import Pipeline, build_pipeline
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.gradient import Gradient, each
from ggl_audit.inputs.images import read_image
from ggl_audit.inputs.model import load_model
from ggl_audit.randomness import client_context
from ggl_audit.spec import Spec


def capture_gradient(spec: Spec, image: Path, label: int) -> Gradient:
    """Computes the gradient of one image and applies the declared defense.

    With ``capture.stage: raw`` the defense is left out. Computed on the CPU in double precision and
    rounded to single at the end, so that the file is the same, bit for bit, on other machines.

    Args:
        spec: declares the model, the defense and the seed of the client's randomness.
        image: a picture file of the model's size.
        label: its class index.

    Returns:
        The gradient as sent, float32.

    Raises:
        AuditError: the image, the label, the model or the defense cannot be used.
    """
    model = load_model(spec, torch.device("cpu"), torch.float64)
    if not 0 <= label < model.classes:
        raise SpecError(
            ("model",),
            f"has {model.classes} classes, 0 to {model.classes - 1}; the label is {label}",
        )
    private = read_image(image, model.shape).double()
    gradient: Gradient = grad(model.loss)(model.parameters, private, torch.tensor(label))
    defense = Pipeline() if spec.capture.stage == "raw" else build_pipeline(spec.defense)
    context = client_context(spec.seed, "captured client", torch.device("cpu"))
    sent = defense.apply({name: gradient[name] for name in model.parameters}, context)
    if not any(bool(tensor.any()) for tensor in sent.values()):
        raise AuditError(f"the gradient of {image} is zero everywhere: there is nothing to capture")
    return each(lambda tensor: tensor.float(), sent)
