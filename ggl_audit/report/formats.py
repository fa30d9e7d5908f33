"""Writes a report to a file, in the format of its ending, and reads one back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ggl_audit.basics.files import write_whole
from ggl_audit.basics.plugins import with_packages
from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import AuditError, InputError, dotted
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report


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
                f"-o {path}: unknown format {path.suffix!r}; expected {' or '.join(known)}"
            )
        if not path.parent.is_dir():
            raise AuditError(f"-o {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise AuditError(f"-o {path}: is a folder; expected the name of a file")
        if not os.access(path.parent, os.W_OK):
            raise AuditError(f"-o {path}: the folder {path.parent} cannot be written to")


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
            raise InputError(path, "not a file" if path.exists() else "no such file")
        if path.stat().st_size > LARGEST_REPORT_BYTES:
            raise InputError(path, f"larger than {LARGEST_REPORT_BYTES:,} bytes; not a report")
        report = Report.model_validate_json(path.read_bytes())
        json.dumps(report.model_dump(), allow_nan=False)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        key, problem, _ = first_problem(error, lambda _: Report.model_fields)
        raise InputError(
            path, f"not a report of schema version 1 ({dotted(key) or 'content'}: {problem})"
        ) from None
    except ValueError:
        raise InputError(
            path, "not a report of schema version 1 (a number that is not finite)"
        ) from None
    return report
