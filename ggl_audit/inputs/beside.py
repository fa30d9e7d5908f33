"""What a capture holds beside the gradient of the trained parameters, and what it is taken for.

Nothing of it is ignored. Running statistics are observed like the gradient; what is as it was tells
nothing; counts of batches are compared with the declaration; all else was sent and is not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ggl_audit.basics.gradient import Gradient
from ggl_audit.inputs.fitting import COUNTER, RUNNING
from ggl_audit.inputs.interpreter import recording_of
from ggl_audit.inputs.kinds import kind_of
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.statistics import Normalization
from ggl_audit.inputs.tensors import Tensors

Numbers = Literal["values", "changes"]
"""What a file has of a buffer: its value after training, or the value before less that after."""

COUNTS_IN_EVAL = "counts of batches of layers that are in eval mode"
STATISTICS_IN_EVAL = "running statistics of layers that are in eval mode, and changed"
STATISTICS_OF_PROGRAM = "running statistics of a saved program, which are not computed"
UNKNOWN_BEFORE = "running statistics whose values before are not in model.weights"
ELSEWHERE = "other things beside the state dict or the gradients"
BUFFERS = "buffers that were changed"
STATISTICS_EARLIER = "running statistics of the release before"

ROUNDINGS = 4
"""The roundings of a value in its own type by which another machine's may differ."""


@dataclass
class Beside:
    """What a capture holds beside the gradient.

    Attributes:
        statistics: what running statistics were changed by, before less after, by buffer name.
        counts: the same of the counts of batches.
        idle: what is as it was before, by the file's names.
        unmeasured: what else was sent, by the file's names, under what it is.
        silent: running statistics that the mode has and the file has not.
        ignored: what is left out as capture.ignored says, by the file's names.
        rounding: of the numbers of the running statistics, relative.
        numbers: what the file has of buffers.
    """

    statistics: Gradient = field(default_factory=dict)
    counts: Gradient = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    unmeasured: dict[str, list[str]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    rounding: float = 0.0
    numbers: Numbers = "values"

    def after(self, earlier: Beside) -> Beside:
        """With what was sent beside an earlier release too, none of which is measured."""
        unmeasured = {kind: [*names] for kind, names in self.unmeasured.items()}
        sent = {**earlier.unmeasured}
        if earlier.statistics:
            sent[STATISTICS_EARLIER] = [*earlier.statistics]
        for kind, names in sent.items():
            kept = unmeasured.setdefault(kind, [])
            kept += [name for name in names if name not in kept]
        return replace(self, unmeasured=unmeasured)


def look_beside(
    held: Tensors,
    sources: dict[str, str],
    unknown: Tensors,
    elsewhere: Sequence[str],
    model: ClientModel,
    numbers: Numbers | None,
    ignored: Collection[str] = (),
) -> Beside:
    """Takes apart what a file holds beside the trained parameters.

    Args:
        held: buffers of the model, by its names.
        sources: from these to the file's names.
        unknown: of no tensor of the model, by the file's names.
        elsewhere: places of what the file has beside its tensors (:func:`read_file`).
        model: the client's.
        numbers: what the file has of buffers; None where its numbers have to tell.
        ignored: names of the model and of the file that are left out.
    """
    beside = Beside()
    held = {name: tensor.to(model.device) for name, tensor in held.items()}
    of_layers = {name: layer for layer in model.normalizations for name in layer.names}
    counters = {layer.counter for layer in model.normalizations}
    if numbers is None:
        numbers = _numbers(held, model)
    beside.numbers = numbers
    for name, tensor in held.items():
        before = model.state.get(name, model.constants.get(name, torch.zeros_like(tensor)))
        layer = of_layers.get(name)
        if name.rpartition(".")[2] == COUNTER and tensor.numel() == 1:
            change = -_counted(tensor, before)
            kind = None if name in counters or not bool(change) else COUNTS_IN_EVAL
            if name in counters:
                beside.counts[name] = change
        elif _is_unchanged(tensor, before, numbers):
            kind = None
        elif layer is not None and layer.known and tensor.is_floating_point():
            change = before.float() - tensor.float() if numbers == "values" else tensor.float()
            beside.statistics[name], kind = change, None
            beside.rounding = max(beside.rounding, torch.finfo(tensor.dtype).eps)
        else:
            kind = _kind_of_buffer(name, layer, model)
        if kind is not None:
            beside.unmeasured.setdefault(kind, []).append(sources[name])
        elif name not in beside.statistics and name not in beside.counts:
            beside.idle.append(sources[name])
    said = {*held, *model.unsent, *ignored}
    beside.silent.extend(name for name in (*of_layers, *_of_program(model)) if name not in said)
    if elsewhere:
        beside.unmeasured[ELSEWHERE] = [*elsewhere]
    for file, tensor in unknown.items():
        beside.unmeasured.setdefault(_kind(file, tensor, model), []).append(file)
    return beside


def _is_same(found: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether each value is what it was, up to the rounding of the tensor's own type."""
    if not found.is_floating_point() or not before.is_floating_point():
        return bool((found == before).all())
    limit = ROUNDINGS * torch.finfo(found.dtype).eps * before.double().abs()
    return bool(((found.double() - before.double()).abs() <= limit).all())


def _is_unchanged(tensor: torch.Tensor, before: torch.Tensor, numbers: Numbers) -> bool:
    """Whether a buffer is as it was; of changes, what is no floating point is kept as it is."""
    if numbers == "values" or not tensor.is_floating_point():
        return _is_same(tensor, before) or (numbers == "changes" and not bool(tensor.any()))
    return not bool(tensor.any())


def _kind_of_buffer(name: str, layer: Normalization | None, model: ClientModel) -> str:
    """What a buffer is that was changed, and that is not computed for candidates."""
    if layer is not None and not layer.known:
        return UNKNOWN_BEFORE
    if layer is not None or name.rpartition(".")[2] not in RUNNING:
        return BUFFERS
    return STATISTICS_OF_PROGRAM if _of_program(model) else STATISTICS_IN_EVAL


def _of_program(model: ClientModel) -> list[str]:
    """The running statistics of a saved program that normalizes in train mode."""
    recording = recording_of(model.module)
    if recording is None or not recording.normalizes or "train" not in recording.modes:
        return []
    return [name for name in model.state if name.rpartition(".")[2] in RUNNING]


def _numbers(held: Tensors, model: ClientModel) -> Numbers:
    """What running variances show: after a step at least (1 - momentum) of each is left.

    So a value is never below that, and a change never above the rest.
    """
    kept = [
        (held[layer.names[1]].float(), share * layer.running[1])
        for layer in model.normalizations
        if layer.names[1] in held and (share := _least_kept(layer, model)) > 1 / 2
    ]
    if kept:
        return "values" if all(bool((after >= least).all()) for after, least in kept) else "changes"
    return "values" if model.local is None else "changes"


def _least_kept(layer: Normalization, model: ClientModel) -> float:
    local, images = model.local, model.batch_size
    steps = 1 if local is None else local.epochs * -(-images // (local.batch_size or images))
    if layer.momentum is None:
        return layer.batches / (layer.batches + steps)
    return float((1 - layer.momentum) ** steps)


def _counted(tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """How many batches a count went up by; a file has the count, or before less after."""
    found = tensor.reshape(()).float()
    return -found if bool(found < 0) else found - before.reshape(()).to(found)


def _kind(file: str, tensor: torch.Tensor, model: ClientModel) -> str:
    kind = kind_of(file, tensor)
    if kind is not None:
        return kind
    shapes = {tuple(parameter.shape) for parameter in model.parameters.values()}
    if tuple(tensor.shape) in shapes and tensor.numel() > 1:
        return "tensors in a parameter's shape, as an optimizer's state has"
    return "tensors that are not the model's"
