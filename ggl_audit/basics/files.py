"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ggl_audit.errors import InputError
from ggl_audit.messages import Message

NO_FOLDER = Message(
    "file/no-folder",
    "there is no folder {folder}",
    "Make it first.",
    advice="Make the folder first, or write elsewhere.",
)
IS_A_FOLDER = Message(
    "file/is-a-folder",
    "is a folder; expected the name of a file",
    advice="Add the name of the file to write.",
)
CANNOT_BE_WRITTEN = Message(
    "file/cannot-be-written",
    "cannot be written ({reason})",
    advice="Look at the permissions of the folder and at the free space.",
)
NO_FILE = Message(
    "file/none",
    "no such file",
    "{remedy}",
    advice="Correct the path: in a spec it starts at the spec's folder, on the command line at the "
    "current one; public images may be given by `--reference PATH`.",
)
NOT_A_FILE = Message(
    "file/not-a-file",
    "not a file",
    advice="Correct the path: in a spec it starts at the spec's folder, on the command line at the "
    "current one.",
)
CANNOT_BE_READ = Message(
    "file/cannot-be-read",
    "cannot be read ({reason})",
    advice="Look at the permissions of the file and at the disk.",
)


def no_file(path: Path, remedy: str = "") -> InputError:
    """The error that there is no file, or something else in its place.

    Args:
        path: where it was to be.
        remedy: what to do where there is nothing.
    """
    return InputError(path, NOT_A_FILE() if path.exists() else NO_FILE(remedy=remedy))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that nobody sees half of it.

    Raises:
        InputError: the folder is missing or cannot be written.
    """
    if not path.parent.is_dir():
        raise InputError(path, NO_FOLDER(folder=path.parent))
    if path.is_dir():
        raise InputError(path, IS_A_FOLDER())
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(path, CANNOT_BE_WRITTEN(reason=error.strerror)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp is private to its owner; a finished file follows the user's umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        Path(draft).chmod(0o666 & ~umask)
        Path(draft).replace(path)
    except BaseException as error:
        Path(draft).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(path, CANNOT_BE_WRITTEN(reason=error.strerror)) from None
        raise


def sha256(paths: Sequence[Path]) -> str:
    """The SHA-256, in hexadecimal, of a file's content or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
