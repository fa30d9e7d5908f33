"""Several processes: the same bits as one, and what becomes of those that die."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggl_audit.audit import run_audit
from ggl_audit.errors import AuditError, CannotGoOnError
from ggl_audit.spec import Spec
from tests.conftest import Counter
from tests.test_ledger import AUDITS, FEW, content

MORTAL = """
import multiprocessing, os, pathlib
import torch

from known import step as kept

HERE = pathlib.Path(__file__).parent


def step(model, images, labels, deaths, **keys):
    died = HERE / "died"
    count = len(died.read_text()) if died.exists() else 0
    if multiprocessing.parent_process() is not None and (HERE / "begun").exists():
        if count < deaths:
            died.write_text("x" * (count + 1))
            os._exit(9)
    return kept(model, images, labels, **keys)
"""


@pytest.mark.parametrize("name", ["sparsified", "noise"])
def test_two_workers_give_the_bits_of_one_process(
    sample: Callable[..., Spec], tmp_path: Path, name: str
) -> None:
    sample_name, keys = AUDITS[name]
    spec = sample(sample_name, **{**FEW, **keys})
    counter, ledger = Counter(), tmp_path / "audit.jsonl"
    shared = run_audit(spec, counter, workers=2, ledger=ledger)
    assert counter.done >= counter.planned  # and more where a cause is looked for
    assert content(shared) == content(run_audit(spec, Counter()))
    assert content(run_audit(spec, Counter(), ledger=ledger)) == content(shared)


@pytest.fixture
def mortal(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[[int], Spec]:
    """A client whose code ends its process so many times, in the trials of an audit."""
    known = Path(__file__).parent / "known_answers" / "clients.py"
    (tmp_path / "known.py").write_text(known.read_text())
    (tmp_path / "mortal.py").write_text(MORTAL)

    def declared(deaths: int) -> Spec:
        kwargs = {"bound": 1.0, "std": 1.0, "deaths": deaths}
        client = {"step": f"{tmp_path / 'mortal.py'}:step", "kwargs": kwargs}
        keys = {**FEW, "evidence__reconstruction_trials": 0, "evidence__truth": None}
        return sample("dp", client=client, **keys)

    return declared


class Begun(Counter):
    """From the first stage on, the client's code may die."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def stage(self, name: str) -> None:
        (self.folder / "begun").write_text("")
        super().stage(name)


def test_the_trials_of_a_dead_worker_are_run_again_and_said(
    mortal: Callable[[int], Spec], tmp_path: Path
) -> None:
    progress = Begun(tmp_path)
    report = run_audit(mortal(1), progress, workers=2)
    assert [said for said in progress.said if "a worker died in trials" in said]
    assert "exit code 9); they are run again" in progress.said[0]
    (tmp_path / "begun").unlink()
    assert content(report) == content(run_audit(mortal(1), Counter()))


def test_trials_that_kill_twice_end_the_audit(
    mortal: Callable[[int], Spec], tmp_path: Path
) -> None:
    with pytest.raises(CannotGoOnError, match=r"has died twice in trials \d+ to \d+ of matching"):
        run_audit(mortal(10**6), Begun(tmp_path), workers=2)


def test_what_is_wrong_in_a_worker_is_told_in_a_sentence(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    code = """
import multiprocessing, pathlib


def step(model, images, labels, **keys):
    if multiprocessing.parent_process() is not None and (
        pathlib.Path(__file__).parent / "begun"
    ).exists():
        raise RuntimeError("no more")
    from known import step as kept
    return kept(model, images, labels, **keys)
"""
    known = Path(__file__).parent / "known_answers" / "clients.py"
    (tmp_path / "known.py").write_text(known.read_text())
    (tmp_path / "own.py").write_text(code)
    client: dict[str, Any] = {
        "step": f"{tmp_path / 'own.py'}:step", "kwargs": {"bound": 1.0, "std": 1.0},
    }  # fmt: skip
    spec = sample("dp", client=client, **{**FEW, "evidence__truth": None})
    with pytest.raises(AuditError, match="failed with RuntimeError: no more"):
        run_audit(spec, Begun(tmp_path), workers=2)


def test_an_interrupt_is_graded_for_what_is_there(sample: Callable[..., Spec]) -> None:
    report = run_audit(sample("undefended", **FEW), Counter(1500), workers=2)
    assert report.verdict.exit_code == 3
    assert "cut short" in report.verdict.reason
    assert report.evidence.ceiling is not None


def test_a_hung_group_loses_nothing_of_the_others(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    """Trials that cannot end early are kept as they are done, whatever those before them do."""
    code = """
import multiprocessing, os, pathlib, time

from known import step as kept

HERE = pathlib.Path(__file__).parent


def step(model, images, labels, **keys):
    if multiprocessing.parent_process() is not None and (HERE / "begun").exists():
        try:
            os.close(os.open(HERE / "hung", os.O_CREAT | os.O_EXCL))
            time.sleep(1000)
        except FileExistsError:
            pass
    return kept(model, images, labels, **keys)
"""
    known = Path(__file__).parent / "known_answers" / "clients.py"
    (tmp_path / "known.py").write_text(known.read_text())
    (tmp_path / "hanging.py").write_text(code)
    client = {"step": f"{tmp_path / 'hanging.py'}:step", "kwargs": {"bound": 1.0, "std": 1.0}}
    keys = {**FEW, "evidence__matching_trials": 75, "evidence__truth": None}
    spec = sample("dp", client=client, **{**keys, "evidence__reconstruction_trials": 0})
    progress = Begun(tmp_path)
    progress.interrupt_at = 2 * 25 * 33 + 1
    report = run_audit(spec, progress, workers=2)
    (matching,) = (one for one in report.experiments if one.name == "matching")
    assert matching.trials == 50
    assert report.verdict.grade not in ("A", "B")
