"""``ggl-audit report``: render, convert and compare reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggl_audit.messages import Message

TWO_REPORTS = Message(
    "report/two-reports",
    "-o converts one report; two are only compared on the terminal",
    advice="Leave out `-o`, or the second report.",
)


def report(
    first: Annotated[
        Path, typer.Argument(help="A report.json, or a ledger to judge.", metavar="REPORT")
    ],
    second: Annotated[
        Path | None, typer.Argument(help="Another, to compare with.", metavar="[OTHER]")
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Convert to .html or .json. Repeatable."),
    ] = None,
) -> None:
    """Show a saved report or judge a ledger, convert it, or compare two reports."""
    from rich.console import Console

    from ggl_audit.audit import judge_ledger
    from ggl_audit.errors import AuditError
    from ggl_audit.experiments.ledger_file import is_ledger
    from ggl_audit.report.compare import render_comparison
    from ggl_audit.report.console import render_console
    from ggl_audit.report.formats import check_outputs, read_report, write_report

    outputs = output or []
    check_outputs(outputs)
    shown = judge_ledger(first) if is_ledger(first) else read_report(first)
    if second is not None and outputs:
        raise AuditError(TWO_REPORTS())
    if second is not None:
        render_comparison(shown, read_report(second), Console())
        return
    for path in outputs:
        write_report(shown, path)
        typer.echo(f"wrote {path}", err=True)
    if not outputs:
        render_console(shown, Console())
