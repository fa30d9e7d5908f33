"""What a pickle of tensors describes, found without calling anything that the pickle names.

What it describes beside tensors, such as the hyperparameters of a checkpoint, stays closed: only
where an object of a class that plain files of tensors do not name is needed is the file refused.

``torch.load(weights_only=True)`` runs no code either, but it believes the file: it allocates what
a storage claims to hold (in the format before PyTorch 1.6), and hashes for hours a tuple of tuples
of tuples that two hundred bytes describe. Here the instructions of the pickle are followed on plain
values, and classes and functions stay names. They are those of protocol 2, which is what
``torch.save`` writes.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ggl_audit.errors import AuditError, ReasonError
from ggl_audit.messages import Message

MOST_INSTRUCTIONS = 500_000
"""About 15,000 tensors."""

MOST_DIMENSIONS = 64

STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "QInt8": torch.int8,
        "QUInt8": torch.uint8,
        "QInt32": torch.int32,
    }.items()
} | {"torch.storage UntypedStorage": torch.uint8}

VALUELESS = {
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_qtensor": "a quantized tensor",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor of the meta device, without values",
}

# What else stands in the pickles of tensors, of the rest of a checkpoint, and of NumPy's arrays.
OTHER_NAMES = {
    "__builtin__ bytes",
    "__builtin__ complex",
    "__builtin__ set",
    "_codecs encode",
    "collections Counter",
    "collections OrderedDict",
    "numpy dtype",
    "numpy ndarray",
    "numpy._core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "torch Size",
    "torch Tensor",
    "torch device",
    "torch per_channel_affine",
    "torch per_channel_affine_float_qparams",
    "torch per_channel_symmetric",
    "torch per_tensor_affine",
    "torch per_tensor_symmetric",
    "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.nn.parameter Parameter",
    "torch.serialization _get_layout",
}

PLAIN_NUMPY_CODE = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")

LONG_PICKLE = Message(
    "tensors/long-pickle",
    "its pickle has more than {limit:,} instructions",
    "Save the tensors alone, best as .safetensors.",
    advice="Save NumPy arrays with `np.savez(path, *arrays)` and tensors as `.safetensors`, "
    "without what a checkpoint holds besides.",
)
NUMBERS_MISSING = Message(
    "tensors/numbers-missing",
    "its pickle numbers more than it has",
    advice="Do not trust the archive: save it anew with `torch.save` or `np.savez`.",
)
DO_NOT_LOAD = (
    "Do not load it by other means before you know where it is from: `torch.save` does not write "
    "this. Ask for the tensors as `.safetensors`."
)
DESCRIBED_TWICE = Message(
    "whole/described-twice",
    "its storage {key} is described in two ways",
    advice=DO_NOT_LOAD,
)
UNKNOWN_INSTRUCTION = Message(
    "whole/unknown-instruction",
    "its pickle has the instruction {instruction}",
    advice=DO_NOT_LOAD,
)
NO_STORAGE = Message(
    "whole/no-storage",
    "it holds something else than a storage where storages stand",
    advice=DO_NOT_LOAD,
)
UNUSUAL_CALL = Message(
    "whole/unusual-call",
    "it calls {function} as nothing that saves tensors does",
    advice=DO_NOT_LOAD,
)
NO_STRIDES = Message(
    "whole/no-strides",
    "a tensor in it has no dtype, or shape and strides that do not go together",
    advice=DO_NOT_LOAD,
)
IMPOSSIBLE_SHAPE = Message(
    "whole/impossible-shape",
    "a tensor in it has a shape, strides or an offset that no tensor has",
    advice=DO_NOT_LOAD,
)
BEYOND_STORAGE = Message(
    "whole/beyond-storage",
    "a tensor in it reaches beyond its storage",
    advice="Copy the file again, it is truncated or damaged; if it is whole, save the tensors "
    "anew with `torch.save` or as `.safetensors`.",
)
CHANGES_OBJECTS = Message(
    "whole/changes-objects",
    "it changes something that no file of tensors changes",
    advice=DO_NOT_LOAD,
)


@dataclass(frozen=True)
class Name:
    """A class, a function or a dtype, which is never looked up: ``torch FloatStorage``."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers that lie elsewhere in the file.

    Attributes:
        key: names it within the file.
        dtype: of its numbers.
        nbytes: how many bytes it claims to have.
    """

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a storage; offset and strides count elements, all of which are in the storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Valueless:
    """A tensor whose values are not simply stored; ``kind`` says what it is."""

    kind: str


@dataclass
class ArrayType:
    """The dtype of an array; an empty code for what is not a plain number."""

    code: str


@dataclass
class Array:
    """A NumPy array, whose numbers stand in the pickle itself."""

    type: ArrayType
    shape: tuple[int, ...] = (0,)
    column_major: bool = False
    content: bytes = b""

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return len(self.content)

    def to_numpy(self) -> NDArray[Any]:
        """The array.

        Raises:
            ValueError: its bytes are not as many as its shape says.
        """
        flat = np.frombuffer(self.content, np.dtype(self.type.code))
        return flat.reshape(self.shape, order="F" if self.column_major else "C").copy()


@dataclass(frozen=True)
class Closed:
    """An object of a class, or a call, that plain files of tensors do not have.

    Attributes:
        text: the name of the class or the function: ``pathlib PosixPath``.
    """

    text: str


@dataclass(frozen=True, eq=False)
class OddKey:
    """The key of a dictionary that is neither text nor a number; ``kind`` is its type."""

    kind: str


OTHER = object()
"""Stands for a value that holds no tensor."""


def describe(stream: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """Follows one pickle, and leaves the stream after it.

    Args:
        stream: at the start of the pickle.
        storages: takes all storages that the pickle names, by key.

    Returns:
        Dicts, lists, tuples and plain values; :class:`StoredTensor`, :class:`Array` and
        :class:`Valueless` for tensors, :class:`Closed` for what plain files of tensors do not name,
        :class:`Name` and :data:`OTHER` for the rest.

    Raises:
        AuditError: it is too long.
        Exception: of several kinds, where the pickle is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count == MOST_INSTRUCTIONS:
            raise AuditError(LONG_PICKLE(limit=MOST_INSTRUCTIONS))
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "APPEND":
                item = stack.pop()
                if not isinstance(stack[-1], Closed):
                    stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                if not isinstance(stack[-1], Closed):
                    stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                if not isinstance(stack[-1], Closed):
                    _set_items(stack[-1], [(key, value)])
            case "SETITEMS":
                items = since_mark()
                if not isinstance(stack[-1], Closed):
                    _set_items(stack[-1], list(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                if argument > count:
                    raise ReasonError(NUMBERS_MISSING())
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(argument) if _is_known(argument) else Closed(argument))
            case "NEWOBJ" if isinstance(stack[-2], Closed):
                stack.pop()
            case "BINPERSID":
                storage = _storage(stack.pop())
                stack.append(storage)
                if storages is not None and storages.setdefault(storage.key, storage) != storage:
                    raise ReasonError(DESCRIBED_TWICE(key=storage.key))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if isinstance(function, Closed):
                    stack.append(function)
                else:
                    stack.append(_result(function.text, arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Closed):
                    _fill(stack[-1], state)
            case other:
                raise ReasonError(UNKNOWN_INSTRUCTION(instruction=other))
    return stack.pop()


def _is_known(name: str) -> bool:
    known = name in STORAGES or name in VALUELESS or name in OTHER_NAMES
    return known or _dtype(name) is not None


def _dtype(argument: str) -> torch.dtype | None:
    module, _, name = argument.partition(" ")
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _set_items(target: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    for key, value in items:
        # A tuple of tuples of tuples, each twice the same, takes for ever to hash.
        plain = isinstance(key, (str, int, float, type(None)))
        target[key if plain else OddKey(type(key).__name__)] = value


def _storage(identifier: Any) -> Storage:
    match identifier:
        case ("storage", Name(text), str(key), str(), int(count)) | (
            "storage",
            Name(text),
            str(key),
            str(),
            int(count),
            None,
        ) if text in STORAGES and count >= 0:
            dtype = STORAGES[text]
            return Storage(key, dtype, count * dtype.itemsize)
    raise ReasonError(NO_STORAGE())


def _result(function: str, arguments: Any) -> Any:
    """What a call would return, as far as it matters."""
    if function in VALUELESS:
        return Valueless(VALUELESS[function])
    match function, arguments:
        case "collections OrderedDict", ():
            return {}
        case "collections OrderedDict", ([*pairs],):
            ordered: dict[Any, Any] = {}
            _set_items(ordered, [(key, value) for key, value in pairs])
            return ordered
        case "torch Size", (tuple(shape),):
            return shape
        case "torch._utils _rebuild_tensor", (Storage() as storage, offset, shape, strides):
            return _tensor(storage, storage.dtype, offset, shape, strides)
        case (
            "torch._utils _rebuild_tensor_v2",
            (Storage() as storage, offset, shape, strides, _, _, *metadata),
        ):
            return _tensor(storage, storage.dtype, offset, shape, strides, *metadata)
        case (
            "torch._utils _rebuild_tensor_v3",
            (Storage() as storage, offset, shape, strides, _, _, Name(dtype), *metadata),
        ):
            return _tensor(storage, _dtype(dtype), offset, shape, strides, *metadata)
        case "torch._utils _rebuild_parameter", (data, _, _):
            return data
        case "torch._utils _rebuild_parameter_with_state", (data, _, _, _):
            return data
        case (
            "torch._tensor _rebuild_from_type_v2",
            (Name(inner), Name("torch Tensor" | "torch.nn.parameter Parameter"), inside, _),
        ):
            return _result(inner, inside)
        case (
            "numpy._core.multiarray _reconstruct" | "numpy.core.multiarray _reconstruct",
            (Name("numpy ndarray"), (0,), b"b"),
        ):
            return Array(ArrayType(""))
        case "numpy dtype", (str(code), _, _):
            return ArrayType(code if PLAIN_NUMPY_CODE.fullmatch(code) else "")
        case "_codecs encode", (str(text), "latin1"):
            return text.encode("latin1")
        case "__builtin__ bytes", ():
            return b""
        case (
            "__builtin__ complex"
            | "__builtin__ set"
            | "collections Counter"
            | "numpy._core.multiarray scalar"
            | "numpy.core.multiarray scalar"
            | "torch device"
            | "torch.serialization _get_layout",
            _,
        ):
            return OTHER
    raise ReasonError(UNUSUAL_CALL(function=function.replace(" ", ".")))


def _tensor(
    storage: Storage,
    dtype: torch.dtype | None,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    metadata: object = None,
) -> StoredTensor | Valueless:
    if metadata:
        return Valueless("a tensor that is conjugated or negated only when it is used")
    if dtype is None or len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise ReasonError(NO_STRIDES())
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
        raise ReasonError(IMPOSSIBLE_SHAPE())
    count, room = math.prod(shape), storage.nbytes // dtype.itemsize
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and last >= room:
        raise ReasonError(BEYOND_STORAGE())
    if count > room:
        return Valueless("a tensor that repeats its values (expand)")
    return StoredTensor(storage, dtype, offset, shape, strides)


def _fill(target: Any, state: Any) -> None:
    match target, state:
        case dict(), _:
            pass  # attributes of an OrderedDict
        case ArrayType(), (3, "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
            target.code = target.code and order + target.code
        case ArrayType(), _:
            target.code = ""  # with fields, or of Python objects
        case Array(), (1, tuple(shape), ArrayType() as kind, bool(column_major), content):
            target.type, target.shape, target.column_major = kind, shape, column_major
            target.content = content if isinstance(content, bytes) else b""
        case _:
            raise ReasonError(CHANGES_OBJECTS())
