"""Tries a model on a few images: what it returns, how many it takes, and what its loss does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ggl_audit.basics.device import CPU, random_state
from ggl_audit.errors import SpecError
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
from ggl_audit.spec import Spec

LOSS_ROUNDING, OUTPUT_ROUNDING = 1e-3, 1e-2
"""Relative; a GPU computes another number of images in another way, with short factors."""


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
        f"the model {spec.model.origin} does not take {batch} of {list(spec.model.input.shape)} in "
        f"mode {spec.model.mode} ({type(error).__name__}: {error})",
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
            f"{declared.mode}, but the model {declared.origin} draws at random and the client's "
            "draw is not known",
            without_draws(declared.mode),
        )
    for kind, own in held.items():
        changed = [n for n, tensor in own.items() if not _same(tensor, before[kind][n])]
        if changed:
            raise SpecError(
                ("model", declared.source),
                f"the model {declared.origin} changes its {kind} {changed[0]} in mode "
                f"{declared.mode}",
                "Many candidates are evaluated at the same weights; its forward pass must leave "
                "them as they are.",
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
                f"{declared.output!r}, but the model returned {described(returned)} for {count}",
            ) from None
        if not candidates(chosen, len(images)) == [None]:
            raise SpecError(
                ("model", "output"),
                f"{declared.output!r}, which is {described(chosen)} for {count}; expected one "
                "tensor with a row for each",
            )
        return declared.output, False
    places = candidates(returned, len(images))
    whole = declared.loss.factory is not None and not isinstance(returned, torch.Tensor)
    if not places:
        raise SpecError(
            ("model", declared.source),
            f"the model returned {described(returned)} for {count}; expected one tensor with a row "
            "for each",
        )
    if len(places) > 1 and not whole:
        raise SpecError(
            ("model", "output"),
            f"not given, but the model returned {described(returned)} for {count}",
            f"Declare the one that the loss is of, for example output: {places[0]}; or a "
            "model.loss of your own, which is given all of them.",
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
            f"the model {spec.model.origin} takes {count} images at a time, but not "
            f"{len(more)} ({type(reason).__name__}: {reason})",
            "Other numbers are evaluated too: write x.shape[0] or -1 where it has a number.",
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
            f"the model returned {tuple(outputs.shape)} for {len(outputs)} images; "
            f"{spec.model.loss} with class indices expected {error}",
            "Other outputs need model.loss, and evidence.reference with labels that fit them.",
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
            f"{spec.model.loss} cannot be taken of outputs {given} and targets "
            f"{tuple(targets.shape)} ({type(error).__name__}: {error})",
        ) from error
    declared, factor = spec.model.loss.reduction, 2 if model.loss_sum else 1
    if model.batch_size > 1 and abs(twice - factor * once) > LOSS_ROUNDING * abs(twice):
        raise SpecError(
            ("model", "loss", "reduction"),
            f"{declared}, but the loss of a batch is {twice / once if once else twice:.3g} times "
            "as large when every image is there twice",
            "A loss of one's own reduces by itself; declare whether to the mean or to the sum.",
        )
