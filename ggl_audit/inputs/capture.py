"""Reads a captured gradient and fits it to the model, name by name; writes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from ggl_audit.errors import AuditError, InputError
from ggl_audit.files import write_whole
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.tensors import Tensors, read_tensors


def read_capture(path: Path, model: ClientModel) -> Gradient:
    """Reads a capture and checks that it is a gradient of this model.

    Args:
        path: ``.safetensors``, ``.pt`` (weights only) or ``.npz`` with the parameters' names.
        model: the model that it must fit.

    Returns:
        The gradient in the model's order, on the model's device, float32.

    Raises:
        InputError: names, shapes, count or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """

    def misfit(problem: str, hint: str = "") -> AuditError:
        return InputError(path, problem, hint)

    return fit_gradient(read_tensors(path), model, misfit)


def fit_gradient(
    captured: Tensors, model: ClientModel, misfit: Callable[[str, str], AuditError]
) -> Gradient:
    """Checks that named tensors are a gradient of the model, and puts them in its order.

    Args:
        captured: by parameter name.
        model: the model that it must fit.
        misfit: makes the error from a problem and a hint.

    Returns:
        The gradient in the model's order, on the model's device, float32.

    Raises:
        AuditError: names, shapes, count or dtypes do not fit, a value is NaN or infinite, or every
            value is zero.
    """
    _check_names(captured, model, misfit)
    gradient: Gradient = {}
    for name, parameter in model.parameters.items():
        tensor = captured[name]
        if tensor.shape != parameter.shape:
            raise misfit(
                f"{name!r} has the shape {tuple(tensor.shape)}; "
                f"the model's is {tuple(parameter.shape)}",
                _same_shape_hint(tuple(tensor.shape), model),
            )
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise misfit(
                f"{name!r} is {kind}; expected floating point",
                "Capture the gradient after dequantization.",
            )
        gradient[name] = tensor.to(device=model.device, dtype=torch.float32)
        bad = int((~torch.isfinite(gradient[name])).sum())
        if bad:
            raise misfit(f"{name!r} holds {bad} values that are NaN or infinite", "")
    if not any(bool(tensor.any()) for tensor in gradient.values()):
        raise misfit("every value is zero: there is nothing in it to audit", "")
    return gradient


def write_capture(path: Path, gradient: Gradient) -> None:
    """Writes a gradient as safetensors, whole or not at all.

    Raises:
        InputError: the path does not end in ``.safetensors``, or its folder cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(path, "a capture is written as .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gradient.items()}
    write_whole(path, save(tensors))


def _check_names(
    captured: Tensors, model: ClientModel, misfit: Callable[[str, str], AuditError]
) -> None:
    missing = [name for name in model.parameters if name not in captured]
    unknown = [name for name in captured if name not in model.parameters]
    if unknown:
        name = unknown[0]
        raise misfit(
            f"holds {name!r} {tuple(captured[name].shape)}, which is no trained parameter of the "
            f"model ({len(captured)} tensors captured, the model has {len(model.parameters)})",
            _same_shape_hint(tuple(captured[name].shape), model, missing),
        )
    if missing:
        name = missing[0]
        raise misfit(
            f"has no {name!r} {tuple(model.parameters[name].shape)} "
            f"({len(captured)} tensors captured, the model has {len(model.parameters)})",
            "Capture the gradient of every trained parameter.",
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
