"""Tries a model on a few images: what it returns, how many it takes, and what its loss does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ggl_audit.basics.device import CPU, random_state
from ggl_audit.errors import SpecError, raised
from ggl_audit.inputs.images import count_classes
from ggl_audit.inputs.interpreter import Program, recording_of
from ggl_audit.inputs.model import (
    ClientModel,
    Head,
    LinearCalls,
    differentiable_attention,
)
from ggl_audit.inputs.outputs import Place, candidates, choose, described
from ggl_audit.inputs.statistics import (
    Statistics,
    batches_seen,
)
from ggl_audit.inputs.tensors import Tensors
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

LOSS_ROUNDING, OUTPUT_ROUNDING = 1e-3, 1e-2
"""Relative; a GPU computes another number of images in another way, with short factors."""

TAKES_NO_SUCH_IMAGES = Message(
    "model/takes-no-such-images",
    "the model {model} does not take {images} of {shape} in mode {mode} ({error})",
    advice="Correct `model.input.shape` (channels, height, width) or the arguments of the model; "
    "batch norm in `mode: train` may need more than one value a channel.",
)
DRAWS_AT_RANDOM = Message(
    "model/draws-at-random",
    "{mode}, but the model {model} draws at random and the client's draw is not known",
    "{without_draws}",
    advice="A capture made with dropout cannot be audited, as every replay would be of another "
    "draw. Let the client make one with its probability set to 0, and set it in `model.kwargs`, "
    "or declare `mode: eval`, or `eval_modules` with this layer, if the client trains so.",
)
CHANGES_BUFFER = Message(
    "model/changes-buffer",
    "the model {model} changes its {kind} {name} in mode {mode}",
    "Many candidates are evaluated at the same weights; its forward pass must leave them as they "
    "are.",
    advice="Leave out what the forward pass writes down; running statistics of batch norm are "
    "taken care of.",
)
CORRECT_OUTPUT = (
    "Correct `model.output`; the message lists what the model returned in the declared mode."
)
NO_SUCH_OUTPUT = Message(
    "model/no-such-output",
    "{output!r}, but the model returned {returned} for {count}",
    advice=CORRECT_OUTPUT,
)
OUTPUT_WITHOUT_ROWS = Message(
    "model/output-without-rows",
    "{output!r}, which is {returned} for {count}; expected one tensor with a row for each",
    advice=CORRECT_OUTPUT,
)
RETURNS_NO_ROWS = Message(
    "model/returns-no-rows",
    "the model returned {returned} for {count}; expected one tensor with a row for each",
    advice="Return a tensor whose first dimension is the batch, by itself or in a tuple, a dict "
    "or an object.",
)
SEVERAL_OUTPUTS = Message(
    "model/several-outputs",
    "not given, but the model returned {returned} for {count}",
    "Declare the one that the loss is of, for example output: {place}; or a model.loss of your "
    "own, which is given all of them.",
    advice="Declare `model.output`, the key, attribute or place of what the loss is of, or a "
    "`model.loss` of your own, which is given all that the model returns.",
)
ONE_BATCH_SIZE = Message(
    "model/one-batch-size",
    "the model {model} takes {count} images at a time, but not {other} ({error})",
    "Other numbers are evaluated too: write x.shape[0] or -1 where it has a number.",
    advice="Write `x.shape[0]` or `-1` in the forward pass where a number of images stands.",
)
OTHER_OUTPUTS = Message(
    "loss/other-outputs",
    "the model returned {shape} for {count} images; {loss} with class indices expected {expected}",
    "Other outputs need model.loss, and evidence.reference with labels that fit them.",
    advice="Declare the loss that the client trains with, and give `evidence.reference` labels of "
    "the shape that it takes.",
)
LOSS_CANNOT_BE_TAKEN = Message(
    "loss/cannot-be-taken",
    "{loss} cannot be taken of outputs {outputs} and targets {targets} ({error})",
    advice="Make the two fit: the labels of `evidence.reference`, `capture.targets` and the "
    "outputs of the model must be what the loss takes.",
)
REDUCES_OTHERWISE = Message(
    "loss/reduces-otherwise",
    "{declared}, but the loss of a batch is {times:.3g} times as large when every image is there "
    "twice",
    "A loss of one's own reduces by itself; declare whether to the mean or to the sum.",
    advice="Declare `model.loss.reduction` as your loss reduces, `mean` or `sum`.",
)


def try_model(model: ClientModel, spec: Spec) -> ClientModel:
    """Fills in what only a call of the model tells: its output, head, classes and batches.

    Args:
        model: as it was loaded.
        spec: declares it.

    Raises:
        SpecError: it does not take the declared images, or the loss not what it returns.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.batch_size, *model.shape, generator=random).to(model.mean)
    output, whole, outputs, head = _try(model, images[0], spec)
    model = replace(model, output=output, whole=whole)
    if _try(model, images[1], spec)[3] != head:
        head = None
    with batches_seen(model.module, Statistics(model.normalizations, ())) as seen, torch.no_grad():
        model.logits(model.parameters, images[0])
    model = replace(model, normalizations=tuple(n for n in model.normalizations if n.layer in seen))
    model = replace(model, head=head, mixes=_try_more(model, images, outputs, spec))
    model = replace(model, fewest=_fewest(model, images[0], outputs))
    model = replace(model, classes=_classes(model, outputs, spec))
    _try_loss(model, images[0], spec)
    return model


def _mixes_by_statistics(module: nn.Module) -> bool:
    """Whether the images of a batch share the statistics that they are normalized with."""
    recording = recording_of(module)
    if recording is not None:
        return recording.normalizes and "train" in recording.modes
    return any(
        isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
        for layer in module.modules()
    )


def refuse_batch(spec: Spec, images: torch.Tensor, error: BaseException) -> NoReturn:
    """Says that the model does not take a batch, whatever its forward pass raised.

    Raises:
        SpecError: always.
    """
    batch = f"{len(images)} images" if len(images) > 1 else "images"
    raise SpecError(
        ("model", "input", "shape"),
        TAKES_NO_SUCH_IMAGES(
            model=spec.model.origin,
            images=batch,
            shape=list(spec.model.input.shape),
            mode=spec.model.mode,
            error=raised(error),
        ),
    ) from error


def without_draws(mode: str) -> str:
    """What to do about a forward pass that is random."""
    return (
        "A capture that was made so cannot be audited: every replay would be of another draw. Let "
        "the client make one with the probability of its dropout set to 0, and set it in "
        "model.kwargs"
        + (", or declare mode: eval if its dropout was off." if mode == "train" else ".")
    )


def _try(
    model: ClientModel, images: torch.Tensor, spec: Spec
) -> tuple[Place | None, bool, torch.Tensor, Head | None]:
    """Calls the module on a batch; finds the output, whether the loss takes more, and the head."""
    module, declared = model.module, spec.model
    held: dict[str, Tensors] = {
        "parameter": dict(module.named_parameters()),
        "buffer": dict(module.named_buffers()),
    }
    before = {kind: {n: t.detach().clone() for n, t in own.items()} for kind, own in held.items()}
    state = _random_state(model.device)

    def call(images: torch.Tensor) -> tuple[Any, LinearCalls]:
        with torch.no_grad(), differentiable_attention(), LinearCalls() as calls:
            return module(model.normalize(images)), calls

    try:
        returned, calls = call(images)
    except (Exception, SystemExit) as error:
        refuse_batch(spec, images, error)
    if not torch.equal(_random_state(model.device), state):
        raise SpecError(
            ("model", "mode"),
            DRAWS_AT_RANDOM(
                mode=declared.mode,
                model=declared.origin,
                without_draws=without_draws(declared.mode),
            ),
        )
    for kind, own in held.items():
        changed = [n for n, tensor in own.items() if not _same(tensor, before[kind][n])]
        if changed:
            raise SpecError(
                ("model", declared.source),
                CHANGES_BUFFER(
                    model=declared.origin, kind=kind, name=changed[0], mode=declared.mode
                ),
            )
    place, whole = _output(returned, images, spec)
    outputs = choose(returned, place)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    for linear in reversed(calls.seen):
        weight = names.get(id(linear.weight))
        same = linear.given.shape == outputs.shape and torch.equal(linear.given, outputs)
        reused = sum(call.weight is linear.weight for call in calls.seen) > 1
        if same and weight is not None and not reused:
            head = Head(weight.rpartition(".")[0], weight, names.get(id(linear.bias)))
            return place, whole, outputs, head
    return place, whole, outputs, None


def _output(returned: Any, images: torch.Tensor, spec: Spec) -> tuple[Place | None, bool]:
    """Which of what the module returned are the logits, and whether the loss takes all of it."""
    declared, count = spec.model, f"{len(images)} images"
    if declared.output is not None:
        try:
            chosen = choose(returned, declared.output)
        except LookupError:
            raise SpecError(
                ("model", "output"),
                NO_SUCH_OUTPUT(output=declared.output, returned=described(returned), count=count),
            ) from None
        if not candidates(chosen, len(images)) == [None]:
            raise SpecError(
                ("model", "output"),
                OUTPUT_WITHOUT_ROWS(
                    output=declared.output, returned=described(chosen), count=count
                ),
            )
        return declared.output, False
    places = candidates(returned, len(images))
    whole = declared.loss.factory is not None and not isinstance(returned, torch.Tensor)
    if not places:
        raise SpecError(
            ("model", declared.source), RETURNS_NO_ROWS(returned=described(returned), count=count)
        )
    if len(places) > 1 and not whole:
        raise SpecError(
            ("model", "output"),
            SEVERAL_OUTPUTS(returned=described(returned), count=count, place=places[0]),
        )
    return places[0], whole


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    nan = one.isnan() & other.isnan()
    return bool(((one == other) | nan).all())


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of all generators that a forward pass may draw from, on the CPU."""
    return torch.cat([random_state(one).cpu() for one in dict.fromkeys((CPU, device))])


def _try_more(model: ClientModel, images: torch.Tensor, outputs: torch.Tensor, spec: Spec) -> bool:
    """Finds out whether the module takes more images than the capture has, and mixes them.

    Args:
        model: without it.
        images: two batches.
        outputs: for the first.
        spec: for messages.

    Returns:
        Whether the output for the first image is another one where others are beside it.
    """
    count = len(images[0])
    more = torch.cat([images[0][:1], images[1]])
    try:
        with torch.no_grad():
            together = model.logits(model.parameters, more)
    except SpecError as error:
        if isinstance(model.module, Program):
            model.module.limit_to(count)
            return _mixes_by_statistics(model.module)
        reason = error.__cause__ or error
        raise SpecError(
            ("model", spec.model.source),
            ONE_BATCH_SIZE(
                model=spec.model.origin, count=count, other=len(more), error=raised(reason)
            ),
        ) from error
    return _mixes_by_statistics(model.module) or not _alike(together[:1], outputs[:1])


def _fewest(model: ClientModel, images: torch.Tensor, outputs: torch.Tensor) -> int:
    """How many images the module takes at the least.

    A model may squeeze away the dimension of a single image, or refuse to normalize it alone.
    """
    for count in range(1, min(3, len(images))):
        try:
            with torch.no_grad():
                alone = model.logits(model.parameters, images[:count])
        except SpecError:
            continue
        expected = outputs[:count]
        if alone.shape == expected.shape and (model.mixes or _alike(alone, expected)):
            return count
    return len(images)


def _alike(outputs: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether outputs are the same up to rounding."""
    if outputs.shape != others.shape:
        return False
    away, size = (outputs - others).abs().amax(), others.abs().amax()
    return bool(away <= OUTPUT_ROUNDING * size)


def _classes(model: ClientModel, outputs: torch.Tensor, spec: Spec) -> int:
    if model.targets is not None:
        return len(model.targets.rows)
    reference, declared = spec.evidence.reference, spec.capture.labels
    if spec.model.loss.factory is not None and reference is not None:
        # Only the client's own code knows which of the outputs are logits.
        own = declared if isinstance(declared, list) else []
        return max(2, count_classes(reference, spec.folder), *(label + 1 for label in own))
    try:
        return model.criterion.classes(outputs)
    except ValueError as error:
        raise SpecError(
            ("model", spec.model.source),
            OTHER_OUTPUTS(
                shape=tuple(outputs.shape), count=len(outputs), loss=spec.model.loss, expected=error
            ),
        ) from None


def _try_loss(model: ClientModel, images: torch.Tensor, spec: Spec) -> None:
    last = 0 if model.targets is not None else model.classes - 1
    labels = torch.full((len(images),), last, dtype=torch.long, device=model.device)
    targets = model.targets_of(labels)
    with torch.no_grad():
        outputs = model.outputs(model.parameters, images)
        if isinstance(outputs, torch.Tensor):
            doubled = torch.cat([outputs, outputs])
        else:
            doubled = model.outputs(model.parameters, torch.cat([images, images]))

    def loss(outputs: Any, targets: torch.Tensor) -> float:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)  # targets that are broadcast, for example
            return float(model.criterion(outputs, targets))

    try:
        once, twice = loss(outputs, targets), loss(doubled, torch.cat([targets, targets]))
    except (Exception, SystemExit) as error:
        # The loss may be the user's own code.
        given = described(outputs).removeprefix("a tensor ")
        raise SpecError(
            ("model", "loss"),
            LOSS_CANNOT_BE_TAKEN(
                loss=spec.model.loss,
                outputs=given,
                targets=tuple(targets.shape),
                error=raised(error),
            ),
        ) from error
    declared, factor = spec.model.loss.reduction, 2 if model.loss_sum else 1
    if model.batch_size > 1 and abs(twice - factor * once) > LOSS_ROUNDING * abs(twice):
        raise SpecError(
            ("model", "loss", "reduction"),
            REDUCES_OTHERWISE(declared=declared, times=twice / once if once else twice),
        )
