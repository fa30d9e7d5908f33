"""Reads what was captured, and has the model and the defense observe all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ggl_audit.basics.gradient import each, norm
from ggl_audit.case.loading import observe_statistics
from ggl_audit.defenses import Pipeline
from ggl_audit.defenses.sec_adam import last_gradient
from ggl_audit.errors import InputError, NothingToMeasureError
from ggl_audit.inputs.capture import FittedGradient, read_capture, read_update
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

SAME_CHANGES = 2
"""In roundings of the file."""

KEY_IS_HELD = Message(
    "inconclusive/key-is-held",
    "the capture is a ciphertext and {holder} holds the key: without it there is nothing to "
    "measure, which is not the same as safe",
    "Audit what {holder} sees: view: key_holder, with the decrypted gradient.",
    advice="Audit what the holder of the key sees: `view: key_holder`, with the decrypted "
    "gradient.",
)
ONLY_IN_ONE_ROUND = Message(
    "capture/only-in-one-round",
    "{name!r} is only in one of capture.previous and the capture",
    advice="Give both files in the same form, from the same client.",
)


def read_captured(
    spec: Spec, model: ClientModel, defense: Pipeline, file: Path | None
) -> FittedGradient:
    """Reads a capture; Adam's moments are taken apart into the gradient that they hold.

    Args:
        spec: says what it is of.
        model: which it must fit.
        defense: as declared.
        file: of a gradient; None where the capture is an update between two files.

    Raises:
        AuditError: it cannot be read, or is a ciphertext.
    """
    capture = spec.capture
    ignored = [one.name for one in capture.ignored]
    holder = defense.effect.ciphertext_of()
    if holder is not None:
        raise NothingToMeasureError(("defense",), KEY_IS_HELD(holder=holder))
    if capture.after is not None:
        before = None if capture.before is None else spec.resolve(capture.before)
        return read_update(before, spec.resolve(capture.after), model, ignored)
    assert file is not None
    negated = capture.sign == "after_minus_before"
    captured = read_capture(spec.resolve(file), model, ignored, negated=negated)
    if capture.kind != "moments":
        return captured
    previous = each(torch.zeros_like, captured.gradient)
    if capture.previous is not None:
        path = spec.resolve(capture.previous)
        earlier = read_capture(path, model, ignored)
        previous = earlier.gradient
        if previous.keys() != captured.gradient.keys():
            odd = min(previous.keys() ^ captured.gradient.keys())
            raise InputError(path, ONLY_IN_ONE_ROUND(name=odd))
        captured = replace(captured, beside=captured.beside.after(earlier.beside))
    gradient = last_gradient(captured.gradient, previous, capture.beta1)
    return replace(captured, gradient=gradient)


def with_statistics(
    model: ClientModel, defense: Pipeline, captured: FittedGradient
) -> tuple[ClientModel, Pipeline]:
    """The model and the defense for a capture that holds running statistics as well."""
    changes = captured.beside.statistics
    if not changes:
        return model, defense
    names = [*changes]
    if defense.clear.is_over_everything:
        names += captured.beside.counts
        unit = 1.0  # they are in one norm with the gradient
    else:
        unit = float(norm(captured.gradient) / norm(changes))
    after = [model.state[name].float() - change for name, change in changes.items()]
    size = max(float(tensor.norm()) for tensor in after) * captured.beside.rounding
    rounding = (SAME_CHANGES * size / float(norm(changes))) ** 2
    return observe_statistics(model, defense, names, unit, rounding)
