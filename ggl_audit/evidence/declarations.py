"""Which other declarations of the model a capture may be of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ggl_audit.inputs.model import ClientModel, has_batch_norm
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
MOST_PARTS = 6
"""Of a model, of which the first may be in eval mode."""


def other_declarations(spec: Spec, model: ClientModel) -> Iterator[tuple[str, Spec]]:
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
            cause = f"the images were normalized with mean {mean} and std {std}"
            yield cause, other(input=own.model_copy(update={"mean": mean, "std": std}))
    if own.shape[0] == COLOURS:
        order = "bgr" if own.channels == "rgb" else "rgb"
        changed: ImageFormat = own.model_copy(update={"channels": order})
        yield f"the channels are in the order {order}", other(input=changed)


def _modes(declared: ModelSpec, model: ClientModel) -> Iterator[tuple[str, str, list[str]]]:
    """Other modes: of all of the model, of what is frozen, or of all but its first parts."""
    if not has_batch_norm(model.module):
        return
    for mode in ("eval", "train"):
        if declared.mode != mode or declared.eval_modules:
            yield f"the model was in {mode} mode", mode, []
    if declared.factory is None:
        return  # a saved program has its mode for good
    tried = [declared.eval_modules]
    for apart in (_frozen(model), *_first_parts(model.module)):
        if apart and apart not in tried:
            tried.append(apart)
            shown = ", ".join(apart)
            yield f"the model was in train mode, with eval_modules: [{shown}]", "train", apart


def _frozen(model: ClientModel) -> list[str]:
    """The batch norms that are not trained, if others are."""
    names = [n for n, layer in model.module.named_modules() if isinstance(layer, _BatchNorm)]
    fixed = [
        name
        for name in names
        if f"{name}.weight" in model.constants and f"{name}.bias" in model.constants
    ]
    return fixed if len(fixed) < len(names) else []


def _first_parts(module: nn.Module) -> Iterator[list[str]]:
    """The first of the parts that have batch norm, the first two, and so on, but for all."""
    prefix = ""
    while True:
        parts = [
            (name, part)
            for name, part in module.named_children()
            if any(isinstance(layer, _BatchNorm) for layer in part.modules())
        ]
        if len(parts) != 1:
            break
        prefix, module = f"{prefix}{parts[0][0]}.", parts[0][1]
    names = [f"{prefix}{name}" for name, _ in parts]
    for count in range(1, min(len(names), MOST_PARTS)):
        yield names[:count]
