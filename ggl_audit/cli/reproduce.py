"""``ggl-audit reproduce``: run a report's audit again, and say what is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggl_audit.cli import options


def reproduce(
    context: typer.Context,
    report: Annotated[Path, typer.Argument(help="A report.json.", metavar="REPORT")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the report's files are; unless given, here or beside it."),
    ] = None,
    ledger: options.LedgerFile = None,
    workers: options.Workers = 1,
    threads: options.Threads = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Also write the new report: .html or .json."),
    ] = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a report's audit again from its own record, and compare every figure.

    Exit: 0 the verdict is the same and the rates are as near as those of other machines were,
    1 they are not, 2 inputs are missing or are others.
    """
    options.begin(context, threads=threads, verbose=verbose, quiet=quiet)
    from rich.console import Console
    from rich.markup import escape

    from ggl_audit.audit import run_again
    from ggl_audit.cli.progress import AuditProgress
    from ggl_audit.errors import printable
    from ggl_audit.report.formats import check_outputs, read_report, write_report
    from ggl_audit.report.reproduction import compare_runs

    check_outputs(output or [])
    first = read_report(report)
    folders = [folder] if folder else list(dict.fromkeys([Path(), report.parent]))
    with AuditProgress(shown=not quiet) as progress:
        again = run_again(first, folders, progress, ledger=ledger, workers=workers)
    for path in output or []:
        write_report(again, path)
        typer.echo(f"wrote {path}", err=True)
    found, console = compare_runs(first, again), Console()
    for heading, sentences in (
        ("The same", found.same),
        ("As near as those of other machines were", found.within),
        ("Different", found.different),
        ("Made with something else", found.surroundings),
    ):
        if sentences:
            console.print(f"[bold]{heading}[/]")
        for sentence in sentences:
            console.print(escape(printable(f"  {sentence}")), soft_wrap=True)
    raise typer.Exit(0 if found.holds else 1)
