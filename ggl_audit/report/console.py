"""Renders a report for the terminal, with the pictures drawn in it."""

from __future__ import annotations

from typing import Any

from PIL import Image
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich_pixels import HalfcellRenderer, Pixels

from ggl_audit.errors import printable
from ggl_audit.inputs.png_uri import picture
from ggl_audit.judgement.grade import in_words
from ggl_audit.report import wording
from ggl_audit.report.model import Captured, Report

GRADE_STYLE = {
    "A": "bold white on green4",
    "B": "bold white on dark_green",
    "C": "bold black on yellow3",
    "D": "bold white on dark_orange3",
    "F": "bold white on red3",
    "inconclusive": "bold white on grey42",
}
SEVERITY_STYLE = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "cyan"}
SHADES = " .:-=+*#%@"
MOST_PICTURES = 6
WIDEST_PICTURE = 32
BAR_WIDTH = 24


def render_console(report: Report, console: Console) -> None:
    """Prints a report.

    Pictures are drawn in half-height coloured cells where there are colours, and in shades of
    characters where there are none (``NO_COLOR``, a file, a CI log).
    """
    report = Report.model_validate(_visible(report.model_dump()))
    grade = report.verdict.grade
    badge = Text(f" {grade} ", style=GRADE_STYLE[grade])
    console.print()
    words = in_words(grade, report.evidence.ceiling, report.verdict.question)
    console.print(Text.assemble(badge, f"  {words}"))
    for sentence in (report.verdict.reason, *wording.answers(report)):
        console.print(Text(sentence))
    console.print()
    _print_pictures(report.captured, console)
    console.print(_rates(report))
    distances = wording.other_distances(report)
    if distances:
        console.print(Text(distances))
    console.print(Text(wording.privacy(report)))
    noise = wording.noise(report)
    if noise:
        console.print(Text(noise))
    console.print()
    for sentence in wording.captured(report.captured):
        console.print(Text(sentence))
    console.print()
    for other in report.others:
        labels = ", ".join(map(str, other.labels))
        console.print(Text(f"{other.file} (label {labels}, {other.label_method})", style="bold"))
        _print_pictures(other, console)
        for sentence in wording.captured(other):
            console.print(Text(sentence))
        console.print()
    for check in report.evidence.checks:
        console.print(Text(f"The capture and {check.step}: {check.outcome} ({check.detail})."))
    if report.evidence.checks:
        console.print()
    for finding in report.findings:
        style = SEVERITY_STYLE[finding.severity]
        head = f"[{style}]{finding.id} {finding.severity}[/]  [bold]{escape(finding.title)}[/]"
        console.print(head)
        console.print(f"  {escape(finding.detail)}")
        console.print(f"  [dim]Remedy:[/] {escape(finding.remedy)}")
    if report.findings:
        console.print()
    for sentence in wording.experiments(report):
        console.print(Text(sentence))
    if wording.experiments(report):
        console.print()
    console.print("[bold]Taken for granted[/]")
    for sentence in report.assumptions:
        console.print(f"- {escape(sentence)}")
    console.print()
    console.print(f"[dim]{escape(wording.cost(report))}[/]")


def _visible(value: Any) -> Any:
    """Makes control characters visible in every text of a report."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _visible(part) for key, part in value.items()}
    return [_visible(part) for part in value] if isinstance(value, (list, tuple)) else value


def _print_pictures(captured: Captured, console: Console) -> None:
    rows = [
        [("the private image", uri) for uri in captured.truths],
        [
            (f"out of the gradient (label {one.label})", one.image)
            for one in captured.reconstructions
        ],
        [("out of noise (null control)", one.image) for one in captured.nulls],
    ]
    if all(len(row) <= 1 for row in rows):
        rows = [[shown for row in rows for shown in row]]
    for row in filter(None, rows):
        _print_row(row[:MOST_PICTURES], console)
        if len(row) > MOST_PICTURES:
            console.print(Text(f"and {len(row) - MOST_PICTURES} more", style="dim"))
        console.print()


def _print_row(shown: list[tuple[str, str]], console: Console) -> None:
    width = max(8, min(WIDEST_PICTURE, (console.width - 2 * len(shown)) // len(shown)))
    grid = Table.grid(padding=(0, 2))
    for _ in shown:
        grid.add_column(width=width)
    grid.add_row(*(_draw(picture(uri), width, console) for _, uri in shown))
    grid.add_row(*(Text(title, style="dim") for title, _ in shown))
    console.print(grid)


def _draw(image: Image.Image, width: int, console: Console) -> RenderableType:
    times = max(1, width // image.width)
    size = (
        (image.width * times, image.height * times)
        if image.width <= width
        else (width, round(image.height * width / image.width))
    )
    if console.color_system is not None and not console.no_color:
        resized = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
        drawn: RenderableType = Pixels.from_image(resized, renderer=HalfcellRenderer())
        return drawn
    grey = image.convert("L").resize((size[0], size[1] // 2), Image.Resampling.BOX)
    values = list(grey.tobytes())
    rows = [values[i : i + grey.width] for i in range(0, len(values), grey.width)]
    lines = ["".join(SHADES[value * len(SHADES) // 256] for value in row) for row in rows]
    return Text("\n".join(lines), no_wrap=True)


def _rates(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("rate", justify="right")
    table.add_column("0 %" + " " * (BAR_WIDTH - 8) + "100 %", no_wrap=True)
    table.add_column("95 % interval", justify="right")
    table.add_column("PSNR", justify="right")
    reasons = []
    for row in wording.rate_rows(report):
        if row.rate is None:
            table.add_row(row.name, "-", "", "not measured", "")
            reasons.append(f"{row.name}: {row.not_measured}")
            continue
        rate = row.rate
        table.add_row(
            row.name,
            f"{rate.successes}/{rate.trials}",
            _bar(rate.lower, rate.rate, rate.upper, rate.chance),
            f"{rate.lower:.1%} - {rate.upper:.1%}",
            "" if row.psnr_db is None else f"{row.psnr_db:.1f} dB",
        )
    if reasons:
        table.caption = Text(f"Not measured: {'; '.join(reasons)}.")
        table.caption_justify = "left"
    return table


def _bar(lower: float, rate: float, upper: float, chance: float) -> Text:
    def cell(share: float) -> int:
        return min(BAR_WIDTH - 1, int(share * BAR_WIDTH))

    bar = ["·"] * BAR_WIDTH
    for index in range(cell(lower), cell(upper) + 1):
        bar[index] = "━"
    bar[cell(chance)] = "|"
    bar[cell(rate)] = "●"
    return Text("".join(bar))
