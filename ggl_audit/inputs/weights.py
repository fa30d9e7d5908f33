"""Fills a model with the weights of a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ggl_audit.errors import AuditError, InputError, nearest
from ggl_audit.inputs.fitting import COUNTER, RUNNING, fit_file, know_tensors
from ggl_audit.inputs.interpreter import recording_of
from ggl_audit.inputs.kinds import kind_of
from ggl_audit.inputs.layouts import Arrangements
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.messages import Message

NORMALIZATIONS = (_BatchNorm, _InstanceNorm)
"""Layers that use running statistics in eval mode, and those of the batch in train mode."""

LACKS_TENSOR = Message(
    "weights/lacks-tensor",
    "has no {name!r} {shape}, which the model {model} needs ({count} of {needed} are missing)",
    "{nearest}",
    advice="Give the weights of this model; where all are missing, the architecture or "
    "`model.kwargs` is another.",
)
HOLDS_OTHERS = Message(
    "weights/holds-others",
    "holds {name!r}, which the model {model} does not have",
    "{nearest}",
    advice="Correct `model.kwargs`, or save the weights of this model alone.",
)
WEIGHTS_NOT_FINITE = Message(
    "weights/not-finite",
    "{name!r} holds values that are NaN or infinite",
    advice="Take the weights of a round before the training diverged.",
)
NOT_FLOATING_POINT = Message(
    "weights/not-floating-point",
    "{name!r} is {kind}; expected floating point",
    "Save the weights after dequantization.",
)


def fill_weights(
    module: nn.Module,
    path: Path,
    model: str,
    arrangements: Arrangements | None = None,
    key: str | None = None,
) -> frozenset[str]:
    """Fills in weights by name, or by order where the file is a list (:func:`fit_file`).

    What else the file holds beside a wrapped model, such as the loss of a Lightning module, is left
    out, and so are the state of an optimizer, metrics and counts. Numbers are converted to the
    model's own type. What a normalization counts is not needed, nor the running statistics of one
    in train mode.

    Args:
        module: to be filled.
        path: the file.
        model: what the module is, for messages.
        arrangements: how the tensors lie in the file; as in PyTorch unless given.
        key: of the spec that declares the layout; None where none does.

    Returns:
        The names of what the file held of the model.

    Raises:
        InputError: the file is missing or broken, or does not fit.
    """
    state = dict(module.state_dict())
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    needed = [name for name in names if name in state and not _is_idle(name, module)]
    parameters = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    known = know_tensors(module, state, parameters, needed, arrangements=arrangements, key=key)
    found = read_tensors(path)
    try:
        fit = fit_file(found, known)
    except AuditError as error:
        raise InputError(path, error.said) from None
    missing = [name for name in needed if name not in fit.tensors]
    if missing:
        raise InputError(
            path,
            LACKS_TENSOR(
                name=missing[0],
                shape=tuple(state[missing[0]].shape),
                model=model,
                count=len(missing),
                needed=len(needed),
                nearest=nearest(missing[0], fit.unknown) if fit.unknown else "",
            ),
        )
    unknown = (file for file in fit.unknown if kind_of(file, found[file]) is None)
    beside = [file for file in unknown if file.startswith(fit.prefix)]
    if beside:
        raise InputError(
            path, HOLDS_OTHERS(name=beside[0], model=model, nearest=nearest(beside[0], state))
        )
    for name, tensor in fit.tensors.items():
        _check_values(tensor, state[name], fit.sources[name], path)
    module.load_state_dict(fit.tensors, strict=False)
    return frozenset(fit.tensors)


def _is_idle(name: str, module: nn.Module) -> bool:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    follows = recording_of(module) is not None or isinstance(owner, NORMALIZATIONS)
    return own == COUNTER or (own in RUNNING and follows and owner.training)


def _check_values(found: torch.Tensor, expected: torch.Tensor, file: str, path: Path) -> None:
    if found.is_floating_point():
        if not bool(torch.isfinite(found).all()):
            raise InputError(path, WEIGHTS_NOT_FINITE(name=file))
    elif expected.is_floating_point():
        kind = str(found.dtype).removeprefix("torch.")
        raise InputError(path, NOT_FLOATING_POINT(name=file, kind=kind))
