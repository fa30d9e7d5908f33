"""Reads named tensors from safetensors, PyTorch and NumPy files, and never runs what is in them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ggl_audit.errors import InputError

Tensors = dict[str, torch.Tensor]


def read_tensors(path: Path) -> Tensors:
    """Reads a file of named tensors.

    Args:
        path: ``.safetensors``, ``.pt``/``.pth`` (a dict of tensors, read with ``weights_only``)
            or ``.npz`` (read with ``allow_pickle=False``).

    Returns:
        The tensors by name, in the file's order, on the CPU, in the file's dtypes.

    Raises:
        InputError: missing, of another format, truncated, or a pickle that wants to run code.
    """
    if not path.exists():
        raise InputError(path, "no such file")
    if not path.is_file():
        raise InputError(path, "not a file")
    read = READERS.get(path.suffix)
    if read is None:
        raise InputError(
            path, f"unknown format {path.suffix!r}; expected one of {', '.join(READERS)}"
        )
    try:
        return read(path)
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            path,
            "not a plain file of tensors: the pickle in it could run code, so it was not opened",
            "Save the state dict alone, best as .safetensors.",
        ) from None
    except Exception as error:
        # A broken file can lead the library that reads it into any error.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            path,
            f"not a whole {path.suffix} file of tensors ({reason})",
            "It may be truncated (copy it again) or hold more than tensors.",
        ) from None


def _read_safetensors(path: Path) -> Tensors:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_torch(path: Path) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats, which fail or are fine
        data = torch.load(path, weights_only=True, map_location="cpu")
    if isinstance(data, dict) and set(data) == {"state_dict"}:
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(t, torch.Tensor) for t in data.values()):
        raise InputError(
            path, f"expected a dict from parameter names to tensors, found {_what_is(data)}"
        )
    for name, tensor in data.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(path, f"{str(name)!r} is not a dense tensor with values")
    return {str(name): tensor.detach() for name, tensor in data.items()}


def _read_numpy(path: Path) -> Tensors:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _what_is(data: object) -> str:
    if isinstance(data, dict):
        odd = next(k for k, v in data.items() if not isinstance(v, torch.Tensor))
        return f"a dict whose {str(odd)!r} is a {type(data[odd]).__name__}"
    if isinstance(data, (list, tuple)):
        return f"a {type(data).__name__} of {len(data)}, which does not say what belongs where"
    return f"a {type(data).__name__}"


READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_numpy,
}
