"""``ggl-audit check``: does everything fit, and what would the audit cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ggl_audit.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from ggl_audit.case.case import Case
    from ggl_audit.experiments.forecast import Forecast

TEXT = ("parameter", "in the file")


def check(
    context: typer.Context,
    spec: options.SpecFile = None,
    model: options.ModelFactory = None,
    weights: options.Weights = None,
    shape: options.Shape = None,
    gradient: options.GradientFile = None,
    defense: options.Defense = None,
    prior: options.PriorName = None,
    reference: options.Reference = None,
    attack: options.Attack = None,
    device: options.Device = None,
    memory: options.Memory = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    settings: options.Set = None,
) -> None:
    """Load everything, compare the capture with the model and the defense, and predict the cost."""
    options.begin(context, threads=threads, verbose=verbose, quiet=quiet)

    from rich.console import Console
    from rich.markup import escape

    from ggl_audit.audit import plan_experiments
    from ggl_audit.case.appearance import appearance_of
    from ggl_audit.case.preparation import prepare
    from ggl_audit.cli.progress import AuditProgress
    from ggl_audit.errors import printable
    from ggl_audit.experiments.forecast import forecast
    from ggl_audit.judgement.assumptions import beside

    declared = options.load_spec(
        spec,
        model=model,
        weights=weights,
        shape=shape,
        gradient=gradient,
        defense=defense,
        prior=prior,
        reference=reference,
        attack=attack,
        device=device,
        memory=memory,
        settings=settings,
    )
    with options.located(declared), AuditProgress(shown=not quiet):
        case = prepare(declared)
    console = Console()
    for remark in case.remarks:
        console.print(escape(remark))
    console.print(_parameters(case))
    fitted = case.audited.fitted
    console.print(escape(printable(f"matched by {fitted.how}")))
    if fitted.unsent:
        console.print(escape(printable(f"not in the file: {', '.join(fitted.unsent)}")))
    for sentence in beside(case):
        console.print(escape(printable(sentence)))
    for one in case.captures:
        if one is not case.audited:
            console.print()
            console.print(escape(f"{one.file}, matched by {one.fitted.how}"))
        for sentence in appearance_of(case, one):
            console.print(escape(sentence))
        how = "inferred" if one.inferred else "declared"
        labels = ", ".join(map(str, one.labels))
        how += ", in doubt" if one.labels_in_doubt else ""
        label = f"label {labels}, {how}" if case.model.targets is None else f"targets {how}"
        console.print(f"{label}; device {case.model.device}")
        for doubt in one.labels_in_doubt:
            console.print(escape(doubt.text))
        for step in one.checks:
            code = f" [{step.said.code}]" if step.outcome == "contradicts" else ""
            console.print(escape(f"{step.step}: {step.outcome} ({step.detail}){code}"))
    guarantee = case.guarantee
    promise = (
        "none declared"
        if guarantee is None
        else f"epsilon {guarantee.epsilon:.3g} at delta {guarantee.delta:g} for one "
        f"{guarantee.unit}, mu {guarantee.mu:.3g} in one release"
    )
    console.print(f"guarantee: {promise}")
    with AuditProgress(shown=not quiet) as progress:
        progress.stage("a few candidates, to predict the cost")
        experiments = plan_experiments(case)
        suite = experiments[0].suite
        predicted = forecast(case, suite, {one.name: one.plan() for one in experiments})
    console.print()
    console.print(_needs(predicted))
    console.print(f"attacks: {', '.join(suite.names)}")
    for kind, reason in suite.left_out:
        console.print(escape(printable(f"not {kind.name}: {reason}")))
    console.print(
        f"the audit evaluates {predicted.evaluations:,} candidates, about {predicted.seconds:.0f} s"
    )
    checks = [step for one in case.captures for step in one.checks]
    if any(step.outcome == "contradicts" for step in checks):
        raise typer.Exit(3)


def _parameters(case: Case) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from ggl_audit.errors import printable
    from ggl_audit.evidence.appearance import distinct_values

    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("parameter", "in the file", "shape", "norm", "zeros", "values"):
        table.add_column(column, justify="left" if column in TEXT else "right")
    for name, tensor in case.audited.observed.items():
        source = case.audited.fitted.sources.get(name, name)
        values = distinct_values(tensor)
        table.add_row(
            escape(name),
            "=" if source == name else escape(printable(source)),
            "x".join(map(str, tensor.shape)),
            f"{tensor.norm():.4g}",
            f"{float((tensor == 0).float().mean()):.1%}",
            str(values) if values < tensor.numel() // 2 else "many",
        )
    return table


def _needs(predicted: Forecast) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("grade", "takes at least", "planned", "seconds", "if"):
        table.add_column(column, justify="right" if column in ("planned", "seconds") else "left")
    for need in predicted.needs:
        table.add_row(
            need.grade,
            f"{need.trials} {need.experiment} trials",
            str(need.planned),
            f"{need.seconds:.1f}",
            need.condition,
        )
    return table
