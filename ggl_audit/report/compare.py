"""Sets two reports side by side."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggl_audit.report.model import Report
from ggl_audit.report.wording import RateRow, rate_rows


def render_comparison(first: Report, second: Report, console: Console) -> None:
    """Prints the grades, rates and findings of two reports next to each other."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("", "first", "second"):
        table.add_column(column)
    table.add_row("grade", first.verdict.grade, second.verdict.grade)
    for one, other in zip(rate_rows(first), rate_rows(second), strict=True):
        table.add_row(one.name, _figures(one), _figures(other))
    table.add_row("findings", _findings(first), _findings(second))
    console.print(table)


def _figures(row: RateRow) -> Text:
    if row.rate is None:
        return Text("not measured")
    rate = row.rate
    return Text(f"{rate.successes}/{rate.trials} ({rate.lower:.1%} - {rate.upper:.1%})")


def _findings(report: Report) -> str:
    return " ".join(finding.id for finding in report.findings) or "none"
