"""Fills a model with the weights of a file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ggl_audit.errors import InputError, nearest
from ggl_audit.inputs.interpreter import recording_of
from ggl_audit.inputs.names import unwrap_names
from ggl_audit.inputs.tensors import Tensors, is_ordered, read_tensors

COUNTER = "num_batches_tracked"
RUNNING = ("running_mean", "running_var")
NORMALIZATIONS = (_BatchNorm, _InstanceNorm)
"""Layers that use running statistics in eval mode, and those of the batch in train mode."""


def fill_weights(module: nn.Module, path: Path, model: str) -> None:
    """Fills in weights by name, or by order where the file is a list.

    Names may have lost or gained a wrapper (:func:`unwrap_names`); what else the file holds beside
    the wrapped model, such as the loss of a Lightning module, is left out. A list is in the order
    of the state dict, or of the parameters where these are all there is. Numbers are converted to
    the model's own type. What a normalization counts is not needed, nor the running statistics of
    one in train mode.

    Args:
        module: to be filled.
        path: the file.
        model: what the module is, for messages.

    Raises:
        InputError: the file is missing or broken, or does not fit.
    """
    found, expected = read_tensors(path), module.state_dict()
    needed = [name for name in expected if not _is_idle(name, module)]
    if is_ordered(found):
        names = _by_order(found, module, needed, path, model)
    else:
        names = _by_name(found, expected, needed, path, model)
    for name, file in names.items():
        _check(found[file], expected[name], file, path)
    module.load_state_dict({name: found[file] for name, file in names.items()}, strict=False)


def _is_idle(name: str, module: nn.Module) -> bool:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    follows = recording_of(module) is not None or isinstance(owner, NORMALIZATIONS)
    return own == COUNTER or (own in RUNNING and follows and owner.training)


def _by_name(
    found: Tensors, expected: Tensors, needed: Collection[str], path: Path, model: str
) -> dict[str, str]:
    try:
        fitted = unwrap_names(found, expected)
    except ValueError as error:
        raise InputError(path, str(error), "Save the weights of one model only.") from None
    names = {name: file for file, name in fitted.items()}
    missing = [name for name in needed if name not in names]
    unknown = [file for file in found if file not in fitted]
    if missing:
        raise InputError(
            path,
            f"has no {missing[0]!r} {tuple(expected[missing[0]].shape)}, which the model {model} "
            f"needs ({len(missing)} of {len(needed)} are missing)",
            nearest(missing[0], unknown) if unknown else "",
        )
    prefix = next((file.removesuffix(n) for n, file in names.items() if file.endswith(n)), "")
    beside = [file for file in unknown if file.startswith(prefix)]
    if beside:
        raise InputError(
            path,
            f"holds {beside[0]!r}, which the model {model} does not have",
            nearest(beside[0], expected),
        )
    return names


def _by_order(
    found: Tensors, module: nn.Module, needed: Collection[str], path: Path, model: str
) -> dict[str, str]:
    expected = module.state_dict()
    parameters = [name for name, _ in module.named_parameters()]
    orders = {
        "the state dict": list(expected),
        "the state dict without counts of batches": [n for n in expected if n in needed],
    }
    if set(needed) <= set(parameters):
        orders["the parameters"] = parameters
    shapes = [tensor.shape for tensor in found.values()]
    for order in orders.values():
        if [expected[name].shape for name in order] == shapes:
            return dict(zip(order, found, strict=True))
    lengths = " or ".join(f"{len(order)} ({how})" for how, order in orders.items())
    same = next((order for order in orders.values() if len(order) == len(shapes)), None)
    if same is None:
        raise InputError(
            path,
            f"is a list of {len(shapes)} tensors; the model {model} has {lengths}",
            "Save the weights with their names.",
        )
    place = next(i for i, name in enumerate(same) if expected[name].shape != shapes[i])
    raise InputError(
        path,
        f"is a list whose tensor {place} has the shape {tuple(shapes[place])}; the model {model} "
        f"has {same[place]!r} {tuple(expected[same[place]].shape)} there",
        "Is it in another order, or of a model of another size?",
    )


def _check(found: torch.Tensor, expected: torch.Tensor, file: str, path: Path) -> None:
    if found.shape != expected.shape:
        raise InputError(
            path,
            f"{file!r} has the shape {tuple(found.shape)}; the model has {tuple(expected.shape)}",
            "Are its kwargs those it was trained with?",
        )
    if found.is_floating_point():
        if not bool(torch.isfinite(found).all()):
            raise InputError(path, f"{file!r} holds values that are NaN or infinite")
    elif expected.is_floating_point():
        kind = str(found.dtype).removeprefix("torch.")
        raise InputError(
            path,
            f"{file!r} is {kind}; expected floating point",
            "Save the weights after dequantization.",
        )
