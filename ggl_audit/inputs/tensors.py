"""Reads named tensors from safetensors, PyTorch and NumPy files, and never runs what is in them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ggl_audit.errors import InputError

Tensors = dict[str, torch.Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")


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
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    if path.suffix == ".npz":
        return _read_numpy(path)
    raise InputError(path, f"unknown format {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            path, f"not a whole safetensors file ({error})", "It may be truncated: copy it again."
        ) from None


def _read_torch(path: Path) -> Tensors:
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise InputError(
            path,
            "the pickle in it holds more than tensors and could run code, so it was not opened",
            "Save the state dict alone, best as .safetensors.",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no content"
        raise InputError(
            path, f"not a whole PyTorch file ({first_line})", "It may be truncated: copy it again."
        ) from None
    if isinstance(data, dict) and set(data) == {"state_dict"}:
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(t, torch.Tensor) for t in data.values()):
        raise InputError(
            path, f"expected a dict from parameter names to tensors, found {_what_is(data)}"
        )
    return {str(name): tensor.detach() for name, tensor in data.items()}


def _read_numpy(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            path,
            f"not an .npz of plain numeric arrays ({error})",
            "Save named arrays with numpy.savez, without objects.",
        ) from None


def _what_is(data: object) -> str:
    if isinstance(data, dict):
        odd = next(k for k, v in data.items() if not isinstance(v, torch.Tensor))
        return f"a dict whose {str(odd)!r} is a {type(data[odd]).__name__}"
    if isinstance(data, (list, tuple)):
        return f"a {type(data).__name__} of {len(data)}, which does not say what belongs where"
    return f"a {type(data).__name__}"
