"""What else a capture may be of, where it is not of what was declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ggl_audit.attack.matching import Matching
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.evidence.declarations import other_declarations
from ggl_audit.loading import load_client
from ggl_audit.setting import Setting, labels_of

MOST_SWAPS = 10


def other_models(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Of which other model the capture may be: one declared thing changed at a time, named."""
    for cause, changed in other_declarations(setting.spec, setting.model):
        with suppress(AuditError):  # as it cannot be so
            defense, model = load_client(
                changed, setting.model.device, unsent=setting.captured.unsent
            )
            Matching(model, defense).try_out()
            yield cause, replace(setting, model=model, defense=defense)


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
