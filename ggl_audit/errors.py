"""The few errors that a user can meet, each of which the user can mend.

They end the program with exit code 2 (3 where nothing can be measured) and one message: where,
what was wrong, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from ggl_audit.messages import Message, Said

Key = tuple[str | int, ...]

REFUSED = Message(
    "code/refused",
    "{reason}",
    advice="Act on the words, which are those of the code that refused the value: a package's, or "
    "your own.",
)


class AuditError(Exception):
    """Something the user handed in cannot be used.

    It can be pickled, as it may come out of another process.

    Attributes:
        exit_code: of the program: 2 for bad input, 3 where nothing can be said of it.
        said: what was wrong, what was expected and what to do, with the code of its message.
    """

    exit_code: ClassVar[Literal[2, 3]] = 2

    def __init__(self, said: Said) -> None:
        # Exception.__new__ has kept all arguments, which unpickling calls the class with.
        self.said = _checked(said)

    @property
    def code(self) -> str:
        """The code of the message, by which docs/inputs.md has it."""
        return self.said.code

    @property
    def where(self) -> str:
        """The file or the key that the error is about, or an empty string."""
        return ""

    def __str__(self) -> str:
        # The one place where a message is put together, and names from files become harmless.
        where = printable(self.where).replace("\n", r"\n")
        message = f"{where}: {self.said.text}" if where else self.said.text
        return printable(f"{message}. {self.said.remedy}".rstrip())


class CannotGoOnError(AuditError):
    """An audit ends before its time, through no fault of the input: exit code 3."""

    exit_code = 3


class InputError(AuditError):
    """A file cannot be read, or what it holds does not fit."""

    def __init__(self, path: Path | str, said: Said) -> None:
        super().__init__(said)
        self.path = Path(path)

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)


class SpecError(AuditError):
    """A key of the spec has a value that cannot be used.

    Attributes:
        key: the path to the value, for example ``("defense", 0, "fraction")``.
        location: the file and line that declared it, filled in by whoever knows them.
    """

    def __init__(self, key: Key, said: Said) -> None:
        super().__init__(said)
        self.key = key
        self.location = ""

    @property
    def where(self) -> str:
        """File, line and key."""
        return " ".join(part for part in (self.location, dotted(self.key)) if part)


class NothingToMeasureError(SpecError):
    """What was declared leaves nothing that could be measured: inconclusive, exit code 3."""

    exit_code = 3


class ReasonError(ValueError):
    """Something cannot be used; whoever catches it knows in which file or key.

    Pydantic's validators raise it as any ValueError.

    Attributes:
        said: what is wrong with it.
    """

    def __init__(self, said: Said) -> None:
        super().__init__(said)
        self.said = _checked(said)


def reason(error: ValueError) -> Said:
    """What is wrong, by a message where it is one of ours, else in the error's own words."""
    return error.said if isinstance(error, ReasonError) else REFUSED(reason=error)


def raised(error: BaseException) -> str:
    """The kind of an error and its own words: ``TypeError: expected a tensor``."""
    words = str(error)
    return words if isinstance(error, ReasonError) else f"{type(error).__name__}: {words}"


def _checked(said: Said) -> Said:
    if not isinstance(said, Said):
        raise TypeError(f"expected what a message says, found {said!r:.80}")
    return said


def dotted(key: Key) -> str:
    """Writes a key the way ``--set`` takes it: ``defense.0.fraction``."""
    return ".".join(str(part) for part in key)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Says which known names are nearest to a wrong one, or lists them when none is near.

    Args:
        name: what the user wrote.
        known: what would have been accepted.
        limit: how many near names to offer at most.

    Returns:
        A sentence such as ``Did you mean 'clip'?``.
    """
    names = sorted(known)
    lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(lower[match]) for match in near)}?"
    return f"Known are: {', '.join(names)}."


def printable(text: str) -> str:
    """Makes control characters visible, so that a name in a file cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
