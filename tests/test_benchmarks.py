"""The comparison of optimizers: its budgets are equal, and its tables say what was measured."""

from __future__ import annotations

import importlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

BATCHES = {"adam": 48, "gauss_newton, refined": 16, "pixels, no prior": 4, "cma": 12}
"""What each spends at a time: 12 candidates, or derivatives, or one step of each of 4 stages."""

MEASURED = [*BATCHES, "gauss_newton", "random"]


@pytest.fixture(scope="module")
def optimizers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("optimizers")


@pytest.fixture(scope="module")
def measured(optimizers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a quick run and its tables."""
    folder = tmp_path_factory.mktemp("optimizers")
    optimizers.main(
        path=folder / "results.json",
        task="digits",
        defense=["sparsify 90 %"],
        attacks=MEASURED,
        seeds=2,
        quick=True,
        output=folder / "tables.md",
    )
    return folder


def test_a_setting_of_threads_is_all_that_is_said_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    neighbours = importlib.import_module("neighbours")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.setenv("PATH", "somewhere")
    found = neighbours.environment("one thread")
    said = {name: value for name, value in found.items() if name.startswith(("OMP", "MKL", "GOMP"))}
    assert said == {"OMP_NUM_THREADS": "1"}
    assert found["PATH"] == "somewhere"


def outcomes(folder: Path) -> list[dict[str, Any]]:
    stored: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["outcomes"]
    return stored


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_evaluations_are_equal_to_a_batch(measured: Path) -> None:
    equal = [one for one in outcomes(measured) if one["cell"]["budget"] != "seconds"]
    assert len(equal) == len(MEASURED) * 2 * 2  # seeds, budgets
    for one in equal:
        left = one["cell"]["budget"] - one["evaluations"]
        assert 0 <= left < BATCHES.get(one["cell"]["attack"], 12), one["cell"]


def test_every_cell_has_its_row(measured: Path) -> None:
    found = rows((measured / "tables.md").read_text())
    heads = [row for row in found if row[0] == "defense"]
    assert len(heads) == 3  # two budgets of evaluations, one of seconds
    assert {len(row) for row in found} == {len(heads[0])}
    lines = [row for row in found if row[0] == "sparsify 90 %"]
    assert sorted(row[1] for row in lines) == sorted(MEASURED * 3)
    stored = outcomes(measured)
    for line, budget in zip(lines[:: len(MEASURED)], (120, 240, "seconds"), strict=True):
        psnr = [
            one["psnr"]
            for one in stored
            if (one["cell"]["attack"], one["cell"]["budget"]) == (line[1], budget)
        ]
        assert line[2].startswith(f"{np.mean(psnr):.1f} (")
        assert line[-1] == "2"


def test_what_is_missing_is_named(measured: Path) -> None:
    table = (measured / "tables.md").read_text()
    assert "bayesian" in table
    assert "bayesian" not in [row[1] for row in rows(table)]
    assert "cma behind none, sign, noise 0.1" in table


def test_results_render_again(optimizers: ModuleType, measured: Path) -> None:
    pytest.importorskip("matplotlib")
    again, picture = measured / "again.md", measured / "plot.svg"
    optimizers.main(source=measured / "results.json", output=again, picture=picture)
    assert again.read_text() == (measured / "tables.md").read_text()
    words = {text for element in ET.parse(picture).iter() if (text := element.text)}  # noqa: S314
    assert {*MEASURED} <= words


def test_what_is_measured_is_not_measured_again(
    optimizers: ModuleType, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured / "results.json"
    before = path.read_bytes()
    chosen = {"task": "digits", "defense": ["sparsify 90 %"], "attacks": ["cma"], "quick": True}
    monkeypatch.setattr(optimizers, "measure", None)
    optimizers.main(path=path, seeds=2, output=measured / "more.md", **chosen)
    assert path.read_bytes() == before


def test_evaluations_are_counted(optimizers: ModuleType) -> None:
    meter = optimizers.Meter()
    meter(12)
    meter(3)
    assert meter.evaluations == 15


def test_intervals_are_those_of_a_mean(optimizers: ModuleType) -> None:
    values = np.random.default_rng(0).normal(20, 3, size=400)
    mean, lower, upper = optimizers.interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (mean - lower, upper - mean) == pytest.approx((half, half), rel=0.1)


def test_an_image_is_identified_by_most_of_its_seeds(optimizers: ModuleType) -> None:
    cell = optimizers.Cell("digits", "none", 120, "cma", 0)
    seeds = [
        optimizers.Outcome(cell, 120, 1.0, [20.0] * 3, ranks)
        for ranks in ([1, 1, 2], [1, 2, 2], [5, 1, 1])
    ]
    assert optimizers.identified(seeds, 32).startswith("2/3 ")


def test_the_published_tables_are_those_of_the_published_results(optimizers: ModuleType) -> None:
    docs = BENCHMARKS.parent / "docs"
    results = optimizers.read_results(docs / "optimizers.json")
    published = (docs / "optimizers.md").read_text(encoding="utf-8")
    assert published.endswith("\n".join(optimizers.tables(results)) + "\n")
