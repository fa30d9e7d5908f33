"""Which other declarations of the model a capture may be of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.weights import NORMALIZATIONS
from ggl_audit.messages import Message, Said
from ggl_audit.spec import ImageFormat, ModelSpec, Spec

USUAL_NORMALIZATIONS = {
    1: (([0.0], [1.0]), ([0.5], [0.5]), ([0.1307], [0.3081]), ([0.0], [1 / 255])),
    3: (
        ([0.0], [1.0]),
        ([0.0], [1 / 255]),
        ([0.5], [0.5]),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ),
}
COLOURS = 3
RUNNING = "running_mean"
MOST_PARTS = 6
"""The most parts of a model of which the first may be in eval mode."""

OTHER_NORMALIZATION = Message(
    "cause/other-normalization",
    "the images were normalized with mean {mean} and std {std}",
    advice="Declare this `mean` and `std`, if it is the client's.",
)
OTHER_CHANNELS = Message(
    "cause/other-channels",
    "the channels are in the order {order}",
    advice="Declare `model.input.channels`.",
)
OTHER_MODE = Message(
    "cause/other-mode",
    "the model was in {mode} mode",
    advice="Declare the other `model.mode`.",
)
OTHER_EVAL_MODULES = Message(
    "cause/other-eval-modules",
    "the model was in train mode, with eval_modules: [{names}]",
    advice="Declare `mode: train` and these `model.eval_modules`, if the client leaves the batch "
    "norm in them in eval mode.",
)


def other_declarations(spec: Spec, model: ClientModel) -> Iterator[tuple[Said, Spec]]:
    """Yields the spec with one declared thing of the model changed at a time, and which, in words.

    Args:
        spec: as it was declared.
        model: of it.
    """
    declared = spec.model

    def other(**changes: Any) -> Spec:
        return spec.model_copy(update={"model": declared.model_copy(update=changes)})

    for cause, mode, apart in _modes(declared, model):
        yield cause, other(mode=mode, eval_modules=apart)
    own = declared.input
    for mean, std in USUAL_NORMALIZATIONS.get(own.shape[0], ()):
        if not (np.allclose(mean, own.mean) and np.allclose(std, own.std)):
            cause = OTHER_NORMALIZATION(mean=mean, std=std)
            yield cause, other(input=own.model_copy(update={"mean": mean, "std": std}))
    if own.shape[0] == COLOURS:
        order = "bgr" if own.channels == "rgb" else "rgb"
        changed: ImageFormat = own.model_copy(update={"channels": order})
        yield OTHER_CHANNELS(order=order), other(input=changed)


def _modes(declared: ModelSpec, model: ClientModel) -> Iterator[tuple[Said, str, list[str]]]:
    """Other modes: of all of the model, of what is frozen, or of all but its first parts."""
    if not any(name.endswith(RUNNING) for name in model.state):
        return  # no statistics that a mode makes a difference to
    for mode in ("eval", "train"):
        if declared.mode != mode or declared.eval_modules:
            yield OTHER_MODE(mode=mode), mode, []
    if declared.factory is None:
        return  # a saved program has its mode for good
    tried = [declared.eval_modules]
    for apart in (_frozen(model), *_first_parts(model.module)):
        if apart and apart not in tried:
            tried.append(apart)
            yield OTHER_EVAL_MODULES(names=", ".join(apart)), "train", apart


def _frozen(model: ClientModel) -> list[str]:
    """The largest parts all of whose normalizations are not trained, if others are."""

    def within(module: nn.Module, prefix: str) -> Iterator[str]:
        names = [
            ".".join(filter(None, (prefix, own)))
            for own, layer in module.named_modules()
            if isinstance(layer, NORMALIZATIONS)
        ]
        if names and all(f"{name}.weight" in model.constants for name in names):
            yield prefix
        elif names:
            for own, part in module.named_children():
                yield from within(part, ".".join(filter(None, (prefix, own))))

    return [name for name in within(model.module, "") if name]


def _first_parts(module: nn.Module) -> Iterator[list[str]]:
    """The first of the parts with normalizations, the first two, and so on, but for all."""
    prefix = ""
    while True:
        parts = [
            (name, part)
            for name, part in module.named_children()
            if any(isinstance(layer, NORMALIZATIONS) for layer in part.modules())
        ]
        if len(parts) != 1:
            break
        prefix, module = f"{prefix}{parts[0][0]}.", parts[0][1]
    names = [f"{prefix}{name}" for name, _ in parts]
    for count in range(1, min(len(names), MOST_PARTS)):
        yield names[:count]
