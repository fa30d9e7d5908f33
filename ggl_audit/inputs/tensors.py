"""Reads tensors from safetensors, PyTorch and NumPy files, and never runs what is in them."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from ggl_audit.basics.files import CANNOT_BE_READ, no_file
from ggl_audit.errors import AuditError, InputError, ReasonError
from ggl_audit.inputs.archives import open_archive
from ggl_audit.inputs.torch_files import LONGEST_TEXT, read_torch
from ggl_audit.messages import Message

Tensors = dict[str, torch.Tensor]

MOST_BYTES = 4 * 2**30
"""The size of all tensors of a file together; torchvision's largest model has 2.6 GB."""

LONGEST_REASON = 200
NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
)

UNKNOWN_FORMAT = Message(
    "tensors/unknown-format",
    "unknown format {suffix!r}; expected one of {known}",
    advice="Save it as `.safetensors`, or rename it if only the ending is wrong.",
)
TOO_LARGE = Message(
    "tensors/too-large",
    "has {size:,} bytes; at most {limit:,} are read",
    advice="Save only the tensors of one model, without optimizer states.",
)
NO_TENSORS = Message(
    "tensors/no-tensors",
    "holds no tensors",
    advice="Save tensors by name or in order; this file has none.",
)
MEMORY = Message(
    "tensors/memory",
    "needs more memory than there is",
    advice="Use a machine with more memory, or save the tensors in half precision.",
)
NOT_WHOLE = Message(
    "tensors/not-whole",
    "not a whole {suffix} file of tensors ({reason})",
    "It may be truncated (copy it again) or hold more than tensors.",
    advice="Copy the file again or save it anew; the reason says what does not fit.",
)
NOT_REAL = Message(
    "tensors/not-real",
    "{name!r} is {kind}; expected real numbers of 8 to 64 bits",
    advice="Save floating point; complex numbers and other types are no gradients or weights.",
)
UNKNOWN_MEMBER = Message(
    "tensors/unknown-member",
    "holds {name!r}, which np.savez does not write",
    advice="Write the `.npz` with NumPy, and put nothing else into it.",
)
FIELDS = Message(
    "whole/fields",
    "{name!r} has fields or an unusual version",
    advice="Write the arrays anew with `np.savez`, as plain arrays of numbers.",
)
NO_NUMBERS = Message(
    "tensors/no-numbers",
    "{name!r} is an array of {dtype}, not of numbers",
    "Of several arrays, save each: np.savez(path, *arrays).",
    advice="Save each array by itself: `np.savez(path, *arrays)`, not an array of objects.",
)
OTHER_LENGTH = Message(
    "whole/other-length",
    "the header of {name!r} says {declared} bytes, and there are {there}",
    advice="Write the arrays anew with `np.savez`, as plain arrays of numbers.",
)


def read_tensors(
    path: Path, *, most_bytes: int = MOST_BYTES, may_be_empty: bool = False
) -> Tensors:
    """Reads the tensors of a file, as :func:`read_file`."""
    return read_file(path, most_bytes=most_bytes, may_be_empty=may_be_empty)[0]


def read_file(
    path: Path, *, most_bytes: int = MOST_BYTES, may_be_empty: bool = False
) -> tuple[Tensors, list[str]]:
    """Reads a file of tensors, by name or in order.

    Args:
        path: ``.safetensors``; ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.bin`` (``torch.save`` of
            tensors, NumPy arrays, dicts and lists of them, and checkpoints around these);
            ``.npz``; or ``.npy``, one array.
        most_bytes: that all tensors may have together.
        may_be_empty: whether a file without tensors is one as well.

    Returns:
        The tensors by name, on the CPU, in the file's dtypes. Those of a list are named "0", "1",
        ..., in this order: see :func:`is_ordered`. And the places of what else is in the file, as
        in a checkpoint around a state dict: other tensors, and lists of many numbers.

    Raises:
        InputError: missing, of another format, truncated, a pickle that wants to run code, or
            tensors that are complex, sparse, quantized or without values.
    """
    suffix = path.suffix.lower()
    with _one_message(path):
        if suffix not in READERS:
            raise AuditError(UNKNOWN_FORMAT(suffix=suffix, known=", ".join(READERS)))
        size = path.stat().st_size
        if size > most_bytes:
            raise AuditError(TOO_LARGE(size=size, limit=most_bytes))
        tensors, beside = READERS[suffix](path, most_bytes)
        if not tensors and not may_be_empty:
            raise AuditError(NO_TENSORS())
        _check_numbers(tensors)
    return _in_order(tensors), beside


def read_npz(path: Path, only: Collection[str], *, most_bytes: int = MOST_BYTES) -> Tensors:
    """Reads some arrays of an ``.npz``, and nothing of the others.

    Args:
        path: the file.
        only: the names of the arrays.
        most_bytes: that they may have together.

    Returns:
        Those that are there, by name.

    Raises:
        InputError: as :func:`read_tensors`.
    """
    with _one_message(path):
        tensors = _read_arrays(path, most_bytes, only)
        _check_numbers(tensors)
    return tensors


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an ``.npz``.

    Raises:
        InputError: it is missing or broken.
    """
    with _one_message(path), open_archive(path, NPZ_METHODS, 0, lambda _: False) as archive:
        arrays = (name for name in archive.names if name.endswith(".npy"))
        return [name.removesuffix(".npy") for name in arrays]


def is_ordered(tensors: Tensors) -> bool:
    """Whether the tensors come from a list: their names are "0", "1", and so on."""
    return list(tensors) == [str(place) for place in range(len(tensors))]


def _in_order(tensors: Tensors) -> Tensors:
    """Sorts a list, which some formats keep in the order of "0", "1", "10", "2"."""
    places = [str(place) for place in range(len(tensors))]
    return {place: tensors[place] for place in places} if set(places) == set(tensors) else tensors


@contextmanager
def _one_message(path: Path) -> Iterator[None]:
    """Turns whatever a file leads its reader into, into one error that names the file."""
    try:
        if not path.is_file():
            raise no_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which fail or are fine
            yield
    except AuditError as error:
        raise InputError(path, error.said) from None
    except OSError as error:
        raise InputError(path, CANNOT_BE_READ(reason=error.strerror or error)) from None
    except MemoryError:
        raise InputError(path, MEMORY()) from None
    except Exception as error:
        told = "" if isinstance(error, (LookupError, TypeError, AttributeError)) else str(error)
        reason = (told.strip() or "its parts do not go together").splitlines()[0][:LONGEST_REASON]
        raise InputError(path, NOT_WHOLE(suffix=path.suffix, reason=reason)) from None


def _check_numbers(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise AuditError(NOT_REAL(name=name, kind=kind))


def _read_safetensors(path: Path, _: int) -> tuple[Tensors, list[str]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = {**(file.metadata() or {})}
    notes.pop("format", None)  # of what library it was saved by
    texts = [text for note in notes.items() for text in note]
    return tensors, ["__metadata__"] if sum(map(len, texts)) > LONGEST_TEXT else []


def _read_npz(path: Path, most_bytes: int) -> tuple[Tensors, list[str]]:
    tensors = _read_arrays(path, most_bytes)
    if set(tensors) == {f"arr_{place}" for place in range(len(tensors))}:
        tensors = {name.removeprefix("arr_"): tensor for name, tensor in tensors.items()}
    return tensors, []


def _read_arrays(path: Path, most_bytes: int, only: Collection[str] | None = None) -> Tensors:
    wanted = None if only is None else {f"{name}.npy" for name in only}
    tensors: Tensors = {}
    with open_archive(
        path, NPZ_METHODS, most_bytes, lambda member: wanted is None or member in wanted
    ) as archive:
        for member, described in archive.members.items():
            if not member.endswith(".npy"):
                raise AuditError(UNKNOWN_MEMBER(name=member))
            with archive.open(member) as stream:
                name = member.removesuffix(".npy")
                tensors[name] = _read_array(stream, described.file_size, name)
    return tensors


def _read_npy(path: Path, _: int) -> tuple[Tensors, list[str]]:
    with path.open("rb") as stream:
        return {"0": _read_array(stream, path.stat().st_size, "0")}, []


def _read_array(stream: io.BufferedIOBase, size: int, name: str) -> torch.Tensor:
    """Reads what ``np.save`` wrote, once its header agrees with the number of bytes."""
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ReasonError(FIELDS(name=name))
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biufc":
        said = NO_NUMBERS(name=name, dtype=dtype.str)
        raise AuditError(said if dtype.hasobject else said.advising(""))
    declared = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or declared != size - stream.tell():
        there = size - stream.tell()
        raise ReasonError(OTHER_LENGTH(name=name, declared=declared, there=there))
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


READERS: dict[str, Callable[[Path, int], tuple[Tensors, list[str]]]] = {
    ".safetensors": _read_safetensors,
    ".pt": read_torch,
    ".pth": read_torch,
    ".th": read_torch,
    ".ckpt": read_torch,
    ".bin": read_torch,
    ".npz": _read_npz,
    ".npy": _read_npy,
}
