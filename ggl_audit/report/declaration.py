"""The spec that a report was made from, found again in the report itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from ggl_audit.basics.files import sha256
from ggl_audit.basics.validation import first_problem
from ggl_audit.case.input_files import own_code
from ggl_audit.errors import AuditError, InputError, dotted
from ggl_audit.messages import Message
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec

OTHER_VERSION = Message(
    "report/other-version",
    "the declaration in the report is none of this version ({key}: {reason})",
    "It was made by ggl-audit {version}: install that.",
    advice="Install the version that made the report.",
)
NOT_IN_FOLDERS = Message(
    "report/not-in-folders",
    "{file} is in none of the folders {folders}",
    "Name the folder of the report's files by --folder.",
    advice="`ggl-audit reproduce` needs the files of the report: name their folder by `--folder`.",
)
NOT_READ = Message(
    "report/not-read",
    "is an input of the report, and was not read here",
    advice="Name the folder of the report's own files.",
)
NO_INPUT_OF_THE_REPORT = Message(
    "report/no-input-of-the-report",
    "would be read here, and is no input of the report",
    advice="Name the folder of the report's own files.",
)
OTHER_FILE = Message(
    "report/other-file",
    "is another file than the report's, which has the SHA-256 {digest}",
    "Name the folder of the report's own files by --folder.",
    advice="Name the folder of the report's own files.",
)


def declared_in(report: Report, folders: Sequence[Path]) -> Spec:
    """Reads the declaration of a report.

    Args:
        report: of an audit.
        folders: where its files may be; the first that has the captured gradient is taken.

    Raises:
        AuditError: no folder has it, or the declaration is not one of this version.
    """
    try:
        spec = Spec.model_validate(report.declaration)
    except ValidationError as error:
        key, said = first_problem(error, lambda _: Spec.model_fields)
        raise AuditError(
            OTHER_VERSION(key=dotted(key), reason=said, version=report.tool.version)
        ) from None
    captured = spec.capture.gradient or spec.capture.after
    assert captured is not None
    for folder in folders:
        if (folder / captured).is_file():
            placed = spec.placed(folder, lambda _: "")
            # Before any of it is run.
            there = [path for path in own_code(placed) if placed.resolve(path).is_file()]
            digests = {str(path): sha256([placed.resolve(path)]) for path in there}
            _refuse_others(report, digests)
            return placed
    raise AuditError(NOT_IN_FOLDERS(file=captured, folders=", ".join(map(str, folders))))


def check_inputs(report: Report, here: Mapping[str, str]) -> None:
    """Compares the files that were read here with those of a report.

    Args:
        report: of an audit.
        here: the SHA-256 of each file that was read, by its name.

    Raises:
        InputError: one is missing, or another one.
    """
    for file in report.inputs:
        if file.path not in here:
            raise InputError(file.path, NOT_READ())
    _refuse_others(report, here)


def _refuse_others(report: Report, here: Mapping[str, str]) -> None:
    digests = {file.path: file.sha256 for file in report.inputs}
    for path, digest in here.items():
        if path not in digests:
            raise InputError(path, NO_INPUT_OF_THE_REPORT())
        if digests[path] != digest:
            raise InputError(path, OTHER_FILE(digest=digests[path]))
