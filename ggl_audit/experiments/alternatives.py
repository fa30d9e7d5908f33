"""What else a capture may be of, where it is not of what was declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from ggl_audit.attack.matching import Matching
from ggl_audit.errors import SpecError
from ggl_audit.inputs.model import has_batch_norm
from ggl_audit.loading import load_client
from ggl_audit.setting import Setting, labels_of

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
MOST_SWAPS = 10
COLOURS = 3


def other_models(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Of which other model the capture may be: one declared thing changed at a time, named."""
    spec = setting.spec
    declared = spec.model

    def other_model(cause: str, **changes: Any) -> Iterator[tuple[str, Setting]]:
        changed = spec.model_copy(update={"model": declared.model_copy(update=changes)})
        try:
            defense, model = load_client(
                changed, setting.model.device, unsent=setting.captured.unsent
            )
            Matching(model, defense).try_out()
        except SpecError:
            return  # as it cannot be so
        yield cause, replace(setting, model=model, defense=defense)

    if has_batch_norm(setting.model.module):
        mode = "train" if declared.mode == "eval" else "eval"
        yield from other_model(f"the model was in {mode} mode", mode=mode)
    for mean, std in USUAL_NORMALIZATIONS.get(declared.input.shape[0], ()):
        own = declared.input  # one value there is of all channels
        if not (np.allclose(mean, own.mean) and np.allclose(std, own.std)):
            changed = declared.input.model_copy(update={"mean": mean, "std": std})
            cause = f"the images were normalized with mean {mean} and std {std}"
            yield from other_model(cause, input=changed)
    if declared.input.shape[0] == COLOURS:
        other = "bgr" if declared.input.channels == "rgb" else "rgb"
        changed = declared.input.model_copy(update={"channels": other})
        yield from other_model(f"the channels are in the order {other}", input=changed)


def other_layouts(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """In which other order or sign the capture's values may be, named."""
    spec = setting.spec
    if spec.capture.kind == "update":
        negative = {name: -tensor for name, tensor in setting.observed.items()}
        cause = "the update is the weights after training minus those before"
        parts = (setting.model, setting.defense, negative, setting.members, setting.reference)
        with suppress(SpecError):  # as it gives no label away
            labels = labels_of(spec, *parts)
            yield cause, replace(setting, observed=negative, labels=labels)
    same = [
        (first, second)
        for first, second in itertools.combinations(setting.observed, 2)
        if setting.observed[first].shape == setting.observed[second].shape
        and setting.observed[first].ndim > 1
    ]
    for first, second in same[:MOST_SWAPS]:
        swapped = {
            **setting.observed,
            first: setting.observed[second],
            second: setting.observed[first],
        }
        yield f"{first} and {second} are swapped", replace(setting, observed=swapped)
