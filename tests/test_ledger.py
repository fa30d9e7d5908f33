"""The ledger: outcomes depend on their own trial alone, and nothing of them is lost."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

from ggl_audit import audit
from ggl_audit.audit import judge_ledger, load_experiments, run_audit
from ggl_audit.basics.clock import Clock
from ggl_audit.errors import InputError
from ggl_audit.experiments.experiment import Group, Plan
from ggl_audit.experiments.ledger import Outcome
from ggl_audit.experiments.schedule import run_group
from ggl_audit.report.assembly import assemble
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import SAMPLES, SMALL, Counter

CLIENT = f"{Path(__file__).parent / 'known_answers' / 'clients.py'}:step"

FEW = {
    "attack__evaluations": 26,
    "attack__steps": 2,
    "evidence__matching_trials": 60,
    "evidence__reconstruction_trials": 12,
    "evidence__control_trials": 3,
}

OWN_CODE = {
    "client": {"step": CLIENT, "kwargs": {"bound": 1.0, "std": 1.0}, "batch_size": 2},
    "guarantee": {
        "unit": "sample", "reduction": "mean", "rounds": 1, "sampling_rate": 1, "delta": 1e-5,
    },
    "memory": 4,
}  # fmt: skip

AUDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsified": ("sparsified", {}),
    "noise": ("noise", {"attack__optimizer": "cma"}),
    "the client's own code": ("dp", {**OWN_CODE, "evidence__truth": None}),
    "a batch": (
        "undefended",
        {
            "capture__batch_size": 3,
            "evidence__truth": None,
            "evidence__matching_trials": 30,
            "evidence__reconstruction_trials": 2,
        },
    ),
    "another optimizer": ("undefended", {"attack__optimizer": "nevergrad:DE"}),
}


def content(report: Report) -> dict[str, object]:
    """All of a report but what it took."""
    told = report.model_dump(exclude={"cost"})
    for one in told["experiments"]:
        del one["seconds"]
    return told


def nobody(_evaluations: int) -> None:
    """Nobody is told."""


def results_of(outcomes: list[Outcome]) -> dict[tuple[str, int], object]:
    return {(one.experiment, one.trial): one.result for one in outcomes}


@pytest.mark.parametrize("name", AUDITS)
def test_an_outcome_depends_on_no_other_group(sample: Callable[..., Spec], name: str) -> None:
    """All groups in their order, and each alone or after others, by newly made experiments."""
    sample_name, keys = AUDITS[name]
    spec = sample(sample_name, **{**FEW, **keys})
    experiments = load_experiments(spec)
    groups = [
        Group(own, trials)
        for own, one in experiments.items()
        for plan in (one.plan(),)
        if isinstance(plan, Plan) and not one.explains
        for trials in plan.groups()
    ]
    assert len({group.experiment for group in groups}) >= 3
    assert len(groups) > len({group.experiment for group in groups})
    clock = Clock()
    in_order = results_of(
        [o for g in groups for o in run_group(experiments[g.experiment], g, nobody, clock)]
    )
    again = load_experiments(spec)
    shuffled = random.Random(0).sample(groups, len(groups))[: -len(groups) // 4]
    for group in shuffled:
        for key, result in results_of(
            run_group(again[group.experiment], group, nobody, clock)
        ).items():
            assert result == in_order[key], key


def test_a_trial_is_the_same_whatever_else_is_declared(sample: Callable[..., Spec]) -> None:
    """Neither how many trials there are, nor other experiments, decide what comes out of it."""
    few = sample("noise", **FEW)
    more = sample("noise", **{**FEW, "evidence__matching_trials": 100, "evidence__truth": None})
    clock, group = Clock(), Group("matching", range(25))
    found = [
        results_of(run_group(load_experiments(spec)["matching"], group, nobody, clock))
        for spec in (few, more)
    ]
    assert found[0] == found[1]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, nothing can evaluate a model."""

    def forbid() -> None:
        def called(*_: object, **__: object) -> None:
            raise AssertionError("a model was evaluated after judgement had begun")

        monkeypatch.setattr(nn.Module, "__call__", called)
        monkeypatch.setattr(torch.func, "functional_call", called)
        monkeypatch.setattr("ggl_audit.inputs.model.ClientModel.logits", called)
        monkeypatch.setattr("ggl_audit.inputs.model.ClientModel.representation", called)
        monkeypatch.setattr("ggl_audit.priors.prior.Prior.decode", called)

    return forbid


def test_judgement_evaluates_nothing(
    sample: Callable[..., Spec],
    monkeypatch: pytest.MonkeyPatch,
    no_model: Callable[[], None],
    tmp_path: Path,
) -> None:
    """Neither in an audit, nor from its ledger alone, which gives the same report."""

    def assembled(*args: Any, **keys: Any) -> Report:
        no_model()
        with pytest.raises(AssertionError, match="after judgement had begun"):
            nn.Linear(1, 1)(torch.zeros(1))
        return assemble(*args, **keys)

    monkeypatch.setattr(audit, "assemble", assembled)
    ledger = tmp_path / "audit.jsonl"
    report = run_audit(sample("sparsified", **FEW), Counter(), ledger=ledger)
    assert report.captured.reconstructions[0].metrics is not None
    assert content(judge_ledger(ledger)) == content(report)


@pytest.mark.parametrize("interrupt_at", [1, 900, 4000])
def test_an_interrupted_audit_goes_on(
    sample: Callable[..., Spec], tmp_path: Path, interrupt_at: int
) -> None:
    spec, ledger = sample("sparsified", **FEW), tmp_path / "audit.jsonl"
    whole = run_audit(spec, Counter())
    cut = run_audit(spec, Counter(interrupt_at), ledger=ledger)
    assert "cut short" in cut.verdict.reason
    counter = Counter()
    resumed = run_audit(spec, counter, ledger=ledger)
    assert content(resumed) == content(whole)
    assert counter.done >= counter.planned  # and more where a cause is looked for
    assert any("goes on from there" in said for said in counter.said)
    again = Counter()
    assert content(run_audit(spec, again, ledger=ledger)) == content(whole)
    assert again.stages == []  # nothing was left to do


def test_a_torn_last_line_is_dropped_and_said(sample: Callable[..., Spec], tmp_path: Path) -> None:
    spec, ledger = sample("undefended", **FEW), tmp_path / "audit.jsonl"
    whole = run_audit(spec, Counter(), ledger=ledger)
    content_of_file = ledger.read_bytes()
    lines = content_of_file.splitlines(keepends=True)
    for kept in (len(lines) - 1, 40, 2, 1, 0):
        ledger.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        counter = Counter()
        assert content(run_audit(spec, counter, ledger=ledger)) == content(whole)
        assert "torn" in counter.said[0]
        rows = ledger.read_bytes().splitlines()
        assert len(rows) == len(lines)
        assert all(json.loads(row) for row in rows)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"gate__fail_on": "F"}, 'gate.fail_on is "C" there, "F" here'),
        ({"attack__steps": 3}, "attack.steps is 2 there, 3 here"),
        ({"defense": [{"name": "clip", "bound": 100.0}]}, "defense is"),
        ({"time_limit": 1000}, "a time limit: False there, True here"),
    ],
)
def test_a_ledger_of_another_audit_is_refused(
    sample: Callable[..., Spec], tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    ledger = tmp_path / "audit.jsonl"
    run_audit(sample("undefended", **FEW), Counter(500), ledger=ledger)
    with pytest.raises(InputError, match=f"ledger of another audit: {words}"):
        run_audit(sample("undefended", **{**FEW, **keys}), Counter(), ledger=ledger)


def test_the_length_of_a_time_limit_may_change(sample: Callable[..., Spec], tmp_path: Path) -> None:
    ledger = tmp_path / "audit.jsonl"
    run_audit(sample("undefended", time_limit=500, **FEW), Counter(1500), ledger=ledger)
    counter = Counter()
    run_audit(sample("undefended", time_limit=600, **FEW), counter, ledger=ledger)
    assert "goes on from there" in counter.said[0]


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    change(header)
    path.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(version="0.0.1"), "ggl-audit: 0.0.1 there"),
        (lambda h: h.update(torch="1.0"), "PyTorch: 1.0 there"),
        (lambda h: h.update(device="a GPU"), "the device: a GPU there, cpu here"),
        (
            lambda h: h["inputs"].update({"captures/undefended.safetensors": "0"}),
            "the content of captures/undefended.safetensors",
        ),
    ],
)
def test_a_ledger_of_other_versions_or_inputs_is_refused(
    sample: Callable[..., Spec], tmp_path: Path, change: Any, words: str
) -> None:
    spec, ledger = sample("undefended", **FEW), tmp_path / "audit.jsonl"
    run_audit(spec, Counter(500), ledger=ledger)
    changed(ledger, change)
    before = ledger.read_bytes()
    with pytest.raises(InputError, match=f"ledger of another audit: {words}"):
        run_audit(spec, Counter(), ledger=ledger)
    assert ledger.read_bytes() == before


def test_what_is_no_ledger_is_refused_and_left_alone(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    for text in ("", "{}\n", "text", '{"ledger": 2}\n{}\n', '{"ledger":1,"version":"0"}\nx\n'):
        path = tmp_path / "other.jsonl"
        path.write_text(text)
        if text:
            with pytest.raises(InputError, match="is no ledger"):
                run_audit(sample("undefended", **FEW), Counter(), ledger=path)
            assert path.read_text() == text
        with pytest.raises(InputError, match="is no ledger"):
            judge_ledger(path)
    with pytest.raises(InputError, match="there is no folder"):
        run_audit(sample("undefended", **FEW), Counter(), ledger=tmp_path / "none" / "x.jsonl")


def test_an_outcome_that_was_changed_is_refused(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    spec, ledger = sample("undefended", **FEW), tmp_path / "audit.jsonl"
    run_audit(spec, Counter(1500), ledger=ledger)
    good = ledger.read_text().splitlines()
    for wrong in ("{}", "[1]", '"x"', good[2].replace('"hit":', '"his":'), "[" * 10000):
        ledger.write_text("\n".join([*good[:2], wrong, *good[3:]]) + "\n")
        with pytest.raises(InputError, match="line 3 is no outcome"):
            run_audit(spec, Counter(), ledger=ledger)


def test_two_audits_cannot_write_one_ledger(sample: Callable[..., Spec], tmp_path: Path) -> None:
    ledger = tmp_path / "audit.jsonl"
    with (
        FileLock(f"{ledger}.lock"),
        pytest.raises(InputError, match="another audit is writing this ledger"),
    ):
        run_audit(sample("undefended", **FEW), Counter(), ledger=ledger)
    assert not ledger.exists()


def command(spec: str, ledger: Path, report: Path, keys: Mapping[str, Any] = FEW) -> list[str]:
    """An audit as a program of its own."""
    declared = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
    sets = [f"--set={key}={value}" for key, value in declared.items()]
    program = [sys.executable, "-m", "ggl_audit", "run", str(SAMPLES / f"digits_{spec}.yaml")]
    return [*program, "-q", f"--ledger={ledger}", f"--output={report}", *sets]


def test_a_killed_audit_goes_on_to_the_same_report(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    """Killed whenever its ledger has grown by some more lines, as often as it takes."""
    ledger, path = tmp_path / "audit.jsonl", tmp_path / "report.json"
    kills = 0
    for lines in (3, 60, 105):
        process = subprocess.Popen(command("sparsified", ledger, path))
        while process.poll() is None:
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
        assert not path.exists()
    assert kills == 3
    done = subprocess.run(command("sparsified", ledger, path), check=False, capture_output=True)
    assert done.returncode in (0, 1), done.stderr
    whole = run_audit(sample("sparsified", **FEW), Counter())
    assert content(Report.model_validate_json(path.read_text())) == content(whole)


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
sys.argv = ["ggl-audit", *sys.argv[1:]]
runpy.run_module("ggl_audit", run_name="__main__")
"""


def test_a_full_disk_ends_with_a_message_and_a_whole_ledger(tmp_path: Path) -> None:
    ledger, path = tmp_path / "audit.jsonl", tmp_path / "report.json"
    arguments = command("undefended", ledger, path)[3:]
    code = LIMITED.format(bytes=20_000)
    full = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True
    )
    assert full.returncode == 3, full.stderr
    assert "the ledger cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    lines = ledger.read_text().splitlines()
    assert len(lines) > 30
    assert all(json.loads(line) for line in lines)
    assert ledger.read_bytes().endswith(b"\n")
    assert not path.exists()
    done = subprocess.run(command("undefended", ledger, path), check=False, capture_output=True)
    assert done.returncode in (0, 1)


def test_groups_are_by_number() -> None:
    groups = Plan(trials=23, together=10).groups()
    assert list(itertools.chain(*groups)) == list(range(23))
    assert [len(group) for group in groups] == [10, 10, 3]


class SlowClock(Clock):
    """Its time is up at once, when so many candidates are through."""

    def __init__(self, counter: Counter, candidates: int) -> None:
        super().__init__(1e6)
        self.counter, self.candidates = counter, candidates

    @property
    def seconds(self) -> float:
        return 0.0 if self.counter.done < self.candidates else 1e9


@pytest.mark.parametrize("candidates", [900, 2010, 2300])
def test_no_pass_rests_on_what_the_time_left_nothing_of(
    sample: Callable[..., Spec], candidates: int
) -> None:
    """The ceiling is low; its control, the noise, the promise, the capture or canaries lack."""
    few = {**FEW, "evidence__matching_trials": 100, "evidence__public": ["label"]}
    keys = {**few, **OWN_CODE, "evidence__truth": None}
    spec = sample("dp", **{**keys, "client": {**OWN_CODE["client"], "batch_size": 1}})
    assert run_audit(spec, Counter()).verdict.grade in ("A", "B")
    counter = Counter()
    report = run_audit(
        spec.model_copy(update={"time_limit": 1e6}), counter, SlowClock(counter, candidates)
    )
    assert report.verdict.grade not in ("A", "B")
    assert report.verdict.exit_code == 3


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_ledger_that_breaks_off_is_no_pass(
    sample: Callable[..., Spec], tmp_path: Path, kept: int
) -> None:
    """Also where trials may end early, but did not have to."""
    ledger = tmp_path / "audit.jsonl"
    keys = {**FEW, "evidence__stop_early": True, "evidence__control_trials": 0}
    keys["evidence__public"] = ["label"]
    whole = run_audit(sample("dp", **keys), Counter(), ledger=ledger)
    assert judge_ledger(ledger).verdict == whole.verdict
    lines = ledger.read_text().splitlines(keepends=True)
    canaries = [line for line in lines if '"experiment":"reconstruction"' in line]
    cut = [line for line in lines if line not in canaries[kept:]]
    ledger.write_text("".join(cut))
    verdict = judge_ledger(ledger).verdict
    assert verdict.grade not in ("A", "B")
    assert verdict.exit_code == 3


def test_only_planned_trials_count_and_each_once(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    spec, ledger = sample("undefended", **FEW), tmp_path / "audit.jsonl"
    run_audit(spec, Counter(), ledger=ledger)
    good = ledger.read_text()
    row = json.loads(good.splitlines()[2])
    for change in (
        {"trial": 0}, {"trial": -1}, {"trial": 1000}, {"experiment": "membership", "trial": 0},
    ):  # fmt: skip
        ledger.write_text(good + json.dumps({**row, **change}) + "\n")
        with pytest.raises(InputError, match=r"is of trial|is no outcome"):
            judge_ledger(ledger)
        with pytest.raises(InputError, match=r"is of trial|is no outcome"):
            run_audit(spec, Counter(), ledger=ledger)
    rows = good.splitlines()
    for change in ({"evaluations": -1}, {"seconds": float("inf")}):
        ledger.write_text("\n".join([*rows[:2], json.dumps({**row, **change}), *rows[3:]]) + "\n")
        with pytest.raises(InputError, match="line 3 is no outcome"):
            judge_ledger(ledger)


def test_code_that_the_users_code_imports_is_an_input(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    """A finished ledger does not hide that it was changed."""
    known = Path(__file__).parent / "known_answers" / "clients.py"
    (tmp_path / "inner.py").write_text(known.read_text())
    (tmp_path / "own.py").write_text("from inner import step\n")
    kwargs = {"bound": 1.0, "std": 1.0}
    keys = {**FEW, "evidence__reconstruction_trials": 0, "evidence__truth": None}
    spec = sample("dp", client={"step": f"{tmp_path / 'own.py'}:step", "kwargs": kwargs}, **keys)
    ledger = tmp_path / "audit.jsonl"
    report = run_audit(spec, Counter(1500), ledger=ledger)
    assert str(tmp_path / "inner.py") in [file.path for file in report.inputs]
    (tmp_path / "inner.py").write_text(known.read_text() + "\n# changed\n")
    with pytest.raises(InputError, match=r"the content of .*inner\.py"):
        run_audit(spec, Counter(), ledger=ledger)


def test_a_foreign_file_is_left_alone(sample: Callable[..., Spec], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"ledger":"my own precious data"}\n')
    with pytest.raises(InputError, match="is no ledger"):
        run_audit(sample("undefended", **FEW), Counter(), ledger=path)
    assert path.read_text() == '{"ledger":"my own precious data"}\n'
    with pytest.raises(InputError, match="is no ledger"):
        run_audit(sample("undefended", **FEW), Counter(), ledger=Path("/dev/null"))


def test_a_link_to_a_ledger_has_the_same_lock(sample: Callable[..., Spec], tmp_path: Path) -> None:
    ledger, link = tmp_path / "audit.jsonl", tmp_path / "link.jsonl"
    run_audit(sample("undefended", **FEW), Counter(1500), ledger=ledger)
    link.symlink_to(ledger)
    with (
        FileLock(f"{ledger.resolve()}.lock"),
        pytest.raises(InputError, match="another audit is writing"),
    ):
        run_audit(sample("undefended", **FEW), Counter(), ledger=link)
