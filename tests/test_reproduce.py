"""A report's figures, had again from its own record; and what is told where they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ggl_audit import audit
from ggl_audit.audit import run_audit
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.report.formats import write_report
from ggl_audit.report.model import Report
from ggl_audit.report.reproduction import compare_runs
from ggl_audit.spec import Spec
from tests.conftest import SAMPLES, Counter

FEW = {
    "attack__evaluations": 39,
    "attack__method": "ggl",
    "evidence__matching_trials": 40,
    "evidence__reconstruction_trials": 6,
}


@pytest.fixture
def saved(sample: Callable[..., Spec], tmp_path: Path) -> Path:
    """A report beside a copy of the samples."""
    shutil.copytree(SAMPLES, tmp_path / "samples")
    path = tmp_path / "report.json"
    write_report(run_audit(sample("sparsified", **FEW), Counter()), path)
    return path


def reproduce(path: Path, *more: str) -> Result:
    arguments = ["reproduce", str(path), "-q", "--folder", str(path.parent / "samples"), *more]
    return CliRunner().invoke(app, arguments)


def test_a_report_is_had_again_from_its_own_record(saved: Path) -> None:
    again = saved.parent / "again.json"
    done = reproduce(saved, "-o", str(again))
    assert done.exit_code == 0, done.output
    assert "ceiling (matching): 40 of 40" in done.output
    assert "the same, pixel by pixel" in done.output
    assert "Different" not in done.output
    first, second = (Report.model_validate_json(p.read_text()) for p in (saved, again))
    assert first.evidence == second.evidence
    assert first.verdict == second.verdict


def test_the_files_are_found_beside_the_report_too_and_loaded_once(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = saved.parent / "samples" / "report.json"
    saved.rename(moved)
    prepared: list[Spec] = []

    def counted(spec: Spec) -> Case:
        prepared.append(spec)
        return prepare(spec)

    monkeypatch.setattr(audit, "prepare", counted)
    assert CliRunner().invoke(app, ["reproduce", str(moved), "-q"]).exit_code == 0
    assert len(prepared) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["verdict"].update(grade="A"), "the grade: A there"),
        (lambda r: r["evidence"]["ceiling"].update(successes=10), "10 of 40 there, 40 of 40 here"),
        (lambda r: r["findings"].clear(), "the findings: none there"),
    ],
)
def test_figures_that_cannot_be_had_again_are_named(saved: Path, change: Any, words: str) -> None:
    data = json.loads(saved.read_text())
    change(data)
    saved.write_text(json.dumps(data))
    done = reproduce(saved)
    assert done.exit_code == 1
    assert words in done.output


def test_missing_and_other_inputs_are_named(saved: Path) -> None:
    captured = saved.parent / "samples" / "captures" / "sparsified.safetensors"
    other = captured.with_name("undefended.safetensors")
    captured.write_bytes(other.read_bytes())
    done = reproduce(saved, "--threads", "1")
    assert done.exit_code == 2
    assert "is another file than the report's" in done.output
    captured.unlink()
    done = reproduce(saved)
    assert done.exit_code == 2
    assert "captures/sparsified.safetensors is in none of the folders" in done.output


def test_a_declaration_of_another_version_is_refused(saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["declaration"]["attack"]["of_the_future"] = 1
    saved.write_text(json.dumps(data))
    done = reproduce(saved)
    assert done.exit_code == 2
    assert "is none of this version (attack.of_the_future" in done.output


@pytest.mark.parametrize(
    ("successes", "trials", "near"),
    [(20, 20, True), (18, 20, True), (17, 20, False), (15, 16, True), (1, 16, False)],
)
def test_pictures_may_differ_by_what_another_machine_does(
    sample: Callable[..., Spec], successes: int, trials: int, near: bool
) -> None:
    """Two of 20 where they are searched for; with other trials, as far as the intervals meet."""
    report = run_audit(sample("undefended", **FEW), Counter())
    floor = report.evidence.floor
    assert floor is not None

    def with_floor(hits: int, count: int) -> Report:
        from ggl_audit.evidence.bounds import measure_rate

        rate = floor.model_copy(update=dict(measure_rate(hits, count, 1 / 32)))
        evidence = report.evidence.model_copy(update={"floor": rate})
        return report.model_copy(update={"evidence": evidence})

    found = compare_runs(with_floor(20, 20), with_floor(successes, trials))
    assert found.holds == near
    assert bool(found.within) == (near and (successes, trials) != (20, 20))
