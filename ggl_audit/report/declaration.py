"""The spec that a report was made from, found again in the report itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import AuditError, dotted
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec


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
        key, problem, _ = first_problem(error, lambda _: Spec.model_fields)
        raise AuditError(
            f"the declaration in the report is none of this version ({dotted(key)}: {problem})",
            f"It was made by ggl-audit {report.tool.version}: install that.",
        ) from None
    captured = spec.capture.gradient or spec.capture.after
    assert captured is not None
    for folder in folders:
        if (folder / captured).is_file():
            return spec.placed(folder, lambda _: "")
    raise AuditError(
        f"{captured} is in none of the folders {', '.join(map(str, folders))}",
        "Name the folder of the report's files by --folder.",
    )
