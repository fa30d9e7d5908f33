"""Renders a report as one self-contained HTML page: no scripts, no network, light and dark."""

from __future__ import annotations

import math

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ggl_audit.judgement.grade import in_words
from ggl_audit.report import wording
from ggl_audit.report.model import Report

PLOT_WIDTH, PLOT_HEIGHT = 560, 240
SHORTEST_AXIS = 0.01  # decades


def render_html(report: Report) -> str:
    """Fills in the page; every value that comes from outside is escaped by the template engine."""
    environment = Environment(
        loader=PackageLoader("ggl_audit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        in_words=in_words(report.verdict.grade, report.evidence.ceiling, report.verdict.question),
        answers=wording.answers(report),
        rates=wording.rate_rows(report),
        fidelity=wording.fidelity_rows(report),
        sentences=wording.captured,
        distances=wording.other_distances(report),
        privacy=wording.privacy(report),
        noise=wording.noise(report),
        experiments=wording.experiments(report),
        cost=wording.cost(report),
        plot=_plot(report),
        spec=yaml.safe_dump(report.spec, sort_keys=False),
    )


def _plot(report: Report) -> dict[str, object] | None:
    """The matching-loss curves in the coordinates of the drawing, losses on a logarithmic axis."""
    captured = report.captured
    # The pictures of one search have one curve.
    curves = [("capture", found.curve) for found in captured.reconstructions[:1]]
    curves += [("null", found.curve) for found in captured.nulls[:1]]
    points = [point for _, curve in curves for point in curve if point[1] > 0]
    if not points:
        return None
    most = max(evaluations for evaluations, _ in points)
    top = math.log10(max(loss for _, loss in points))
    bottom = min(math.log10(min(loss for _, loss in points)), top - SHORTEST_AXIS)

    def place(evaluations: int, loss: float) -> str:
        x = PLOT_WIDTH * evaluations / most
        y = PLOT_HEIGHT * (top - math.log10(max(loss, 10**bottom))) / (top - bottom)
        return f"{x:.1f},{y:.1f}"

    return {
        "width": PLOT_WIDTH,
        "height": PLOT_HEIGHT,
        "most": most,
        "top": f"{10**top:.3g}",
        "bottom": f"{10**bottom:.3g}",
        "lines": [(name, " ".join(place(*point) for point in curve)) for name, curve in curves],
    }
