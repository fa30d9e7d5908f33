"""Opens zip archives whose directory does not lie about what is in them."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ggl_audit.errors import AuditError, ReasonError
from ggl_audit.messages import Message

LARGEST_DIRECTORY = 4 * 2**20
"""Bytes of a zip's directory: about 40,000 members."""

LARGEST_EXPANSION = 1032
"""A deflated byte cannot stand for more (Gailly and Adler, zlib technical details)."""

FREE_EXPANSION = 2**28
"""Bytes to which any archive may expand."""

USUAL_EXPANSION = 100
"""Times its own size to which an archive may expand beyond that."""

BLOCK = 2**20

LARGE_DIRECTORY = Message(
    "whole/large-directory",
    "its directory is larger than {limit:,} bytes",
    advice="Write the arrays anew with `np.savez`, as plain arrays of numbers.",
)
SAVE_ANEW = "Do not trust the archive: save it anew with `torch.save` or `np.savez`."
OVERLAPS = Message(
    "tensors/overlaps",
    "its members overlap",
    advice=SAVE_ANEW,
)
HELD_TWICE = Message(
    "tensors/held-twice",
    "holds {name!r} twice",
    advice=SAVE_ANEW,
)
UNUSUAL_MEMBER = Message(
    "tensors/unusual-member",
    "{name!r} is encrypted or compressed in an unusual way",
    advice=SAVE_ANEW,
)
OVERSIZED_MEMBER = Message(
    "tensors/oversized-member",
    "{name!r} says that it is larger than it can be",
    advice=SAVE_ANEW,
)
TOO_LARGE_UNPACKED = Message(
    "tensors/too-large-unpacked",
    "holds {size:,} bytes; at most {limit:,} are read",
    advice="Save only the tensors of one model, without optimizer states.",
)
EXPANDS = Message(
    "tensors/expands",
    "a file of {size:,} bytes that expands to {expanded:,}",
    "Save it without compression if that is what it should hold.",
    advice="Save it without compression (`np.savez`) if it is to hold so much; else it is made to "
    "fill your memory.",
)
TORCHSCRIPT = Message(
    "tensors/torchscript",
    "a TorchScript file, which PyTorch has deprecated and this program does not read",
    "Save the module by torch.export.save and name it as exported, or name its Python code as a "
    "factory; of its weights, save module.state_dict() by torch.save.",
    advice="Save the module by `torch.export.save` and declare it as `exported`, or its Python "
    "code as `factory`; of its weights, save `torch.jit.load(path).state_dict()` by `torch.save`. "
    "Where nothing else is left of a generator, PyTorch's "
    "`torch._export.converter.TS2EPConverter` makes a program of it.",
)
ENDS_EARLY = Message(
    "whole/ends-early",
    "it ends early",
    advice="Write the arrays anew with `np.savez`, as plain arrays of numbers.",
)


class _SmallReads(io.FileIO):
    """A file that is not read in large pieces, whatever a directory says about its own size."""

    def read(self, size: int | None = -1) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else size) > LARGEST_DIRECTORY:
            raise ReasonError(LARGE_DIRECTORY(limit=LARGEST_DIRECTORY))
        return super().read(size)


class Archive:
    """An open zip archive.

    Attributes:
        names: of all members, in the order of the directory.
        members: the wanted ones by name, in the same order.
    """

    def __init__(self, file: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> None:
        self._file = file
        self.names = file.namelist()
        self.members = members

    def open(self, name: str) -> zipfile.ZipExtFile:
        """A member's content as a stream, for reads of at most ``LARGEST_DIRECTORY`` bytes."""
        return self._file.open(self.members[name])  # type: ignore[return-value]


@contextmanager
def open_archive(
    path: Path,
    methods: Collection[int],
    most_bytes: int,
    only: Callable[[str], bool] = lambda _: True,
) -> Iterator[Archive]:
    """Opens a zip archive and compares its directory with its size.

    Args:
        path: the archive.
        methods: of compression, as zipfile numbers them, that its members may have.
        most_bytes: that the wanted members may have together.
        only: tells the wanted members by their names; the others are left out.

    Raises:
        AuditError: it is of TorchScript, or members are there twice, overlap, are encrypted or
            compressed otherwise, or expand to more than they can or may.
        Exception: of several kinds, where it is broken.
    """
    with _SmallReads(path) as opened, zipfile.ZipFile(opened) as file:
        size = path.stat().st_size
        if sum(member.compress_size for member in file.infolist()) > size:
            raise AuditError(OVERLAPS())
        _refuse_torchscript(file.namelist())
        members: dict[str, zipfile.ZipInfo] = {}
        for member in filter(lambda member: only(member.filename), file.infolist()):
            if member.filename in members:
                raise AuditError(HELD_TWICE(name=member.filename))
            members[member.filename] = member
            if member.flag_bits & 1 or member.compress_type not in methods:
                raise AuditError(UNUSUAL_MEMBER(name=member.filename))
            packed = member.compress_size
            stored = member.compress_type == zipfile.ZIP_STORED
            if member.file_size > (packed if stored else LARGEST_EXPANSION * (packed + 1)):
                raise AuditError(OVERSIZED_MEMBER(name=member.filename))
        total = sum(member.file_size for member in members.values())
        if total > most_bytes:
            raise AuditError(TOO_LARGE_UNPACKED(size=total, limit=most_bytes))
        if total > max(FREE_EXPANSION, USUAL_EXPANSION * size):
            raise AuditError(EXPANDS(size=size, expanded=total))
        yield Archive(file, members)


def _refuse_torchscript(names: Collection[str]) -> None:
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        raise AuditError(TORCHSCRIPT())


def read_bytes(stream: io.BufferedIOBase, count: int) -> torch.Tensor:
    """Reads so many bytes, block by block, into (count,) uint8.

    Raises:
        ReasonError: there are fewer.
    """
    content = np.empty(count, dtype=np.uint8)
    rest = content.data
    while len(rest):
        got = stream.readinto(rest[:BLOCK])
        if not got:
            raise ReasonError(ENDS_EARLY())
        rest = rest[got:]
    return torch.from_numpy(content)
