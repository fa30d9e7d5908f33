"""Writes a report to a file, in the format of its ending, and reads one back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ggl_audit.basics.files import CANNOT_BE_READ, no_file, write_whole
from ggl_audit.basics.plugins import with_packages
from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import AuditError, InputError, dotted
from ggl_audit.messages import Message
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report

UNKNOWN_ENDING = Message(
    "report/unknown-ending",
    "-o {path}: unknown format {ending!r}; expected {known}",
    advice="Let the name end in one of these.",
)
A_FILE_THAT_MAY_BE_WRITTEN = (
    "Give the name of a file in a folder that is there and may be written to; it is looked at "
    "before the audit begins."
)
NO_FOLDER_FOR_REPORT = Message(
    "report/no-folder-for-report",
    "-o {path}: there is no folder {folder}",
    advice=A_FILE_THAT_MAY_BE_WRITTEN,
)
REPORT_IS_A_FOLDER = Message(
    "report/is-a-folder",
    "-o {path}: is a folder; expected the name of a file",
    advice=A_FILE_THAT_MAY_BE_WRITTEN,
)
FOLDER_CANNOT_BE_WRITTEN_TO = Message(
    "report/folder-cannot-be-written-to",
    "-o {path}: the folder {folder} cannot be written to",
    advice=A_FILE_THAT_MAY_BE_WRITTEN,
)
GIVE_A_REPORT = "Give a `report.json` as `ggl-audit run -o report.json` wrote it."
LARGE_REPORT = Message(
    "report/large-report",
    "larger than {limit:,} bytes; not a report",
    advice=GIVE_A_REPORT,
)
NO_REPORT = Message(
    "report/no-report",
    "not a report of schema version 1 ({key}: {reason})",
    advice=GIVE_A_REPORT,
)
NUMBER_IN_REPORT_NOT_FINITE = Message(
    "report/number-in-report-not-finite",
    "not a report of schema version 1 (a number that is not finite)",
    advice=GIVE_A_REPORT,
)


def render_json(report: Report) -> str:
    """The report as JSON; NaN and infinity do not occur in it."""
    return report.model_dump_json(indent=2) + "\n"


LARGEST_REPORT_BYTES = 50_000_000
RENDERERS: dict[str, Callable[[Report], str]] = {".html": render_html, ".json": render_json}


Renderer = Callable[[Report], str]


def known_formats() -> dict[str, Renderer]:
    """The formats by the ending of a file's name; a package's entry point is named by it."""
    ours = {ending.removeprefix("."): render for ending, render in RENDERERS.items()}
    known = with_packages("report_formats", ours)
    return {f".{name}": render for name, render in known.items()}


def check_outputs(paths: list[Path]) -> None:
    """Finds out before an audit whether its report can be written.

    Raises:
        AuditError: an ending is unknown, or a folder is missing.
    """
    known = known_formats()
    for path in paths:
        if path.suffix not in known:
            raise AuditError(
                UNKNOWN_ENDING(path=path, ending=path.suffix, known=" or ".join(known))
            )
        if not path.parent.is_dir():
            raise AuditError(NO_FOLDER_FOR_REPORT(path=path, folder=path.parent))
        if path.is_dir():
            raise AuditError(REPORT_IS_A_FOLDER(path=path))
        if not os.access(path.parent, os.W_OK):
            raise AuditError(FOLDER_CANNOT_BE_WRITTEN_TO(path=path, folder=path.parent))


def write_report(report: Report, path: Path) -> None:
    """Writes a report, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    write_whole(path, known_formats()[path.suffix](report).encode())


def read_report(path: Path) -> Report:
    """Reads a ``report.json``.

    Raises:
        InputError: missing, or not a report of this schema version.
    """
    try:
        if not path.is_file():
            raise no_file(path)
        if path.stat().st_size > LARGEST_REPORT_BYTES:
            raise InputError(path, LARGE_REPORT(limit=LARGEST_REPORT_BYTES))
        report = Report.model_validate_json(path.read_bytes())
        json.dumps(report.model_dump(), allow_nan=False)
    except OSError as error:
        raise InputError(path, CANNOT_BE_READ(reason=error.strerror)) from None
    except ValidationError as error:
        key, said = first_problem(error, lambda _: Report.model_fields)
        raise InputError(path, NO_REPORT(key=dotted(key) or "content", reason=said)) from None
    except ValueError:
        raise InputError(path, NUMBER_IN_REPORT_NOT_FINITE()) from None
    return report
