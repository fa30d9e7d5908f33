from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ggl_audit.audit import plan_experiments, run_audit
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import AuditError, InputError
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.inputs.images import read_image
from ggl_audit.inputs.png_uri import picture, png_uri
from ggl_audit.report.compare import render_comparison
from ggl_audit.report.console import render_console
from ggl_audit.report.formats import check_outputs, read_report, render_json, write_report
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Reconstruction, Report
from ggl_audit.report.wording import answers
from ggl_audit.spec import Spec
from tests.conftest import Counter

HOSTILE = "<script>alert('x')</script>&\"'"


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {}


@pytest.fixture
def report(reports: dict[str, Report], sample: Callable[..., Spec]) -> Report:
    if "sparsified" not in reports:
        reports["sparsified"] = run_audit(sample("sparsified"), Counter())
    return reports["sparsified"]


def test_the_report_survives_json(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    assert read_report(path) == report

    def finite(value: object) -> None:
        assert not isinstance(value, float) or math.isfinite(value)
        for part in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        ):
            finite(part)

    data = json.loads(path.read_text())
    finite(data)
    assert data["schema_version"] == 1
    assert set(data) == {
        "schema_version", "tool", "verdict", "captured", "others", "evidence", "findings",
        "assumptions", "experiments",
        "cost", "inputs", "environment", "spec", "declaration",
    }  # fmt: skip
    assert set(data["evidence"]["ceiling"]) >= {
        "successes", "trials", "rate", "lower", "upper", "chance",
    }  # fmt: skip


def test_inputs_are_named_as_declared_and_not_by_this_machine(report: Report) -> None:
    assert [Path(file.path).is_absolute() for file in report.inputs] == [False] * 7
    weights = Path(__file__).parents[2] / "gan_weights" / "digits" / "generator.safetensors"
    digests = {file.path: file.sha256 for file in report.inputs}
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digests["gan_weights/digits/generator.safetensors"] == expected


def test_nothing_that_was_not_measured_is_a_number(sample: Callable[..., Spec]) -> None:
    spec = sample(
        "sparsified",
        evidence__truth=None,
        evidence__matching_trials=0,
        evidence__reconstruction_trials=0,
    )
    report = run_audit(spec, Counter())
    evidence = report.evidence
    assert report.verdict.grade == "inconclusive"
    assert evidence.floor is evidence.ceiling is evidence.label is evidence.empirical_mu is None
    assert evidence.controls.null is evidence.controls.undefended is evidence.guarantee is None
    assert set(evidence.not_measured) == {
        "ceiling", "floor", "controls.null", "controls.undefended", "label", "guarantee",
        "label_ceiling",
        "controls.undefended_matching", "promise", "membership", "noise",
    }  # fmt: skip
    assert all(evidence.not_measured.values())
    found = report.captured.reconstructions[0]
    assert found.rank is found.metrics is found.matching_rank is None
    assert "truths" in report.captured.not_measured
    text = shown(report)
    assert "not measured" in text
    assert "safe" not in text.lower()


def test_without_canaries_the_picture_that_matches_best_is_shown(
    sample: Callable[..., Spec],
) -> None:
    """The latent search has hardly begun; the attack on pixels ends near the image."""
    spec = sample(
        "undefended",
        attack__evaluations=13,
        attack__steps=150,
        evidence__matching_trials=0,
        evidence__reconstruction_trials=0,
    )
    report = run_audit(spec, Counter())
    captured = report.captured
    assert set(captured.by_attack) == {"ggl", "refined", "pixels"}
    shown = captured.reconstructions[0]
    assert captured.attack != "ggl"
    assert shown.image == captured.by_attack[captured.attack][0]
    assert shown.image != captured.by_attack["ggl"][0]
    assert "the best matching distance" in render_html(report)
    assert "the strongest on the canaries" not in render_html(report)


def test_the_same_seed_gives_the_same_report_and_another_another(
    report: Report, sample: Callable[..., Spec]
) -> None:
    def content(of: Report) -> dict[str, object]:
        return of.model_dump(exclude={"cost", "spec", "experiments"})

    assert content(run_audit(sample("sparsified"), Counter())) == content(report)
    other = run_audit(sample("sparsified", seed=1), Counter())
    assert other.captured.reconstructions[0].image != report.captured.reconstructions[0].image


def test_the_planned_evaluations_are_those_that_happen(sample: Callable[..., Spec]) -> None:
    for name, overrides in (
        ("sparsified", {}),
        ("undefended", {"attack__restarts": 3}),
        ("undefended", {"capture__batch_size": 3, "evidence__truth": None}),
        ("noise", {"evidence__control_trials": 9, "attack__evaluations": 47}),
        ("sign", {"attack__optimizer": "adam", "attack__method": "ggl"}),
    ):
        spec = sample(name, **overrides)
        counter = Counter()
        report = run_audit(spec, counter)
        assert counter.planned == counter.done == report.cost.evaluations
        plans = {one.name: one.plan() for one in plan_experiments(prepare(spec))}
        assert counter.planned == planned_evaluations(plans)


def test_pictures_are_stored_without_loss() -> None:
    image = torch.randint(0, 256, (3, 9, 7)) / 255
    stored = np.asarray(picture(png_uri(image))) / 255
    np.testing.assert_allclose(stored, image.permute(1, 2, 0).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="not a PNG"):
        picture("data:text/html;base64,xx")


def test_the_truth_in_the_report_is_the_private_picture(report: Report, samples: Path) -> None:
    truth = read_image(samples / "captures" / "private.png", (1, 16, 16))
    assert report.captured.truths == [png_uri(truth)]


def shown(report: Report, *, colour: bool = False, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        no_color=not colour,
    )
    render_console(report, console)
    return stream.getvalue()


def test_the_terminal_shows_grade_reason_pictures_rates_and_findings(report: Report) -> None:
    text = " ".join(shown(report).split())
    for sentence in (report.verdict.reason, *answers(report)):
        assert sentence in text
    for word in ("the private image", "out of the gradient", "null control", "ceiling", "Remedy"):
        assert word in text
    for finding in report.findings:
        assert finding.id in text
    assert f"{report.evidence.ceiling.successes}/{report.evidence.ceiling.trials}" in text


def test_pictures_need_no_colour_and_use_it_where_it_is(report: Report) -> None:
    plain, coloured = shown(report), shown(report, colour=True)
    assert "\x1b[" not in plain
    assert sum(line.count("@") for line in plain.splitlines()[4:20]) > 10
    assert "\x1b[38;2;255;255;255" in coloured or "\x1b[38;2;25" in coloured
    assert "▄" in coloured or "▀" in coloured


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_report_keeps_to_the_width(report: Report, width: int) -> None:
    assert max(map(len, shown(report, width=width).splitlines())) <= width


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_complete(report: Report) -> None:
    page = Page(render_html(report))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert "link" not in names
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3 + 3  # the truth, the strongest attack and its null; each attack
    assert all(source and source.startswith("data:image/png;base64,") for source in pictures)
    assert names.count("polyline") == 2
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    text = " ".join(page.text.split())
    assert report.verdict.reason in text
    for sentence in (*answers(report), *report.assumptions):
        assert sentence in text
    assert "prefers-color-scheme: dark" in page.text


def test_what_comes_from_outside_is_escaped(report: Report) -> None:
    spec = {**report.spec, "model": {**report.spec["model"], "factory": HOSTILE}}
    evil = report.model_copy(
        update={
            "spec": spec,
            "assumptions": [HOSTILE, "\x1b[2Jgone [bold]markup[/bold]"],
            "inputs": [report.inputs[0].model_copy(update={"path": HOSTILE})],
            "verdict": report.verdict.model_copy(
                update={
                    "reason": HOSTILE,
                    "answers": [
                        one.model_copy(update={"reason": f"{HOSTILE} \x1b[2Jgone"})
                        for one in report.verdict.answers
                    ],
                }
            ),
        }
    )
    page = render_html(evil)
    assert "<script" not in page
    assert Page(page).text.count("<script>alert") >= 4
    terminal = shown(evil)
    assert "\x1b" not in terminal
    assert "[bold]markup[/bold]" in terminal


def test_outputs_are_checked_before_the_audit(tmp_path: Path) -> None:
    check_outputs([tmp_path / "x.html", tmp_path / "x.json"])
    with pytest.raises(AuditError, match=r"unknown format '\.pdf'"):
        check_outputs([tmp_path / "x.pdf"])
    with pytest.raises(AuditError, match="no folder"):
        check_outputs([tmp_path / "none" / "x.json"])


def test_a_file_that_is_no_report_is_refused(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (
        "",
        "{}",
        "[1]",
        render_json(report).replace('"schema_version": 1', '"schema_version": 2'),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match="not a report of schema version 1"):
            read_report(path)


def test_a_failed_write_leaves_nothing_behind(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_report(report, path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "the old one"


def test_two_reports_side_by_side(report: Report) -> None:
    stream = io.StringIO()
    render_comparison(report, report, Console(file=stream, width=100))
    text = stream.getvalue()
    assert text.count(report.verdict.grade) >= 2
    assert "GGL003 GGL002" in text


def test_a_picture_of_another_shape_is_drawn(report: Report) -> None:
    wide = png_uri(torch.rand(3, 30, 90))
    found = report.captured.reconstructions[0].model_copy(update={"image": wide})
    odd = report.model_copy(
        update={"captured": report.captured.model_copy(update={"reconstructions": [found]})}
    )
    assert "▄" in shown(odd, colour=True)
    assert isinstance(picture(wide), Image.Image)


def release_of(report: Report, images: int, held: bool) -> Report:
    """The same report as if the release were of so many images."""
    captured = report.captured

    def of_each(found: Reconstruction) -> list[Reconstruction]:
        return [
            found.model_copy(
                update={
                    "image": png_uri(torch.full((1, 16, 16), (place + 1) / 20)),
                    "label": place,
                    "truth": place if held else None,
                    "rank": 1 + place % 2 if held else None,
                    "matching_rank": 1 if held else None,
                    "candidates": 32 if held else None,
                    "metrics": None
                    if not held or found.metrics is None
                    else found.metrics.model_copy(update={"mse": float(place)}),
                }
            )
            for place in range(images)
        ]

    changed = {
        "labels": list(range(images)),
        "truths": captured.truths * images if held else [],
        "reconstructions": of_each(captured.reconstructions[0]),
        "nulls": of_each(captured.nulls[0]),
    }
    return report.model_copy(update={"captured": captured.model_copy(update=changed)})


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("images", [2, 8])
def test_each_of_several_pictures_stands_with_its_truth(
    report: Report, images: int, held: bool
) -> None:
    several = release_of(report, images, held)
    page = Page(render_html(several))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    captured = several.captured
    found = [one.image for one in (*captured.reconstructions, *captured.nulls)]
    by_attack = [uri for pictures in captured.by_attack.values() for uri in pictures]
    assert sources == [*captured.truths, *found, *by_attack]
    assert [tag for tag, _ in page.tags].count("polyline") == 2
    text = " ".join(page.text.split())
    terminal = " ".join(shown(several, width=200).split())
    for place in range(images):
        assert f"label {place}" in text
    drawn = min(images, 6) if held else 0
    assert terminal.count("the private image") == drawn + 1  # and the check against it
    assert ("and 2 more" in terminal) == (images == 8)
    if held:
        ranks = f"by matching {images} of {images} rank first, by the reconstructions {images // 2}"
        assert ranks in text
        assert ranks in terminal
        assert f"MSE{(images - 1) / 2:.4g}" in "".join(page.text.split())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["findings"][0].update(id="GGL001[/nope]"),
        lambda r: r["captured"].update(truths=["http://example.org/x.png"]),
        lambda r: r["captured"].update(truths=["data:image/png;base64,AAAA"]),
        lambda r: r["evidence"]["ceiling"].update(chance=1),
        lambda r: r["evidence"]["ceiling"].update(upper=9),
        lambda r: r["captured"]["reconstructions"][0].update(curve=[[0, 1.0]]),
    ],
)
def test_a_hostile_report_is_refused(report: Report, tmp_path: Path, change: Any) -> None:
    data = json.loads(render_json(report))
    change(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not a report of schema version 1"):
        read_report(path)


@pytest.mark.parametrize("interrupt_at", [1, 700, 1400, 2000, 2500])
def test_an_interrupt_anywhere_gives_a_partial_report(
    sample: Callable[..., Spec], interrupt_at: int
) -> None:
    report = run_audit(sample("sparsified"), Counter(interrupt_at))
    assert report.verdict.exit_code == 3
    assert report.verdict.grade not in ("A", "B")
    assert "cut short" in report.verdict.reason
    evidence = report.evidence
    for part in ("floor", "ceiling", "label"):
        assert (getattr(evidence, part) is None) == (part in evidence.not_measured)
    for part in ("null", "undefended", "undefended_matching"):
        missing = f"controls.{part}" in evidence.not_measured
        assert (getattr(evidence.controls, part) is None) == missing
    assert "cut short" in " ".join(evidence.not_measured.values())
    assert "not measured" in shown(report)
    assert "Not measured" in render_html(report)
