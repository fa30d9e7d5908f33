"""``ggl-audit run``: the audit."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from ggl_audit.cli import options


def run(
    context: typer.Context,
    spec: options.SpecFile = None,
    model: options.ModelFactory = None,
    weights: options.Weights = None,
    shape: options.Shape = None,
    gradient: options.GradientFile = None,
    defense: options.Defense = None,
    prior: options.PriorName = None,
    reference: options.Reference = None,
    truth: options.Truth = None,
    attack: options.Attack = None,
    device: options.Device = None,
    memory: options.Memory = None,
    threads: options.Threads = None,
    time_limit: options.TimeLimit = None,
    seed: options.Seed = None,
    fail_on: options.FailOn = None,
    ledger: options.LedgerFile = None,
    workers: options.Workers = 1,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit 0 where the gate would exit 1.")
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Also write the report: .html or .json. Repeatable."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, and only the verdict.")
    ] = False,
    verbose: options.Verbose = False,
    settings: options.Set = None,
) -> None:
    """Audit a captured gradient: how much does it give away under the declared defense?"""
    started = time.perf_counter()
    options.begin(context, threads=threads, verbose=verbose, quiet=quiet)
    from rich.console import Console

    from ggl_audit.audit import run_audit
    from ggl_audit.basics.clock import Clock
    from ggl_audit.cli.progress import AuditProgress
    from ggl_audit.judgement.grade import in_words
    from ggl_audit.report.console import render_console
    from ggl_audit.report.formats import check_outputs, write_report
    from ggl_audit.report.wording import answers

    declared = options.load_spec(
        spec,
        model=model,
        weights=weights,
        shape=shape,
        gradient=gradient,
        defense=defense,
        prior=prior,
        reference=reference,
        truth=truth,
        attack=attack,
        device=device,
        memory=memory,
        time_limit=time_limit,
        seed=seed,
        fail_on=fail_on,
        settings=settings,
    )
    outputs = output or []
    check_outputs(outputs)
    # A CI job is ended by SIGTERM; it gets the same partial report as somebody at the keyboard.
    signal.signal(signal.SIGTERM, _interrupt)
    with options.located(declared), AuditProgress(shown=not quiet) as progress:
        clock = Clock(declared.time_limit, started)
        report = run_audit(declared, progress, clock, ledger=ledger, workers=workers)
    # The files first: whoever reads the terminal may hang up.
    for path in outputs:
        write_report(report, path)
        typer.echo(f"wrote {path}", err=True)
    if quiet:
        verdict = report.verdict
        words = in_words(verdict.grade, report.evidence.ceiling, verdict.question)
        typer.echo(" ".join([f"{verdict.grade}: {words}.", verdict.reason, *answers(report)]))
    else:
        render_console(report, Console())
    code = report.verdict.exit_code
    raise typer.Exit(0 if code == 1 and exit_zero else code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
