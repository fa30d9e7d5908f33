"""Reads a captured gradient and fits it to the model, tensor by tensor; writes one."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save

from ggl_audit.basics.files import write_whole
from ggl_audit.basics.gradient import Gradient, each, norm
from ggl_audit.errors import AuditError, InputError
from ggl_audit.inputs.beside import Beside, Numbers, look_beside
from ggl_audit.inputs.fitting import Fit, fit_file, know_tensors, same_shape_hint
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.tensors import Tensors, read_file
from ggl_audit.inputs.weights import WEIGHTS_NOT_FINITE
from ggl_audit.messages import Message, Said

Misfit = Callable[[Said], AuditError]

SAME_WEIGHTS = 4
"""In roundings of the file, relative."""


MOST_ROUNDING = 0.25
"""Largest rounding of a number, relative to an update; the mean is a fifth of that."""

ALL_ZERO = Message(
    "capture/all-zero",
    "every value is zero: there is nothing in it to audit",
    advice="Capture after `loss.backward()` and before `optimizer.zero_grad()`.",
)
ZERO_BY_DECLARATION = Message(
    "capture/zero-by-declaration",
    "{file!r} is not zero, but {name!r} {shape} is taken not to be trained or not to be sent",
    "See model.frozen, capture.unsent and what the model's code freezes.",
    advice="Take the parameter out of `model.frozen` or `capture.unsent`, or set its "
    "`requires_grad`: the capture shows that it is sent. If another capture of the round lacks "
    "it, audit them apart.",
)
ONLY_IN_ONE_CHECKPOINT = Message(
    "capture/only-in-one-checkpoint",
    "{name!r} is only in one of capture.before and capture.after",
    advice="Give both files in the same form, from the same client.",
)
OTHER_WEIGHTS = Message(
    "capture/other-weights",
    "holds other weights than the model at the round of the capture",
    "capture.before and model.weights are the same checkpoint: give one of them.",
    advice="Leave out `capture.before`, or make it and `model.weights` the same checkpoint: the "
    "one that the client began with.",
)
NOTHING_TRAINED = Message(
    "capture/nothing-trained",
    "holds the same weights as the model: nothing was trained",
    advice="Give the checkpoint after local training; `state_dict()` shares memory with the "
    "model, so copy it before training.",
)
ROUNDED_AWAY = Message(
    "capture/rounded-away",
    "holds rounded numbers, and the update is hardly larger than their rounding",
    "Save the checkpoints before and after in single precision.",
    advice="Save both checkpoints in single precision: what is left of a small update in half "
    "precision is mostly rounding.",
)
OTHER_VALUES = Message(
    "capture/other-values",
    "holds {name!r} with other values than the model at the round of the capture",
    "Give model.weights with the running statistics that the client received.",
)
FIXED_BY_DECLARATION = Message(
    "capture/fixed-by-declaration",
    "{name!r} is not what it is in the model, but is declared not to be trained or not to be sent",
    "See model.frozen, capture.unsent and what the model's code freezes.",
    advice="Take the parameter out of `model.frozen` or `capture.unsent`, or set its "
    "`requires_grad`: the checkpoint shows that it was trained.",
)
NOT_SAFETENSORS = Message(
    "capturing/not-safetensors",
    "a capture is written as .safetensors",
    advice="Let the name end so.",
)
NOT_FLOATING_POINT = Message(
    "capture/not-floating-point",
    "{name!r} is {kind}; expected floating point",
    "Capture the gradient after dequantization.",
)
NOT_FINITE = Message(
    "capture/not-finite",
    "{name!r} holds {count} values that are NaN or infinite",
    advice="Capture a step that the client really sends; with mixed precision unscale first, and "
    "leave out steps that `GradScaler` skips.",
)
SENT_BY_CAPTURE = Message(
    "capture/sent-by-capture",
    "holds {name!r}, which was changed, and capture.unsent says that it is never sent",
    "capture.unsent is for what the client keeps; what is sent is measured.",
    advice="Take it out of `capture.unsent`: what is sent is measured.",
)
IGNORES_A_PARAMETER = Message(
    "capture/ignores-a-parameter",
    "holds {name!r}, a trained parameter, which capture.ignored ({pattern!r}) is not for",
    "What is not trained is model.frozen, what is never sent capture.unsent.",
)
IGNORES_NOTHING = Message(
    "capture/ignores-nothing",
    "holds nothing that capture.ignored ({pattern!r}) stands for",
    "Leave it out where nothing of the kind is sent.",
    advice="Correct the name or pattern, or leave it out where nothing of the kind is sent.",
)
NO_TENSOR_OF_THE_MODEL = Message(
    "capture/no-tensor-of-the-model",
    "holds {name!r} {shape}, which is no tensor of the model {counts}",
    "{nearest}",
    advice="Rename the tensor as in `model.named_parameters()`, or correct the model; the message "
    "says which parameters have that shape.",
)
NO_PARAMETER = Message(
    "capture/no-parameter",
    "holds no trained parameter of the model {counts}",
    advice="Give the capture of this model; check that `model.frozen` and `capture.unsent` do not "
    "name all of it.",
)


@dataclass(frozen=True)
class FittedGradient:
    """A captured gradient, fitted to the model.

    Attributes:
        gradient: of the parameters that are sent, in the model's order, on its device, float32.
        sources: from the model's names to the file's.
        how: how the file's tensors were matched with the model's.
        unsent: trained parameters that the file lacks.
        unused: frozen parameters that the file holds too, as ``sources``.
        rounding: relative, of the file's numbers.
        tensors: all that the file holds of the model, by the model's names, as it has them.
        beside: what else the file holds.
    """

    gradient: Gradient
    sources: dict[str, str]
    how: str
    unsent: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    rounding: float = torch.finfo(torch.float32).eps
    tensors: Tensors = field(default_factory=dict)
    beside: Beside = field(default_factory=Beside)


def read_capture(
    path: Path, model: ClientModel, ignored: Sequence[str] = (), *, negated: bool = False
) -> FittedGradient:
    """Reads a gradient or an update and checks that it is one of this model.

    Args:
        path: named tensors, or an ordered list of them (:func:`read_tensors`).
        model: the model that it must fit.
        ignored: names or patterns of what is left out, beside the trained parameters.
        negated: whether the file holds the values with the other sign.

    Raises:
        InputError: names, order, shapes or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """

    def misfit(said: Said) -> AuditError:
        return InputError(path, said)

    captured, elsewhere = read_file(path)
    fitted = fit_capture(captured, model, misfit, ignored, elsewhere)
    if not negated:
        return fitted
    beside = fitted.beside
    if beside.numbers == "changes":  # values have no sign to be turned
        beside = replace(beside, statistics=each(torch.neg, beside.statistics))
    return replace(fitted, gradient=each(torch.neg, fitted.gradient), beside=beside)


def fit_capture(
    captured: Tensors,
    model: ClientModel,
    misfit: Misfit,
    ignored: Sequence[str] = (),
    elsewhere: Sequence[str] = (),
) -> FittedGradient:
    """Finds the model's parameters among tensors, and checks that these are a gradient of them.

    Names may have lost or gained a wrapper, and a list may have several orders (:func:`fit_file`).

    Args:
        captured: by name, or an ordered list (:func:`is_ordered`).
        model: the model that it must fit.
        misfit: makes the error from what is wrong.
        ignored: names or patterns of what is left out, beside the trained parameters.
        elsewhere: places of what the file has beside its tensors.

    Raises:
        AuditError: names, order, shapes or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """
    fitted = _fit(captured, model, misfit, ignored, elsewhere)
    if not any(bool(tensor.any()) for tensor in fitted.gradient.values()):
        raise misfit(ALL_ZERO())
    for name, parameter in model.module.named_parameters():
        file = fitted.unused.get(name)
        if name in model.constants and file is not None and bool(fitted.tensors[name].any()):
            raise misfit(ZERO_BY_DECLARATION(file=file, name=name, shape=tuple(parameter.shape)))
    return fitted


def read_update(
    before: Path | None, after: Path, model: ClientModel, ignored: Sequence[str] = ()
) -> FittedGradient:
    """Reads checkpoints before and after local training; the update is the first less the second.

    Args:
        before: weights; those of the model unless given.
        after: weights, by name or in order.
        model: the model that both must fit.
        ignored: names or patterns of what is left out, beside the trained parameters.

    Raises:
        InputError: one of them does not fit, the one before is not the model's, or they are equal.
    """
    trained = _read_weights(after, model, ignored)
    start = {name: model.parameters[name].float() for name in trained.gradient}
    rounding = trained.rounding
    if before is not None:
        given = _read_weights(before, model)
        _check_statistics(given, before)
        if given.gradient.keys() != start.keys():
            odd = min(given.gradient.keys() ^ start.keys())
            raise InputError(before, ONLY_IN_ONE_CHECKPOINT(name=odd))
        away = norm({name: given.gradient[name] - start[name] for name in start})
        if bool(away > SAME_WEIGHTS * given.rounding * norm(start)):
            raise InputError(before, OTHER_WEIGHTS())
        start, rounding = given.gradient, max(rounding, given.rounding)
    update = {name: start[name] - tensor for name, tensor in trained.gradient.items()}
    if not any(bool(tensor.any()) for tensor in update.values()):
        raise InputError(after, NOTHING_TRAINED())
    rounding *= float(norm(start) / norm(update))
    if rounding > MOST_ROUNDING:
        raise InputError(after, ROUNDED_AWAY())
    return replace(trained, gradient=update, rounding=rounding)


def _check_statistics(given: FittedGradient, before: Path) -> None:
    """Compares what running statistics were before training with the model's."""
    for name, change in given.beside.statistics.items():
        limit = SAME_WEIGHTS * given.rounding * given.tensors[name].float().norm()
        if bool(change.norm().cpu() > limit):
            raise InputError(before, OTHER_VALUES(name=name))


def _read_weights(path: Path, model: ClientModel, ignored: Sequence[str] = ()) -> FittedGradient:
    def misfit(said: Said) -> AuditError:
        return InputError(path, said)

    captured, elsewhere = read_file(path)
    fitted = _fit(captured, model, misfit, ignored, elsewhere, "values")
    for name, _ in model.module.named_parameters():
        if name not in fitted.unused:
            continue
        own, found = model.constants[name].cpu().double(), fitted.tensors[name]
        limit = SAME_WEIGHTS * _rounding(found) * own.abs()
        if bool(((own - found.double()).abs() > limit).any()):
            raise InputError(path, FIXED_BY_DECLARATION(name=name))
    return fitted


def write_capture(path: Path, gradient: Gradient) -> None:
    """Writes a gradient as safetensors, whole or not at all.

    Raises:
        InputError: the path does not end in ``.safetensors``, or its folder cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(path, NOT_SAFETENSORS())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gradient.items()}
    write_whole(path, save(tensors))


def _fit(
    captured: Tensors,
    model: ClientModel,
    misfit: Misfit,
    ignored: Sequence[str] = (),
    elsewhere: Sequence[str] = (),
    numbers: Numbers | None = None,
) -> FittedGradient:
    fit = _fit_file(captured, model, misfit)
    left_out = _ignored(fit, elsewhere, model, misfit, ignored)
    unsent = [name for name in model.parameters if name not in fit.tensors]
    rounding = torch.finfo(torch.float32).eps
    gradient: Gradient = {}
    for name in model.parameters:
        if name in unsent:
            continue
        tensor, source = fit.tensors[name], fit.sources[name]
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise misfit(NOT_FLOATING_POINT(name=source, kind=kind))
        rounding = max(rounding, torch.finfo(tensor.dtype).eps)
        gradient[name] = tensor.to(device=model.device, dtype=torch.float32)
        bad = int((~torch.isfinite(gradient[name])).sum())
        if bad:
            raise misfit(NOT_FINITE(name=source, count=bad))
    kept = {name: fit.sources[name] for name in gradient}
    fixed = dict(model.module.named_parameters())
    more = {n: f for n, f in fit.sources.items() if n not in kept and f not in left_out}
    unused = {name: file for name, file in more.items() if name in fixed}
    held = {name: fit.tensors[name] for name in more if name not in fixed}
    for name, tensor in held.items():
        if not bool(torch.isfinite(tensor).all()):
            raise misfit(WEIGHTS_NOT_FINITE(name=fit.sources[name]))
    unknown = {name: captured[name] for name in fit.unknown if name not in left_out}
    ignored_too = [name for name, file in fit.sources.items() if file in left_out]
    rest = [place for place in elsewhere if place not in left_out]
    beside = look_beside(held, fit.sources, unknown, rest, model, numbers, ignored_too)
    beside.ignored = left_out
    sent = [name for name in (*beside.statistics, *ignored_too) if name in model.unsent]
    if sent:
        raise misfit(SENT_BY_CAPTURE(name=fit.sources[sent[0]]))
    return FittedGradient(gradient, kept, fit.how, unsent, unused, rounding, fit.tensors, beside)


def _rounding(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def _ignored(
    fit: Fit,
    elsewhere: Sequence[str],
    model: ClientModel,
    misfit: Misfit,
    patterns: Sequence[str],
) -> list[str]:
    """The names of the file that capture.ignored leaves out.

    Raises:
        AuditError: it stands for nothing in the file, or for a trained parameter.
    """
    names = {file: name for name, file in fit.sources.items()}
    ignored: list[str] = []
    for pattern in patterns:
        own = {file for file, name in names.items() if fnmatch.fnmatch(name, pattern)}
        own |= set(fnmatch.filter([*names, *fit.unknown, *elsewhere], pattern))
        trained = [file for file in own if names.get(file) in model.parameters]
        if trained:
            raise misfit(IGNORES_A_PARAMETER(name=min(trained), pattern=pattern))
        if not own:
            raise misfit(IGNORES_NOTHING(pattern=pattern))
        ignored += sorted(own)
    return ignored


def _fit_file(captured: Tensors, model: ClientModel, misfit: Misfit) -> Fit:
    """Finds the model's tensors, buffers and frozen parameters included."""
    known = know_tensors(
        model.module,
        model.state,
        model.parameters,
        model.parameters,
        model.unsent,
        model.arrangements,
        "capture.layout",
        may_lack=True,
    )
    try:
        fit = fit_file(captured, known)
    except AuditError as error:
        raise misfit(error.said) from None
    missing = [name for name in model.parameters if name not in fit.sources]
    counts = f"({len(captured)} tensors captured, the model has {len(model.parameters)})"
    shapes = {known.shape(name) for name in missing}
    for name in fit.unknown:
        shape = tuple(captured[name].shape)
        # What has another name, or is of another model, is lacking under its own.
        if shape in shapes or len(missing) == len(model.parameters):
            raise misfit(
                NO_TENSOR_OF_THE_MODEL(
                    name=name,
                    shape=shape,
                    counts=counts,
                    nearest=same_shape_hint(shape, known, missing),
                )
            )
    if len(missing) == len(model.parameters):
        raise misfit(NO_PARAMETER(counts=counts))
    return fit
