"""Reads models that torch.export saved as programs, and runs no Python.

Nothing in such a file is unpickled by Python or evaluated; of its operators, those of PyTorch that
only compute are run (:mod:`ggl_audit.inputs.interpreter`).
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path

from torch import nn

from ggl_audit.basics.files import no_file
from ggl_audit.errors import AuditError, InputError
from ggl_audit.inputs import exported
from ggl_audit.inputs.archives import Archive, open_archive, read_bytes
from ggl_audit.inputs.interpreter import Program, UnsupportedError
from ggl_audit.inputs.tensors import MOST_BYTES, Tensors, read_tensors
from ggl_audit.messages import Message

LONGEST_REASON = 200

PROGRAM = re.compile(r"([^/]+)/models/(.+)\.json")
OLDER_PROGRAM = "serialized_exported_program.json"
OLDER_TENSORS = ("serialized_state_dict.pt", "serialized_constants.pt")

PROGRAM_CANNOT_BE_RUN = Message(
    "program/cannot-be-run",
    "a torch.export program that cannot be run here: {reason}",
    "Name the Python code of the module as a factory.",
    advice="Give a factory.",
)
NOT_WHOLE_PROGRAM = Message(
    "program/not-whole-program",
    "not a whole torch.export file ({reason})",
    "It may be truncated (copy it again), or not be what torch.export.save wrote.",
    advice="Copy the file again, or save it with `torch.export.save`.",
)
NO_SINGLE_PROGRAM = Message(
    "program/no-single-program",
    "not a torch.export file of one program: it has {count}",
    advice="Save one program by `torch.export.save`; an AOTInductor package is none.",
)
PICKLED = Message(
    "program/pickled",
    "{name!r} is saved as a pickle, which could run code",
    advice="Save a plain floating-point model; this would run code while it is loaded.",
)
SHORT_TENSOR = Message(
    "program/short-tensor",
    "{name!r} has more values than the file",
    advice="Save the program anew; this file is damaged.",
)


def load_exported(path: Path) -> Program:
    """Reads a file that ``torch.export.save`` wrote.

    Returns:
        A module with the parameters and buffers of the original, by their original names, on the
        CPU, which torch.func can map and differentiate.

    Raises:
        InputError: missing, broken, or it needs more than tensors and PyTorch's own operators.
    """
    try:
        if not path.is_file():
            raise no_file(path)
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        with open_archive(path, methods, MOST_BYTES) as archive:
            return _program(archive)
    except UnsupportedError as error:
        raise InputError(path, PROGRAM_CANNOT_BE_RUN(reason=error)) from None
    except AuditError as error:
        raise InputError(path, error.said) from None
    except Exception as error:
        # A broken file can lead a reader into any error.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST_REASON]
        raise InputError(path, NOT_WHOLE_PROGRAM(reason=reason)) from None


def _program(archive: Archive) -> Program:
    tensors: Tensors = {}
    if OLDER_PROGRAM in archive.members:  # PyTorch up to 2.7
        for name in OLDER_TENSORS:
            tensors |= _saved_tensors(archive, name)
        return exported.translate(json.loads(_content(archive, OLDER_PROGRAM)), tensors)
    programs = [found for name in archive.members if (found := PROGRAM.fullmatch(name))]
    if len(programs) != 1:
        raise AuditError(NO_SINGLE_PROGRAM(count=len(programs)))
    model, root, name = programs[0].group(0, 1, 2)
    for kind in ("weights", "constants"):
        tensors |= _tensors(archive, f"{root}/data/{kind}/", name, kind)
    return exported.translate(json.loads(_content(archive, model)), tensors)


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
            raise UnsupportedError(PICKLED(name=name))
        if file not in files:
            with archive.open(file) as stream:
                files[file] = read_bytes(stream, archive.members[file].file_size)
        values = files[file].view(exported.DTYPES[meta["dtype"]])
        sizes, strides = (
            [size["as_int"] for size in meta[which]] for which in ("sizes", "strides")
        )
        tensor = values.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
        if tensor.numel() > values.numel():
            raise AuditError(SHORT_TENSOR(name=name))
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
