"""Reads the files of ``torch.save``: zip archives, and the format before PyTorch 1.6."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from ggl_audit.errors import AuditError, ReasonError
from ggl_audit.inputs.archives import open_archive, read_bytes
from ggl_audit.inputs.pickles import (
    Array,
    Closed,
    OddKey,
    Storage,
    StoredTensor,
    Valueless,
    describe,
)
from ggl_audit.messages import Message

LARGEST_PICKLE = 16 * 2**20
"""Bytes; the values of PyTorch's tensors lie outside, those of NumPy's arrays inside."""

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization.MAGIC_NUMBER

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "gradients",
    "gradient",
    "grads",
    "parameters",
    "params",
    "update",
)
MOST_WRAPPERS = 4
FEW_NUMBERS = 32
"""The most that a list in a file has, such as settings are; more may be an image."""

LONGEST_TEXT = 128
"""The most characters of a setting or a name; more may be an image as well."""

Leaf = StoredTensor | Array | Valueless
LEAVES = (StoredTensor, Array, Valueless)

NO_STATE_DICT = Message(
    "tensors/no-state-dict",
    "a zip archive, but not of tensors that torch.save wrote",
    "A torch.export program is declared as exported; for weights, save the state dict.",
    advice="Declare a torch.export program as `exported`; for weights save the state dict.",
)
COPY_AGAIN = (
    "Copy the file again, it is truncated or damaged; if it is whole, save the tensors anew with "
    "`torch.save` or as `.safetensors`."
)
OTHER_STORAGE = Message(
    "whole/other-storage",
    "{file} has {size} bytes, not {expected}",
    advice=COPY_AGAIN,
)
NOT_BY_TORCH_SAVE = Message(
    "whole/not-by-torch-save",
    "torch.save did not write it",
    advice=COPY_AGAIN,
)
CUT_OFF = Message(
    "whole/cut-off",
    "it ends before its tensors do",
    advice=COPY_AGAIN,
)
OTHER_STORAGE_SIZE = Message(
    "whole/other-storage-size",
    "a storage in it has {count} numbers, not what its pickle says",
    advice=COPY_AGAIN,
)
LARGE_PICKLE = Message(
    "tensors/large-pickle",
    "its pickle is longer than {limit:,} bytes",
    "Save NumPy arrays with np.savez(path, *arrays).",
    advice="Save NumPy arrays with `np.savez(path, *arrays)` and tensors as `.safetensors`, "
    "without what a checkpoint holds besides.",
)
OTHER_BYTE_ORDER = Message(
    "tensors/other-byte-order",
    "written by a machine of another byte order",
    "Save as .safetensors.",
    advice="Save it as `.safetensors` on the machine that wrote it.",
)
NOT_DENSE = Message(
    "tensors/not-dense",
    "{name!r} is {kind}; expected a dense tensor",
    "Save it as an ordinary one: .to_dense(), .dequantize(), .resolve_neg(), .contiguous().",
    advice="Make it an ordinary tensor first, by `.to_dense()`, `.dequantize()`, `.resolve_neg()` "
    "or `.contiguous()`.",
)
OBJECTS = Message(
    "tensors/objects",
    "{name!r} is an array of something else than numbers",
    advice="Save each array by itself: `np.savez(path, *arrays)`, not an array of objects.",
)
TOO_LARGE_TENSORS = Message(
    "tensors/too-large-tensors",
    "its tensors have {size:,} bytes; at most {limit:,} are read",
    advice="Save only the tensors of one model, without optimizer states.",
)
SAVE_ONE = "Save the one that is to be audited alone; each user's release is an audit of its own."
LIST_OF_COLLECTIONS = Message(
    "tensors/list-of-collections",
    "a list of {count} collections of tensors, for example of several users",
    "Save the one to be audited: torch.save(torch.load(path)[0], ...).",
    advice=SAVE_ONE,
)
NO_TENSORS_BY_NAME = Message(
    "tensors/no-tensors-by-name",
    "expected tensors by name or in order, found {found}",
    advice="Save a dict or a list of tensors alone; the message says what was found in their "
    "place.",
)
SEVERAL_COLLECTIONS = Message(
    "tensors/several-collections",
    "holds several collections of tensors: {names}",
    "Save the right one alone: torch.save(torch.load(path)[{first!r}], ...).",
    advice=SAVE_ONE,
)
BESIDE_COLLECTION = Message(
    "tensors/beside-collection",
    "holds the tensor {name!r} beside {key!r}, a collection of tensors",
    "Save those that belong together alone.",
    advice=SAVE_ONE,
)
NO_NAME = Message(
    "tensors/no-name",
    "{name!r} is no name of a tensor, or stands there twice",
    advice="Save a dict with text or whole numbers as keys, each once.",
)
IS_NONE = Message(
    "tensors/is-none",
    "{name!r} is None: this gradient was never computed",
    "Leave it out, or save zeros if that is what the client sends.",
    advice="Leave the parameter out if it is never sent, or save zeros if that is what the client "
    "sends.",
)
KEY_OF_OTHER_KIND = Message(
    "whole/key-of-other-kind",
    "a dictionary in it has a key that is a {kind}",
    advice="Do not load it by other means before you know where it is from: `torch.save` does not "
    "write this. Ask for the tensors as `.safetensors`.",
)
RUNS_CODE = Message(
    "tensors/runs-code",
    "not a plain file of tensors: the pickle in it names {code!r}, which could run code, so it "
    "was not opened",
    "Save the tensors alone, for example torch.save(model.state_dict(), path), best as "
    ".safetensors.",
    advice="Save the tensors alone in the program that wrote the file: "
    "`torch.save(model.state_dict(), path)`, or as `.safetensors`.",
)


def read_torch(path: Path, most_bytes: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Reads the tensors of a file of ``torch.save``; see :func:`describe` for what is not run.

    Returns:
        Tensors by name, or "0", "1", ... for a list; and the places of what else there is in the
        file: other tensors, lists of many numbers, long texts, and values of a storage that none of
        the tensors shows, as a slice of a larger tensor leaves.

    Raises:
        AuditError: it holds something else, or tensors without values, or more than ``most_bytes``.
        Exception: of several kinds, where it is broken.
    """
    with path.open("rb") as file:
        start = file.read(len(ZIP_MAGIC))
    if start == ZIP_MAGIC:
        return _read_archive(path, most_bytes)
    return _read_legacy(path, most_bytes)


def _read_archive(path: Path, most_bytes: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    with open_archive(path, {zipfile.ZIP_STORED}, most_bytes) as archive:
        names = archive.members
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else None
        if root is None:
            raise AuditError(NO_STATE_DICT())

        def read(name: str) -> torch.Tensor:
            with archive.open(root + name) as stream:
                return read_bytes(stream, names[root + name].file_size)

        def stored(storage: Storage) -> torch.Tensor:
            name = f"data/{storage.key}"
            size = names[root + name].file_size
            if size != storage.nbytes:
                raise ReasonError(OTHER_STORAGE(file=name, size=size, expected=storage.nbytes))
            return read(name)

        if names[f"{root}data.pkl"].file_size > LARGEST_PICKLE:
            raise AuditError(LARGE_PICKLE(limit=LARGEST_PICKLE))
        if f"{root}byteorder" in names:
            order = bytes(read("byteorder").numpy()).decode("ascii")
            _check_byte_order(order == "little")
        described = describe(io.BytesIO(bytes(read("data.pkl").numpy())))
        return _tensors(described, stored, most_bytes)


def _read_legacy(path: Path, most_bytes: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        # A length in a pickle is believed by a file, which makes room for it, but not by a buffer.
        pickles = io.BytesIO(file.read(LARGEST_PICKLE))
        storages: dict[str, Storage] = {}
        try:
            if (describe(pickles), describe(pickles)) != (LEGACY_MAGIC, LEGACY_VERSION):
                raise ReasonError(NOT_BY_TORCH_SAVE())
            _check_byte_order(describe(pickles)["little_endian"] is True)
            described, keys = describe(pickles, storages), describe(pickles)
        except ValueError:
            if pickles.tell() == LARGEST_PICKLE:
                raise AuditError(LARGE_PICKLE(limit=LARGEST_PICKLE)) from None
            raise
        position = pickles.tell()
        places: dict[str, int] = {}
        for key in keys:
            places[key] = position + 8
            position += 8 + storages[key].nbytes
            if position > size:
                raise ReasonError(CUT_OFF())

        def stored(storage: Storage) -> torch.Tensor:
            file.seek(places[storage.key] - 8)
            count = int.from_bytes(file.read(8), "little")
            if count * storage.dtype.itemsize != storage.nbytes:
                raise ReasonError(OTHER_STORAGE_SIZE(count=count))
            return read_bytes(file, storage.nbytes)

        return _tensors(described, stored, most_bytes)


def _check_byte_order(little: bool) -> None:
    if not little or sys.byteorder != "little":
        raise AuditError(OTHER_BYTE_ORDER())


def _tensors(
    described: Any, stored: Callable[[Storage], torch.Tensor], most_bytes: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    leaves = find_tensors(described)
    for name, leaf in leaves.items():
        if isinstance(leaf, Valueless):
            raise AuditError(NOT_DENSE(name=name, kind=leaf.kind))
        if isinstance(leaf, Array) and not leaf.type.code:
            raise AuditError(OBJECTS(name=name))
    total = sum(leaf.nbytes for leaf in leaves.values() if not isinstance(leaf, Valueless))
    if total > most_bytes:
        raise AuditError(TOO_LARGE_TENSORS(size=total, limit=most_bytes))
    contents: dict[str, torch.Tensor] = {}
    views: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Array):
            array = leaf.to_numpy()
            tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        elif isinstance(leaf, StoredTensor) and 0 in leaf.shape:
            tensors[name] = torch.empty(leaf.shape, dtype=leaf.dtype)
        elif isinstance(leaf, StoredTensor):
            storage = leaf.storage
            if storage.key not in contents:
                contents[storage.key] = stored(storage)
            whole = storage.nbytes // leaf.dtype.itemsize * leaf.dtype.itemsize
            numbers = contents[storage.key][:whole].view(leaf.dtype)
            tensors[name] = numbers.as_strided(leaf.shape, leaf.strides, leaf.offset)
            views.setdefault(storage.key, {})[name] = leaf
    beyond = [
        f"{', '.join(of)} (beyond what is shown of the storage)"
        for key, of in views.items()
        if _holds_more(contents[key], of.values())
    ]
    return tensors, [*_beside(described, leaves), *beyond]


def _holds_more(content: torch.Tensor, views: Collection[StoredTensor]) -> bool:
    """Whether bytes of a storage that no tensor shows are anything but zero."""
    left = content.clone()
    for view in views:
        size = view.dtype.itemsize
        strides = [size * stride for stride in view.strides]
        left.as_strided((*view.shape, size), (*strides, 1), size * view.offset).zero_()
    return bool(left.any())


def _beside(described: Any, leaves: dict[str, Leaf]) -> Iterator[str]:
    """The places of other tensors, lists of many numbers and long texts in what a file holds."""
    seen = {id(leaf) for leaf in leaves.values()}
    parts: list[tuple[str, Any]] = [("", described)]
    while parts:
        place, part = parts.pop()
        if id(part) in seen:
            continue
        if isinstance(part, LEAVES):
            yield place
        elif isinstance(part, (dict, list, tuple)):
            seen.add(id(part))
            inside = part.items() if isinstance(part, dict) else enumerate(part)
            own = [(f"{place}.{key}".lstrip("."), one) for key, one in inside]
            if sum(isinstance(one, (int, float)) for _, one in own) > FEW_NUMBERS:
                yield place
            parts += reversed(own)
        elif isinstance(part, (str, bytes)) and len(part) > LONGEST_TEXT:
            yield place


def find_tensors(described: Any, depth: int = 0) -> dict[str, Leaf]:
    """Finds the one collection of tensors in what a file holds.

    It is a tensor, a dict or a list of them, a list of pairs (name, tensor), or one of these in
    what usual tools put around it: ``state_dict`` beside the rest of a checkpoint (PyTorch
    Lightning), ``[{"gradients": [...], "buffers": ..., "metadata": ...}]`` (breaching). An empty
    dict holds none, and is no error.

    Raises:
        AuditError: there is none, more than one, or a gradient in it was never computed.
    """
    if isinstance(described, dict) and not described:
        return {}
    entries = _entries(described)
    if entries is not None:
        return _by_name(entries)
    if isinstance(described, (list, tuple)):
        if len(described) == 1 and isinstance(described[0], (dict, list)) and depth < MOST_WRAPPERS:
            return find_tensors(described[0], depth + 1)
        if len(described) > 1 and all(isinstance(part, (dict, list)) for part in described):
            raise AuditError(LIST_OF_COLLECTIONS(count=len(described)))
    if isinstance(described, dict):
        chosen = _wrapped(described)
        if chosen is not None:
            return _by_name(chosen)
        for key in WRAPPERS:
            if isinstance(described.get(key), (dict, list)) and depth < MOST_WRAPPERS:
                return find_tensors(described[key], depth + 1)
    _refuse_closed(described)
    raise AuditError(NO_TENSORS_BY_NAME(found=_what_is(described)))


def _entries(part: Any) -> list[tuple[Any, Leaf | None]] | None:
    """Names and tensors of a collection of tensors; None for anything else."""
    if isinstance(part, LEAVES):
        return [(0, part)]
    if isinstance(part, dict):
        entries = list(part.items())
    elif isinstance(part, (list, tuple)):
        pairs = all(isinstance(item, (tuple, list)) and len(item) == 2 for item in part)
        named = pairs and all(isinstance(item[0], str) for item in part)
        entries = [(item[0], item[1]) for item in part] if named else list(enumerate(part))
    else:
        return None
    leaves = [isinstance(leaf, LEAVES) for _, leaf in entries]
    complete = all(known or leaf is None for known, (_, leaf) in zip(leaves, entries, strict=True))
    return entries if any(leaves) and complete else None


def _wrapped(described: dict[Any, Any]) -> list[tuple[Any, Leaf | None]] | None:
    """The collection among the entries of a dict that holds other things too."""
    found = {
        key: entries
        for key, part in described.items()
        if isinstance(part, (dict, list, tuple)) and (entries := _entries(part)) is not None
    }
    if "state_dict" in found:
        return found["state_dict"]
    if "buffers" in found and len(found) == 2:  # what breaching has beside either of these
        found = {key: entries for key, entries in found.items() if key != "buffers"}
    if len(found) > 1:
        raise AuditError(
            SEVERAL_COLLECTIONS(names=", ".join(map(repr, found)), first=next(iter(found)))
        )
    for key, entries in found.items():
        beside = [name for name, part in described.items() if isinstance(part, LEAVES)]
        if beside and key not in WRAPPERS:
            raise AuditError(BESIDE_COLLECTION(name=beside[0], key=key))
        return entries
    return None


def _by_name(entries: list[tuple[Any, Leaf | None]]) -> dict[str, Leaf]:
    named: dict[str, Leaf] = {}
    for key, leaf in entries:
        name = str(key)
        if type(key) not in (str, int) or name in named:
            raise AuditError(NO_NAME(name=key))
        if leaf is None:
            raise AuditError(IS_NONE(name=name))
        named[name] = leaf
    return named


def _refuse_closed(described: Any) -> None:
    """Names what may hold the tensors and is not opened."""
    parts = [described]
    if isinstance(described, dict):
        parts += described.values()
        for key in described:
            if isinstance(key, OddKey):
                raise ReasonError(KEY_OF_OTHER_KIND(kind=key.kind))
    elif isinstance(described, (list, tuple)):
        parts += described
    for part in parts:
        if isinstance(part, Closed):
            raise AuditError(RUNS_CODE(code=part.text.replace(" ", ".")[:80]))


def _what_is(part: Any) -> str:
    kind = type(part).__name__
    if isinstance(part, dict) and part:
        odd = next(key for key, value in part.items() if not isinstance(value, LEAVES))
        return f"a dict whose {str(odd)[:80]!r} is a {type(part[odd]).__name__}"
    if isinstance(part, (list, tuple)) and part:
        odd = next(value for value in part if not isinstance(value, LEAVES))
        return f"a {kind} of {len(part)}, in which there is a {type(odd).__name__}"
    return f"an empty {kind}" if isinstance(part, (dict, list, tuple)) else f"a {kind}"
