"""What else a capture may be of, where it is not of what was declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.case import Case
from ggl_audit.case.labels import labels_of
from ggl_audit.case.loading import load_client, observe_statistics
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.evidence.declarations import other_declarations
from ggl_audit.evidence.signs import negated
from ggl_audit.evidence.square_layers import square_layers
from ggl_audit.inputs.layouts import flattened, trace_arrangements
from ggl_audit.messages import Message, Said
from ggl_audit.spec import OPTIMIZER_KEYS, LocalTrainingSpec

MOST_SWAPS = MOST_TRANSPOSED = 10

OTHER_SIGN = Message(
    "cause/other-sign",
    "the capture has the other sign (declare the other capture.sign, or negate the file)",
    advice="Declare `capture.sign: after_minus_before`, save before minus after, or give the "
    "checkpoints as `capture.before` and `capture.after`.",
)
OTHER_OPTIMIZER = Message(
    "cause/other-optimizer",
    "the client trained by another optimizer: {optimizer}",
    advice="Declare `capture.local.optimizer`, and its keys as the client has them.",
)
IN_PYTORCHS_LAYOUT = "Save the tensors by name, in PyTorch's layout: (out, in, height, width)."
SWAPPED = Message(
    "cause/swapped",
    "{first} and {second} are swapped",
    advice=IN_PYTORCHS_LAYOUT,
)
HEIGHT_WIDTH_CHANNEL = Message(
    "cause/height-width-channel",
    "the inputs of {names} are in the order height, width, channel",
    advice=IN_PYTORCHS_LAYOUT,
)
VALUES_TRANSPOSED = Message(
    "cause/values-transposed",
    "the values of {names} are transposed",
    advice=IN_PYTORCHS_LAYOUT,
)


def other_models(case: Case) -> Iterator[tuple[Said, Case]]:
    """Yields each other model that the capture may be of, one thing changed, and names it."""
    for cause, changed in other_declarations(case.spec, case.model):
        with suppress(AuditError):  # as it cannot be so
            defense, model = load_client(
                changed, case.model.device, unsent=case.audited.fitted.unsent
            )
            own = case.model.statistics
            if own is not None:
                model, defense = observe_statistics(model, defense, own.names, own.unit)
            matching = Matching(model, defense, memory=changed.memory_bytes)
            matching.clients.try_out()
            observed = matching.seen_of(case.audited.observed)
            if observed is not None:
                other = replace(case, model=model, defense=defense)
                yield cause, _observing(other, observed)


def other_signs(case: Case) -> Iterator[tuple[Said, Case]]:
    """Yields the negated capture, and names it."""
    negative = negated(case.audited.observed)
    declared = "infer" if case.audited.inferred else case.spec.capture.labels
    with suppress(SpecError):  # as it gives no label away
        labels = labels_of(case, negative, declared)
        yield OTHER_SIGN(), _observing(case, negative, labels=labels)


def other_trainings(case: Case) -> Iterator[tuple[Said, Case]]:
    """Yields each other optimizer by which a client may have trained, and names it."""
    local = case.model.local
    if local is None:
        return
    kept = {key for keys in OPTIMIZER_KEYS.values() for key in keys}
    declared = local.model_dump(exclude_unset=True, exclude=kept)
    for optimizer in OPTIMIZER_KEYS:
        if optimizer != local.optimizer:
            other = LocalTrainingSpec(**{**declared, "optimizer": optimizer})
            model = replace(case.model, local=other)
            yield OTHER_OPTIMIZER(optimizer=optimizer), replace(case, model=model)


def other_layouts(case: Case) -> Iterator[tuple[Said, Case]]:
    """Yields each other order in which the capture's values may be, and names it."""
    for cause, observed in _other_arrangements(case):
        yield cause, _observing(case, observed)
    seen = case.audited.observed
    same = [
        (first, second)
        for first, second in itertools.combinations(seen, 2)
        if seen[first].shape == seen[second].shape and seen[first].ndim > 1
    ]
    for first, second in same[:MOST_SWAPS]:
        swapped = {**seen, first: seen[second], second: seen[first]}
        yield SWAPPED(first=first, second=second), _observing(case, swapped)


def _observing(case: Case, observed: Gradient, **changes: Any) -> Case:
    """The case with another gradient as its audited capture."""
    capture = replace(case.audited, observed=observed, **changes)
    return replace(case, captures=(capture,))


def _other_arrangements(case: Case) -> Iterator[tuple[Said, Gradient]]:
    """In which other layout single tensors may be whose shape does not tell, named."""
    model, observed = case.model, case.audited.observed
    images = case.reference.images[: model.batch_size]
    places = flattened(trace_arrangements(model.module, model.normalize(images)))
    ordered = {
        name: observed[name][:, own.to(model.device)]
        for name, own in places.items()
        if name in observed
    }
    if ordered:
        cause = HEIGHT_WIDTH_CHANNEL(names=", ".join(ordered))
        yield cause, {**observed, **ordered}
    square = square_layers(observed)[:MOST_TRANSPOSED]
    for names in [square, *([name] for name in square)] if len(square) > 1 else [square]:
        if names:
            transposed = {name: observed[name].T for name in names}
            yield VALUES_TRANSPOSED(names=", ".join(names)), {**observed, **transposed}
