"""Reads models that were saved as programs, TorchScript and torch.export, and runs no Python.

Nothing in such a file is unpickled by Python or evaluated; of its operators, those of PyTorch that
only compute are run (:mod:`ggl_audit.inputs.interpreter`).
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ggl_audit.errors import AuditError, InputError
from ggl_audit.inputs import exported, torchscript
from ggl_audit.inputs.archives import Archive, open_archive, read_bytes
from ggl_audit.inputs.interpreter import Program, UnsupportedError
from ggl_audit.inputs.pickles import Storage, describe
from ggl_audit.inputs.tensors import MOST_BYTES, Tensors, read_tensors

LONGEST_REASON = 200

LONGEST_LINE, LONGEST_STATEMENT = 4_000, 40_000
"""Of TorchScript code, in bytes: its parser recurses, and the stack is the only other limit."""

STRING = re.compile(rb'"(?:[^"\\\n]|\\.)*"')

TRACED_INPUTS = re.compile(r"[^/]+/traced_inputs(\.pkl|/.*)")
"""Shapes of the images that a module was traced with, which are not needed."""

PROGRAM = re.compile(r"([^/]+)/models/(.+)\.json")
OLDER_PROGRAM = "serialized_exported_program.json"
OLDER_TENSORS = ("serialized_state_dict.pt", "serialized_constants.pt")


def load_torchscript(path: Path) -> Program:
    """Reads a file that ``torch.jit.save`` wrote, of a traced or a scripted module.

    Returns:
        A module with the parameters and buffers of the original, by their original names, on the
        CPU, which torch.func can map and differentiate.

    Raises:
        InputError: missing, broken, or it does what cannot be done without running TorchScript.
    """

    def load(archive: Archive) -> Program:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; files of it are there
            packed = Path(folder) / "program.pt"
            with zipfile.ZipFile(packed, "w") as copy:
                # Packed anew, it holds what was looked at, and nothing else.
                for name in archive.members:
                    if TRACED_INPUTS.fullmatch(name):
                        continue
                    content = _content(archive, name)
                    _check_code(name, content)
                    if name.endswith((".pkl", ".debug_pkl")):
                        _check_sizes(archive, name, content)
                    copy.writestr(name, content)
            script = torch.jit.load(packed, map_location="cpu")
        return torchscript.translate(script)

    return _loaded(load, path, "TorchScript", "torch.jit.save")


def load_exported(path: Path) -> Program:
    """Reads a file that ``torch.export.save`` wrote.

    Returns:
        A module with the parameters and buffers of the original, by their original names, on the
        CPU, which torch.func can map and differentiate.

    Raises:
        InputError: missing, broken, or it needs more than tensors and PyTorch's own operators.
    """

    def load(archive: Archive) -> Program:
        tensors: Tensors = {}
        if OLDER_PROGRAM in archive.members:  # PyTorch up to 2.7
            for name in OLDER_TENSORS:
                tensors |= _saved_tensors(archive, name)
            return exported.translate(json.loads(_content(archive, OLDER_PROGRAM)), tensors)
        programs = [found for name in archive.members if (found := PROGRAM.fullmatch(name))]
        if len(programs) != 1:
            raise AuditError(f"not a torch.export file of one program: it has {len(programs)}")
        model, root, name = programs[0].group(0, 1, 2)
        for kind in ("weights", "constants"):
            tensors |= _tensors(archive, f"{root}/data/{kind}/", name, kind)
        return exported.translate(json.loads(_content(archive, model)), tensors)

    return _loaded(load, path, "torch.export", "torch.export.save")


def _loaded(load: Callable[[Archive], Program], path: Path, kind: str, function: str) -> Program:
    try:
        if not path.is_file():
            raise AuditError("not a file" if path.exists() else "no such file")
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        with open_archive(path, methods, MOST_BYTES) as archive:
            return load(archive)
    except UnsupportedError as error:
        raise InputError(
            path,
            f"a {kind} program that cannot be run here: {error}",
            "Give a factory, or a program of the other kind (TorchScript, torch.export).",
        ) from None
    except AuditError as error:
        raise InputError(path, error.problem, error.remedy) from None
    except Exception as error:
        # A broken file can lead a reader into any error.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST_REASON]
        raise InputError(
            path,
            f"not a whole {kind} file ({reason})",
            f"It may be truncated (copy it again), or not be what {function} wrote.",
        ) from None


def _check_code(name: str, content: bytes) -> None:
    """Refuses code that would run while it is loaded, or break its parser."""
    if b"torch.classes" in content:
        raise UnsupportedError("it holds an object of a class in C++, such as quantized weights")
    if not name.endswith(".py"):
        return
    if not content.isascii():
        raise ValueError(f"{name} is not in ASCII, as its parser takes it")
    if b"__setstate__" in content:
        raise UnsupportedError("it holds a module with __setstate__, which runs when it is loaded")
    depth = length = 0
    for line in STRING.sub(b'""', content).splitlines():
        length = len(line) + (length if depth > 0 else 0)
        opened, closed = (sum(map(line.count, brackets)) for brackets in (b"([{", b")]}"))
        depth = max(0, depth + opened - closed)
        if len(line) > LONGEST_LINE or length > LONGEST_STATEMENT:
            raise UnsupportedError("it holds code with a statement that is too long to be parsed")


def _check_sizes(archive: Archive, name: str, content: bytes) -> None:
    """Compares what a pickle claims with what is there; PyTorch believes it."""
    storages: dict[str, Storage] = {}
    describe(io.BytesIO(content), storages, program=True)
    for storage in storages.values():
        member = archive.members.get(f"{name.rpartition('.')[0]}/{storage.key}")
        if member is not None and member.file_size != storage.nbytes:
            raise ValueError(
                f"{member.filename} has {member.file_size} bytes, not {storage.nbytes}"
            )


def _content(archive: Archive, name: str) -> bytes:
    with archive.open(name) as stream:
        return read_bytes(stream, archive.members[name].file_size).numpy().tobytes()


def _tensors(archive: Archive, folder: str, program: str, kind: str) -> Tensors:
    """The weights or the constants of a program, by name."""
    if f"{folder}{program}.pt" in archive.members:
        return _saved_tensors(archive, f"{folder}{program}.pt")
    config = json.loads(_content(archive, f"{folder}{program}_{kind}_config.json"))["config"]
    files: Tensors = {}
    found: Tensors = {}
    for name, payload in config.items():
        meta, file = payload["tensor_meta"], folder + payload["path_name"]
        if payload["use_pickle"] or meta is None:
            raise UnsupportedError(f"{name!r} is saved as a pickle, which could run code")
        if file not in files:
            with archive.open(file) as stream:
                files[file] = read_bytes(stream, archive.members[file].file_size)
        values = files[file].view(exported.DTYPES[meta["dtype"]])
        sizes, strides = (
            [size["as_int"] for size in meta[which]] for which in ("sizes", "strides")
        )
        tensor = values.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
        if tensor.numel() > values.numel():
            raise AuditError(f"{name!r} has more values than the file")
        found[name] = nn.Parameter(tensor, meta["requires_grad"]) if payload["is_param"] else tensor
    return found


def _saved_tensors(archive: Archive, name: str) -> Tensors:
    """The tensors of a file of ``torch.save`` that is in the archive."""
    content = _content(archive, name)
    if not content:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.pt"
        path.write_bytes(content)
        return read_tensors(path, may_be_empty=True)
