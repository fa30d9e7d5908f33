"""Reads a captured gradient and fits it to the model, tensor by tensor; writes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save

from ggl_audit.errors import AuditError, InputError
from ggl_audit.files import write_whole
from ggl_audit.gradient import Gradient, norm
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.names import unwrap_names
from ggl_audit.inputs.tensors import Tensors, is_ordered, read_tensors

Misfit = Callable[[str, str], AuditError]

SAME_WEIGHTS = 4
"""In roundings of the file, relative."""


MOST_ROUNDING = 0.25
"""Largest rounding of a number, relative to an update; the mean is a fifth of that."""


@dataclass(frozen=True)
class Capture:
    """A captured gradient, fitted to the model.

    Attributes:
        gradient: of the parameters that are sent, in the model's order, on its device, float32.
        sources: from the model's names to the file's.
        how: how the file's tensors were matched with the model's.
        unsent: trained parameters that the file lacks.
        unused: buffers and frozen parameters that the file holds too, as ``sources``.
        rounding: relative, of the file's numbers.
    """

    gradient: Gradient
    sources: dict[str, str]
    how: str
    unsent: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    rounding: float = torch.finfo(torch.float32).eps


def read_capture(path: Path, model: ClientModel) -> Capture:
    """Reads a gradient or an update and checks that it is one of this model.

    Args:
        path: named tensors, or an ordered list of them (:func:`read_tensors`).
        model: the model that it must fit.

    Raises:
        InputError: names, order, shapes or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """

    def misfit(problem: str, hint: str = "") -> AuditError:
        return InputError(path, problem, hint)

    return fit_capture(read_tensors(path), model, misfit)


def fit_capture(captured: Tensors, model: ClientModel, misfit: Misfit) -> Capture:
    """Finds the model's parameters among tensors, and checks that these are a gradient of them.

    Names may have lost or gained a wrapper (:func:`unwrap_names`). A list is matched by its order:
    that of the trained parameters, of all parameters, or of the state dict.

    Args:
        captured: by name, or an ordered list (:func:`is_ordered`).
        model: the model that it must fit.
        misfit: makes the error from a problem and a hint.

    Raises:
        AuditError: names, order, shapes or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """
    fitted = _fit(captured, model, misfit)
    if not any(bool(tensor.any()) for tensor in fitted.gradient.values()):
        raise misfit("every value is zero: there is nothing in it to audit", "")
    for name, parameter in model.module.named_parameters():
        file = fitted.unused.get(name)
        if name in model.constants and file is not None and bool(captured[file].any()):
            raise misfit(
                f"{file!r} is not zero, but {name!r} {tuple(parameter.shape)} is taken not to "
                "be trained or not to be sent",
                "See model.frozen, capture.unsent and what the model's code freezes.",
            )
    return fitted


def read_update(before: Path | None, after: Path, model: ClientModel) -> Capture:
    """Reads checkpoints before and after local training; the update is the first less the second.

    Args:
        before: weights; those of the model unless given.
        after: weights, by name or in order.
        model: the model that both must fit.

    Raises:
        InputError: one of them does not fit, the one before is not the model's, or they are equal.
    """
    trained = _read_weights(after, model)
    start = {name: model.parameters[name].float() for name in trained.gradient}
    rounding = trained.rounding
    if before is not None:
        given = _read_weights(before, model)
        if given.gradient.keys() != start.keys():
            odd = min(given.gradient.keys() ^ start.keys())
            raise InputError(before, f"{odd!r} is only in one of capture.before and capture.after")
        away = norm({name: given.gradient[name] - start[name] for name in start})
        if bool(away > SAME_WEIGHTS * given.rounding * norm(start)):
            raise InputError(
                before,
                "holds other weights than the model at the round of the capture",
                "capture.before and model.weights are the same checkpoint: give one of them.",
            )
        start, rounding = given.gradient, max(rounding, given.rounding)
    update = {name: start[name] - tensor for name, tensor in trained.gradient.items()}
    if not any(bool(tensor.any()) for tensor in update.values()):
        raise InputError(after, "holds the same weights as the model: nothing was trained")
    rounding *= float(norm(start) / norm(update))
    if rounding > MOST_ROUNDING:
        raise InputError(
            after,
            "holds rounded numbers, and the update is hardly larger than their rounding",
            "Save the checkpoints before and after in single precision.",
        )
    return replace(trained, gradient=update, rounding=rounding)


def _read_weights(path: Path, model: ClientModel) -> Capture:
    def misfit(problem: str, hint: str = "") -> AuditError:
        return InputError(path, problem, hint)

    captured = read_tensors(path)
    fitted = _fit(captured, model, misfit)
    for name, _ in model.module.named_parameters():
        if name not in fitted.unused:
            continue
        own, found = model.constants[name].cpu().float(), captured[fitted.unused[name]].float()
        limit = SAME_WEIGHTS * fitted.rounding * own.norm()
        if own.shape != found.shape or bool((own - found).norm() > limit):
            raise InputError(
                path,
                f"{name!r} is not what it is in the model, but is declared not to be trained or "
                "not to be sent",
                "See model.frozen, capture.unsent and what the model's code freezes.",
            )
    return fitted


def write_capture(path: Path, gradient: Gradient) -> None:
    """Writes a gradient as safetensors, whole or not at all.

    Raises:
        InputError: the path does not end in ``.safetensors``, or its folder cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(path, "a capture is written as .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gradient.items()}
    write_whole(path, save(tensors))


def _fit(captured: Tensors, model: ClientModel, misfit: Misfit) -> Capture:
    sources, how = _sources(captured, model, misfit)
    unsent = [name for name in model.parameters if name not in sources]
    rounding = torch.finfo(torch.float32).eps
    gradient: Gradient = {}
    for name, parameter in model.parameters.items():
        if name in unsent:
            continue
        tensor = captured[sources[name]]
        _check_shape(sources[name], tensor, name, parameter, model, misfit)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise misfit(
                f"{sources[name]!r} is {kind}; expected floating point",
                "Capture the gradient after dequantization.",
            )
        rounding = max(rounding, torch.finfo(tensor.dtype).eps)
        gradient[name] = tensor.to(device=model.device, dtype=torch.float32)
        bad = int((~torch.isfinite(gradient[name])).sum())
        if bad:
            raise misfit(f"{sources[name]!r} holds {bad} values that are NaN or infinite", "")
    kept = {name: sources[name] for name in gradient}
    unused = {name: file for name, file in sources.items() if name not in kept}
    return Capture(gradient, kept, how, unsent, unused, rounding)


def _sources(captured: Tensors, model: ClientModel, misfit: Misfit) -> tuple[dict[str, str], str]:
    """From the model's names, buffers and frozen ones included, to the file's; and how."""
    if is_ordered(captured):
        return _by_order(captured, model, misfit)
    known = {**model.state, **model.parameters, **model.constants}
    try:
        names = unwrap_names(captured, known)
    except ValueError as error:
        raise misfit(str(error), "Save the tensors of one model only.") from None
    unknown = [name for name in captured if name not in names]
    missing = [name for name in model.parameters if name not in names.values()]
    counts = f"({len(captured)} tensors captured, the model has {len(model.parameters)})"
    if unknown:
        name = unknown[0]
        raise misfit(
            f"holds {name!r} {tuple(captured[name].shape)}, which is no tensor of the model "
            f"{counts}",
            _same_shape_hint(tuple(captured[name].shape), model, missing),
        )
    if len(missing) == len(model.parameters):
        raise misfit(f"holds no trained parameter of the model {counts}", "")
    file, name = next(iter(names.items()))
    how = "name"
    if file != name:
        added = file.removesuffix(name) if file.endswith(name) else name.removesuffix(file)
        how = f"name without {added!r}" if file.endswith(name) else f"name with {added!r}"
    return {name: file for file, name in names.items()}, how


def _by_order(captured: Tensors, model: ClientModel, misfit: Misfit) -> tuple[dict[str, str], str]:
    known = {**model.state, **model.parameters, **model.constants}
    named = [name for name, _ in model.module.named_parameters() if name in known]
    orders = {
        "the trained parameters": [name for name in named if name in model.parameters],
        "all parameters": named,
        "the state dict": list(model.state),
    }
    shapes = [tensor.shape for tensor in captured.values()]
    for how, order in orders.items():
        if [known[name].shape for name in order] == shapes:
            return dict(zip(order, captured, strict=True)), f"order of {how}"
    lengths = ", ".join(f"{len(order)} for {how}" for how, order in orders.items())
    if len(shapes) not in map(len, orders.values()):
        raise misfit(
            f"is a list of {len(shapes)} tensors without names; expected {lengths}",
            "Save them with their names, or declare capture.unsent where some are never sent.",
        )
    how, order = next(pair for pair in orders.items() if len(pair[1]) == len(shapes))
    place = next(i for i, name in enumerate(order) if known[name].shape != shapes[i])
    raise misfit(
        f"is a list in another order than {how}: the tensor at {place} has the shape "
        f"{tuple(shapes[place])}, {order[place]!r} has {tuple(known[order[place]].shape)}",
        "Save the tensors with their names, or in the model's order.",
    )


def _check_shape(
    source: str,
    tensor: torch.Tensor,
    name: str,
    parameter: torch.Tensor,
    model: ClientModel,
    misfit: Misfit,
) -> None:
    if tensor.shape == parameter.shape:
        return
    if tensor.shape[1:] == parameter.shape:
        hint = (
            f"One gradient for each of {len(tensor)} samples (Opacus' grad_sample)? Capture what "
            "the client sends: their mean or sum."
        )
    else:
        hint = _same_shape_hint(tuple(tensor.shape), model)
    raise misfit(
        f"{source!r} has the shape {tuple(tensor.shape)}; "
        f"the model's {name!r} has {tuple(parameter.shape)}",
        hint,
    )


def _same_shape_hint(
    shape: tuple[int, ...], model: ClientModel, names: list[str] | None = None
) -> str:
    fitting = [
        name
        for name, parameter in model.parameters.items()
        if tuple(parameter.shape) == shape and (names is None or name in names)
    ]
    if fitting:
        return f"Of the model's parameters, {' or '.join(map(repr, fitting[:3]))} has that shape."
    return "No parameter of the model has that shape: is it the gradient of another model?"
