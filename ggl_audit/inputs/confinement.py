"""Keeps the files that a spec names inside its folder; whoever runs it may name any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ggl_audit.errors import Key, SpecError, dotted
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

FLAGS = {
    "model.factory": "--model",
    "model.exported": "--model",
    "model.weights": "--weights",
    "capture.gradient": "--gradient",
    "prior.trained": "--prior",
    "evidence.reference": "--reference",
    "evidence.truth": "--truth",
}

NO_PATH = Message(
    "file/no-path",
    "{path!r} cannot be the path of a file ({reason})",
    advice="Correct the text; it has a character or a length that no path has, or links in a "
    "circle.",
)
LEADS_OUT = Message(
    "file/leads-out",
    "{path!r} leads out of the folder of the spec",
    "A spec names files below its own folder; give others by {instead}.",
    advice="Move the file (or the target of a symbolic link) below the spec's folder, or give the "
    "path by its flag or `--set`, as the message says.",
)


def check_paths(spec: Spec, folder: Path | None, given: Sequence[Key]) -> None:
    """Checks that the files of a spec lie in its folder, after all symbolic links.

    Args:
        spec: which names them.
        folder: that of the spec; None where there is no file, and everything was given.
        given: keys that were given on the command line, and may lead anywhere.

    Raises:
        SpecError: a path that was not given leads outside, or cannot be one.
    """
    for key, path in _paths(spec, ()):
        try:
            inside = folder is None or _stays(spec.resolve(path), folder.resolve())
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(key, NO_PATH(path=str(path)[:80], reason=error)) from None
        if not inside and not any(key[: len(start)] == start for start in given):
            flag = FLAGS.get(dotted(key[:2]))
            instead = f"{flag} PATH" if flag else f"--set {dotted(key)}=PATH"
            raise SpecError(key, LEADS_OUT(path=str(path), instead=instead))


def _paths(value: Any, key: Key) -> Iterator[tuple[Key, Path]]:
    """Every path in a section, and the files of ``file.py:callable``."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, str):
        source, _, _ = value.rpartition(":")
        if source.endswith(".py"):
            yield key, Path(source)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), (*key, name))
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from _paths(part, (*key, place))


def _stays(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder and the files directly in it, is below the folder."""
    found = path.resolve()
    parts = found.iterdir() if found.is_dir() else ()
    links = (part.resolve() for part in parts if part.is_symlink())
    return all(target.is_relative_to(folder) for target in (found, *links))
