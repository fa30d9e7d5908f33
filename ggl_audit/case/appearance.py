"""What a capture looks like, beside what clients compute from public images."""

from __future__ import annotations

import torch

from ggl_audit.attack.labels import usual_head
from ggl_audit.case.capture import Capture
from ggl_audit.case.case import USUAL_GRADIENTS, Case
from ggl_audit.evidence.appearance import appearance, gives_probabilities
from ggl_audit.evidence.last_layer import look_at_last_layer

FAR_FROM_IMAGES = (100, -100)
"""Multiples of images, whose probabilities are between 0 and 1 all the same."""


def appearance_of(case: Case, capture: Capture) -> list[str]:
    """Says what a capture looks like, in sentences, where that can be told."""
    gradient, model = capture.fitted.gradient, case.model
    plain = case.spec.model.loss.is_plain and model.targets is None
    seen = look_at_last_layer(model, gradient, capture.fitted.rounding) if plain else None
    usual = None if seen is None else usual_head(model, case.reference)
    sets, _ = case.reference.sets(USUAL_GRADIENTS, model.batch_size)
    with torch.no_grad():
        # Logits of images may happen to be between 0 and 1; those of much more than images not.
        tried = [factor * images for images in sets for factor in (1, *FAR_FROM_IMAGES)]
        outputs = torch.cat([model.logits(model.parameters, images) for images in tried])
    loss = None if case.spec.model.loss.factory else case.spec.model.loss.name
    said = gives_probabilities(outputs, loss)
    computed = {name: case.usual[name] for name in gradient}
    return [*said, *appearance(gradient, computed, model, seen, usual)]
