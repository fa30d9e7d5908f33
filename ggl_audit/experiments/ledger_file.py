"""A ledger in a file: a header, what was declared, and a line for each outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from ggl_audit.basics.files import NO_FOLDER, no_file
from ggl_audit.errors import CannotGoOnError, InputError
from ggl_audit.experiments.experiment import NotMeasured, Plan, Result
from ggl_audit.experiments.ledger import Ledger, Outcome
from ggl_audit.messages import Message

MAY_CHANGE = ("time_limit",)
"""Keys of the spec that may have another value when an audit goes on."""

BEGINNING, HEADER_LINES = b'{"ledger":1,"version":"', 2
"""What each ledger begins with, and the lines before the first outcome."""

LONGEST_SHOWN = 60
"""Characters of a value that differs."""

NAME_A_LEDGER = (
    "Name a file that `--ledger` has made, or for a new one a name in a folder that is there."
)
NO_LEDGER = Message(
    "ledger/no-ledger",
    "is no ledger of an audit",
    "Name a file.",
    advice=NAME_A_LEDGER,
)
OTHER_AUDIT = Message(
    "ledger/other-audit",
    "is the ledger of another audit: {difference}{more}",
    "Go on with what it was begun with, or name another file.",
    advice="Go on with the spec, the files, the device and the versions that it was begun with, or "
    "name another file. The length of a time limit may change.",
)
IN_USE = Message(
    "ledger/in-use",
    "another audit is writing this ledger",
    "Wait for it, or name another file.",
    advice="Wait for it, or name another file: two audits cannot write one.",
)
CANNOT_BE_OPENED = Message(
    "ledger/cannot-be-opened",
    "cannot be opened ({reason})",
    advice=NAME_A_LEDGER,
)
NO_TRIALS = Message(
    "ledger/no-trials",
    "holds no trials yet",
    advice=NAME_A_LEDGER,
)
UNPLANNED = Message(
    "ledger/unplanned",
    "line {number} is of trial {trial} of {experiment}, which is not planned or is there twice",
    "The file was changed; begin another one.",
    advice="The file was changed, or is of another version: begin another one.",
)
NO_OUTCOME = Message(
    "ledger/no-outcome",
    "line {number} is no outcome of a trial",
    "The file was changed, or is of another version; begin another one.",
    advice="The file was changed, or is of another version: begin another one.",
)
LEDGER_CANNOT_BE_WRITTEN = Message(
    "ledger/cannot-be-written",
    "{path}: the ledger cannot be written ({reason})",
    "What it holds is whole: make room, and run the same command again.",
    advice="Exit code 3. What it holds is whole: make room, and run the same command again.",
)


class Header(BaseModel):
    """What the outcomes of a ledger are of; outcomes under another are not mixed with them.

    Attributes:
        ledger: of the format.
        version: of this program.
        torch: of PyTorch.
        device: as it calls itself.
        spec: as it was read, without what may change.
        is_limited: whether there is a time limit, for which trials are taken in smaller groups.
        inputs: the SHA-256 of each file that was read, by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ledger: Literal[1] = 1
    version: str
    torch: str
    device: str
    spec: dict[str, Any]
    is_limited: bool
    inputs: dict[str, str]

    def differences(self, other: Header) -> Iterator[str]:
        """What another one has otherwise, in words."""
        for name, ours, theirs in (
            ("ggl-audit", self.version, other.version),
            ("PyTorch", self.torch, other.torch),
            ("the device", self.device, other.device),
            ("a time limit", self.is_limited, other.is_limited),
        ):
            if ours != theirs:
                yield f"{name}: {theirs} there, {ours} here"
        yield from _differences(self.spec, other.spec)
        for path in sorted(self.inputs.keys() | other.inputs.keys()):
            if self.inputs.get(path) != other.inputs.get(path):
                yield f"the content of {path}"


def header_of(
    version: str, environment: Mapping[str, str], spec: Mapping[str, Any], inputs: dict[str, str]
) -> Header:
    """The header of an audit's ledger.

    Args:
        version: of this program.
        environment: as :func:`ggl_audit.basics.environment.describe` has it.
        spec: as it was read, in JSON's terms.
        inputs: the SHA-256 of each file that was read, by its name.
    """
    return Header(
        version=version,
        torch=environment["torch"],
        device=environment["device"],
        spec={key: value for key, value in spec.items() if key not in MAY_CHANGE},
        is_limited=spec["time_limit"] is not None,
        inputs=inputs,
    )


@contextmanager
def open_ledger(
    path: Path,
    header: Header,
    declared: BaseModel,
    results: Mapping[str, type[Result]],
    plans: Mapping[str, Plan | NotMeasured],
) -> Iterator[tuple[Ledger, list[str]]]:
    """Opens a ledger for one process, and goes on where it ends; a new one is begun.

    Args:
        path: of the file.
        header: what its outcomes have to be of.
        declared: what was known before the first trial, which is kept in a new one.
        results: what comes out of a trial, by the experiment's name.
        plans: of the experiments, by name.

    Yields:
        The ledger, whose outcomes are in the file before they count; and what there is to say of
        the file, in sentences.

    Raises:
        InputError: another process has it open, it is no ledger, or one of something else.
        CannotGoOnError: a line cannot be written; those before it are whole.
    """
    if not path.parent.is_dir():
        raise InputError(path, NO_FOLDER(folder=path.parent))
    if path.exists() and not path.is_file():
        raise InputError(path, NO_LEDGER())
    lock = FileLock(f"{path.resolve()}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(path, IN_USE()) from None
    except OSError as error:
        raise InputError(path, CANNOT_BE_OPENED(reason=error.strerror)) from None
    try:
        said = []
        outcomes: list[Outcome] = []
        lines, torn = _whole_lines(path)
        if torn:
            said.append(f"{path}: the last line was torn and is dropped")
        if lines:
            _refuse_others(path, lines, header)
            outcomes = read_outcomes(path, lines[HEADER_LINES:], results, plans)
            said.append(f"{path} holds {len(outcomes)} trials; the audit goes on from there")
        with _opened(path) as file:
            writer = _Writer(path, file)
            if not lines:
                writer.append([header.model_dump_json(), declared.model_dump_json()])
            yield Ledger(outcomes, writer.keep), said
    finally:
        lock.release()


def is_ledger(path: Path) -> bool:
    """Whether a file begins like a ledger."""
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def read_declared(path: Path) -> tuple[Header, str, list[str]]:
    """Reads a ledger of any audit, without going on with it.

    Returns:
        Its header, what was declared, in JSON, and the lines of the outcomes.

    Raises:
        InputError: it is no ledger.
    """
    if not path.is_file():
        raise no_file(path)
    content = _content(path)
    lines = _lines(content)
    header = _header(path, lines)
    if len(lines) < HEADER_LINES:
        raise InputError(path, NO_TRIALS())
    return header, lines[1], lines[2:]


def read_outcomes(
    path: Path,
    lines: Sequence[str],
    results: Mapping[str, type[Result]],
    plans: Mapping[str, Plan | NotMeasured],
) -> list[Outcome]:
    """The outcomes in the lines of a ledger after its header.

    Raises:
        InputError: a line is no outcome of a planned trial, or the second one of it.
    """
    outcomes, seen = [], set[tuple[str, int]]()
    for number, line in enumerate(lines, start=HEADER_LINES + 1):
        outcome = _outcome_of(path, number, line, results)
        plan, place = plans[outcome.experiment], (outcome.experiment, outcome.trial)
        planned = isinstance(plan, Plan) and 0 <= outcome.trial < plan.trials
        if not planned or place in seen:
            raise InputError(
                path, UNPLANNED(number=number, trial=outcome.trial, experiment=outcome.experiment)
            )
        seen.add(place)
        outcomes.append(outcome)
    return outcomes


def _outcome_of(path: Path, number: int, line: str, results: Mapping[str, type[Result]]) -> Outcome:
    try:
        data = json.loads(line)
        result = results[data["experiment"]].model_validate(data.pop("result"))
        return Outcome(**data, result=result)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(path, NO_OUTCOME(number=number)) from None


class _Writer:
    """Appends whole lines; what cannot be written whole is taken back."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        self.append([outcome.model_dump_json() for outcome in outcomes])

    def append(self, lines: Sequence[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        whole = self._file.seek(0, os.SEEK_END)
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(whole)
            raise CannotGoOnError(
                LEDGER_CANNOT_BE_WRITTEN(path=self._path, reason=error.strerror)
            ) from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Unbuffered, so that nothing is written later than it is said to be.
        file = path.open("r+b" if path.exists() else "x+b", buffering=0)
    except OSError as error:
        raise InputError(path, CANNOT_BE_OPENED(reason=error.strerror)) from None
    with file:
        yield file


def _whole_lines(path: Path) -> tuple[list[str], bool]:
    """The whole lines of a ledger, and whether the last one was torn; that is cut off the file."""
    content = _content(path) if path.exists() else b""
    end = content.rfind(b"\n") + 1
    lines = _lines(content[:end])
    begins = content.startswith(BEGINNING) or BEGINNING.startswith(content)
    if begins and len(lines) < HEADER_LINES:
        lines, end = [], 0
    elif content:
        _header(path, lines)
    if end < len(content):
        try:
            os.truncate(path, end)
        except OSError as error:
            raise InputError(path, CANNOT_BE_OPENED(reason=error.strerror)) from None
    return lines, end < len(content)


def _lines(content: bytes) -> list[str]:
    """The whole lines; what JSON holds may have other ends of lines in it."""
    return content.decode("utf-8", "replace").split("\n")[:-1]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(path, CANNOT_BE_OPENED(reason=error.strerror)) from None


def _header(path: Path, lines: Sequence[str]) -> Header:
    try:
        return Header.model_validate_json(lines[0])
    except (IndexError, ValidationError):
        raise InputError(path, NO_LEDGER()) from None


def _refuse_others(path: Path, lines: Sequence[str], header: Header) -> None:
    different = list(header.differences(_header(path, lines)))
    if different:
        more = f", and {len(different) - 1} more" if len(different) > 1 else ""
        raise InputError(path, OTHER_AUDIT(difference=different[0], more=more))


def _differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    """The keys of a spec that differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(ours.get(name), theirs.get(name), inner)
    elif ours != theirs:
        yield f"{key} is {_shown(theirs)} there, {_shown(ours)} here"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
