"""Records what a client sends, from inside its own training code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ggl_audit.errors import AuditError
from ggl_audit.messages import Message

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array: TypeAlias = torch.Tensor | NDArray[Any]
    Arrays: TypeAlias = Mapping[str, Array | None] | Iterable[Array | None]

DENSE_TENSORS = "Give dense floating-point tensors or NumPy arrays, as they are sent."
NOT_FLOATING_POINT = Message(
    "recording/not-floating-point",
    "{name!r} is {kind}; a gradient is floating point",
    advice=DENSE_TENSORS,
)
ALL_ZERO = Message(
    "recording/all-zero",
    "every value of the gradient is zero: there is nothing to capture",
    "Capture after loss.backward() and before optimizer.zero_grad().",
    advice="Capture before `optimizer.zero_grad()`.",
)
SAME_FORM = "Give both in the same form, of the same model: two state dicts, or two lists."
ONLY_ON_ONE_SIDE = Message(
    "recording/only-on-one-side",
    "{name!r} is only in the weights {side} training ({before} tensors before, {after} after)",
    "Give those {other} training in the same form: two state dicts, or two lists.",
    advice=SAME_FORM,
)
OTHER_SHAPES = Message(
    "recording/other-shapes",
    "{name!r} has the shape {shapes}",
    "Are both of the same model?",
    advice=SAME_FORM,
)
UNCHANGED = Message(
    "recording/unchanged",
    "the weights are the same before and after training",
    "Copy them before training: state_dict() and numpy() share the model's memory.",
    advice="Copy the weights before training, `{n: t.clone() for n, t in "
    "model.state_dict().items()}`: they share the model's memory.",
)
NOT_A_MODULE = Message(
    "recording/not-a-module",
    "got a {kind}; expected a module, arrays by name, or a list of arrays",
    advice="Give the model, a dict, or a list, not one tensor or a path.",
)
NOTHING_TO_CAPTURE = Message(
    "recording/nothing-to-capture",
    "there is no tensor to capture",
    advice="Give at least one parameter; a module whose parameters are all frozen has none.",
)
NO_GRADIENT = Message(
    "recording/no-gradient",
    "{name!r} has no gradient",
    "Capture after loss.backward() and before optimizer.zero_grad(). Set requires_grad to False "
    "for what is not trained.",
    advice="Capture between `loss.backward()` and `optimizer.zero_grad()`, and set "
    "`requires_grad` to False for what is not trained.",
)
NO_NUMBERS = Message(
    "recording/no-numbers",
    "{name!r} is no array of numbers that PyTorch has ({error})",
    advice=DENSE_TENSORS,
)
NOT_DENSE = Message(
    "recording/not-dense",
    "{name!r} is sparse, quantized or without values",
    "Make it dense first.",
    advice=DENSE_TENSORS,
)
NOT_REAL = Message(
    "recording/not-real",
    "{name!r} is {kind}; expected real numbers",
    advice=DENSE_TENSORS,
)
NOT_FINITE = Message(
    "recording/not-finite",
    "{name!r} holds {count} values that are NaN or infinite",
    "With mixed precision, skip the steps that GradScaler skips.",
    advice="Leave out the steps that `GradScaler` skips, and unscale before the capture.",
)


def capture(gradient: torch.nn.Module | Arrays, path: str | os.PathLike[str]) -> Path:
    """Writes a gradient as a file that an audit can read (``capture.gradient``).

    Call it after ``loss.backward()``, or after whatever else the client does to the gradient, and
    before ``optimizer.zero_grad()``.

    Args:
        gradient: a module, for the ``.grad`` of each parameter that is trained
            (``requires_grad``); tensors or NumPy arrays by parameter name; or a list of them in the
            order of the parameters, as ``torch.autograd.grad`` returns it.
        path: of the file, which ends in ``.safetensors``; one that is there is replaced.

    Returns:
        The path. The file holds the tensors in their own dtypes, those of a list as "0", "1", ....

    Raises:
        AuditError: a parameter has no gradient, a tensor is not dense floating point or holds NaN
            or infinite values, every value is zero, or the file cannot be written.
    """
    import torch

    if isinstance(gradient, torch.nn.Module):
        parameters = gradient.named_parameters()
        gradient = {name: p.grad for name, p in parameters if p.requires_grad}
    tensors = _tensors(gradient)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AuditError(NOT_FLOATING_POINT(name=name, kind=_kind(tensor)))
    if not any(bool(tensor.any()) for tensor in tensors.values()):
        raise AuditError(ALL_ZERO())
    return _write(tensors, path)


def capture_update(
    before: torch.nn.Module | Arrays,
    after: torch.nn.Module | Arrays,
    path: str | os.PathLike[str],
) -> Path:
    """Writes the update of local training, for ``capture.gradient`` with ``kind: update``.

    Args:
        before: the weights at the start of the round: a state dict, a module, or a list of tensors
            or NumPy arrays, as Flower has a model's parameters.
        after: the weights after local training, in the same form.
        path: of the file, which ends in ``.safetensors``; one that is there is replaced.

    Returns:
        The path. The file holds before minus after, those of a list as "0", "1", .... What is not
        floating point, as a counter of batches, is kept as it is after training.

    Raises:
        AuditError: the two differ in names, number or shapes, or not at all, a tensor is sparse or
            holds NaN or infinite values, or the file cannot be written.
    """
    old, new = (_tensors(_weights(weights)) for weights in (before, after))
    odd = [name for name in {**old, **new} if name not in old or name not in new]
    if odd:
        there, lacking = ("before", "after") if odd[0] in old else ("after", "before")
        raise AuditError(
            ONLY_ON_ONE_SIDE(
                name=odd[0], side=there, before=len(old), after=len(new), other=lacking
            )
        )
    for name, tensor in new.items():
        if tensor.shape != old[name].shape:
            shapes = f"{tuple(old[name].shape)} before training and {tuple(tensor.shape)} after"
            raise AuditError(OTHER_SHAPES(name=name, shapes=shapes))
    update = {
        name: old[name] - tensor if tensor.is_floating_point() else tensor
        for name, tensor in new.items()
    }
    if not any(bool(t.any()) for t in update.values() if t.is_floating_point()):
        raise AuditError(UNCHANGED())
    return _write(update, path)


def _weights(weights: torch.nn.Module | Arrays) -> Arrays:
    import torch

    return weights.state_dict() if isinstance(weights, torch.nn.Module) else weights


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Copies them to the CPU, those of a list under the names "0", "1", ....

    Raises:
        AuditError: one is missing, no array of dense real numbers, or not finite.
    """
    import numpy as np
    import torch

    single = isinstance(arrays, str | torch.Tensor | np.ndarray)
    if single or not isinstance(arrays, Iterable):
        kind = type(arrays).__name__
        raise AuditError(NOT_A_MODULE(kind=kind))
    if not isinstance(arrays, Mapping):
        arrays = {str(place): array for place, array in enumerate(arrays)}
    if not arrays:
        raise AuditError(NOTHING_TO_CAPTURE())
    return {name: _tensor(name, array) for name, array in arrays.items()}


def _tensor(name: str, array: Array | None) -> torch.Tensor:
    import numpy as np
    import torch

    if array is None:
        raise AuditError(NO_GRADIENT(name=name))
    try:
        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
    except (TypeError, ValueError) as error:
        raise AuditError(NO_NUMBERS(name=name, error=error)) from None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise AuditError(NOT_DENSE(name=name))
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if tensor.is_complex():
        raise AuditError(NOT_REAL(name=name, kind=_kind(tensor)))
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise AuditError(NOT_FINITE(name=name, count=bad))
    return tensor


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> Path:
    from ggl_audit.inputs.capture import write_capture

    write_capture(Path(path), tensors)
    return Path(path)
