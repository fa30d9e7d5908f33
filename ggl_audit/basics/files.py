"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ggl_audit.errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that nobody sees half of it.

    Raises:
        InputError: the folder is missing or cannot be written.
    """
    if not path.parent.is_dir():
        raise InputError(path, f"there is no folder {path.parent}", "Make it first.")
    if path.is_dir():
        raise InputError(path, "is a folder; expected the name of a file")
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
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
            raise InputError(path, f"cannot be written ({error.strerror})") from None
        raise


def sha256(paths: Sequence[Path]) -> str:
    """The SHA-256, in hexadecimal, of a file's content or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
