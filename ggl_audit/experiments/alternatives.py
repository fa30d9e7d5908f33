"""What else a capture may be of, where it is not of what was declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.labels import labels_of
from ggl_audit.case.loading import load_client, observe_statistics
from ggl_audit.case.setting import Setting
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.evidence.declarations import other_declarations
from ggl_audit.evidence.signs import negated
from ggl_audit.evidence.square_layers import square_layers
from ggl_audit.inputs.layouts import flattened, trace_arrangements
from ggl_audit.spec import OPTIMIZER_KEYS, LocalTrainingSpec

MOST_SWAPS = MOST_TRANSPOSED = 10


def other_models(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Of which other model the capture may be: one declared thing changed at a time, named."""
    for cause, changed in other_declarations(setting.spec, setting.model):
        with suppress(AuditError):  # as it cannot be so
            defense, model = load_client(
                changed, setting.model.device, unsent=setting.captured.unsent
            )
            own = setting.model.statistics
            if own is not None:
                model, defense = observe_statistics(model, defense, own.names, own.unit)
            matching = Matching(model, defense, memory=changed.memory_bytes)
            matching.clients.try_out()
            observed = matching.seen_of(setting.observed)
            if observed is not None:
                yield cause, replace(setting, model=model, defense=defense, observed=observed)


def other_signs(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The negated capture, named."""
    negative = negated(setting.observed)
    cause = "the capture has the other sign (declare the other capture.sign, or negate the file)"
    parts = (setting.model, setting.defense, negative, setting.members, setting.reference)
    with suppress(SpecError):  # as it gives no label away
        labels = labels_of(setting.spec, *parts)
        yield cause, replace(setting, observed=negative, labels=labels)


def other_trainings(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """By which other optimizer a client may have trained, named."""
    local = setting.model.local
    if local is None:
        return
    kept = {key for keys in OPTIMIZER_KEYS.values() for key in keys}
    declared = local.model_dump(exclude_unset=True, exclude=kept)
    for optimizer in OPTIMIZER_KEYS:
        if optimizer != local.optimizer:
            other = LocalTrainingSpec(**{**declared, "optimizer": optimizer})
            model = replace(setting.model, local=other)
            cause = f"the client trained by another optimizer: {optimizer}"
            yield cause, replace(setting, model=model)


def other_layouts(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """In which other order the capture's values may be, named."""
    for cause, observed in _other_arrangements(setting):
        yield cause, replace(setting, observed=observed)
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


def _other_arrangements(setting: Setting) -> Iterator[tuple[str, Gradient]]:
    """In which other layout single tensors may be whose shape does not tell, named."""
    model, observed = setting.model, setting.observed
    images = setting.reference.images[: model.batch_size]
    places = flattened(trace_arrangements(model.module, model.normalize(images)))
    ordered = {
        name: observed[name][:, own.to(model.device)]
        for name, own in places.items()
        if name in observed
    }
    if ordered:
        cause = f"the inputs of {', '.join(ordered)} are in the order height, width, channel"
        yield cause, {**observed, **ordered}
    square = square_layers(observed)[:MOST_TRANSPOSED]
    for names in [square, *([name] for name in square)] if len(square) > 1 else [square]:
        if names:
            transposed = {name: observed[name].T for name in names}
            yield f"the values of {', '.join(names)} are transposed", {**observed, **transposed}
