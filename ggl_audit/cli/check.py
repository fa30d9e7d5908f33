"""``ggl-audit check``: does everything fit, and what would the audit cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ggl_audit.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from ggl_audit.forecast import Forecast


def check(
    spec: options.SpecFile = None,
    model: options.ModelFactory = None,
    weights: options.Weights = None,
    shape: options.Shape = None,
    gradient: options.GradientFile = None,
    defense: options.Defense = None,
    prior: options.PriorName = None,
    reference: options.Reference = None,
    device: options.Device = None,
    settings: options.Set = None,
) -> None:
    """Load everything, compare the capture with the model and the defense, and predict the cost."""
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ggl_audit.forecast import forecast, planned_evaluations
    from ggl_audit.setting import prepare

    declared = options.load_spec(
        spec,
        model=model,
        weights=weights,
        shape=shape,
        gradient=gradient,
        defense=defense,
        prior=prior,
        reference=reference,
        device=device,
        settings=settings,
    )
    with options.located(declared):
        setting = prepare(declared)
    console = Console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("parameter", "shape", "norm", "zeros"):
        table.add_column(column, justify="left" if column == "parameter" else "right")
    for name, tensor in setting.observed.items():
        zeros = float((tensor == 0).double().mean())
        table.add_row(
            escape(name), "x".join(map(str, tensor.shape)), f"{tensor.norm():.4g}", f"{zeros:.1%}"
        )
    console.print(table)
    how = "inferred" if declared.capture.labels == "infer" else "declared"
    labels = ", ".join(map(str, setting.labels))
    console.print(f"label {labels}, {how}; device {setting.model.device}")
    for step in setting.checks:
        console.print(f"{escape(step.step)}: {step.outcome} ({escape(step.detail)})")
    guarantee = setting.guarantee
    promise = (
        "none declared"
        if guarantee is None
        else f"epsilon {guarantee.epsilon:.3g} at delta {guarantee.delta:g} for one "
        f"{guarantee.unit}, mu {guarantee.mu:.3g} in one release"
    )
    console.print(f"guarantee: {promise}")
    predicted = forecast(setting)
    console.print()
    console.print(_needs(predicted))
    console.print(
        f"the audit evaluates {planned_evaluations(setting):,} candidates, about "
        f"{predicted.seconds:.0f} s"
    )
    if any(step.outcome == "contradicts" for step in setting.checks):
        raise typer.Exit(3)


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
