"""Several captures of one round in one audit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from ggl_audit.audit import EXPERIMENTS, plan_experiments, run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import InputError, SpecError
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.ledger_file import read_outcomes
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.judgement.declared import Declared
from ggl_audit.judgement.unmeasured import lacking
from ggl_audit.report.console import render_console
from ggl_audit.report.html import render_html
from ggl_audit.spec import Spec
from tests.conftest import Counter

FEW = {
    "attack.evaluations": 300,
    "attack.steps": 12,
    "evidence.matching_trials": 40,
    "evidence.reconstruction_trials": 5,
    "evidence.truth": None,
}


@pytest.fixture
def round_of_three(sample: Callable[..., Spec], tmp_path: Path) -> list[str]:
    """What three clients send for a picture each."""
    private, paths = digits("private"), []
    for index in (0, 40, 80):
        write_image(tmp_path / "private.png", private.images[index])
        sent = capture_gradient(
            sample("undefended"), [tmp_path / "private.png"], [int(private.labels[index])]
        )
        paths.append(str(tmp_path / f"{index}.safetensors"))
        write_capture(Path(paths[-1]), sent)
    return paths


def test_each_capture_is_checked_and_attacked(
    sample: Callable[..., Spec], round_of_three: list[str]
) -> None:
    first, *others = round_of_three
    keys = {**FEW, "capture.gradient": first}
    spec = sample("undefended", **keys, **{"capture.others": others})
    progress = Counter()
    report = run_audit(spec, progress)
    planned = planned_evaluations({e.name: e.plan() for e in plan_experiments(prepare(spec))})
    assert progress.done >= progress.planned == planned
    assert report.verdict.of("image").grade in ("C", "D", "F")
    wanted = [int(digits("private").labels[index]) for index in (0, 40, 80)]
    captures = [report.captured, *report.others]
    assert [captured.labels for captured in captures] == [[label] for label in wanted]
    assert [captured.file for captured in captures] == round_of_three
    # Of so short searches one may end between like and unlike, which earns no pass.
    outcomes = [captured.likeness.outcome for captured in captures]
    assert outcomes.count("like") >= 2
    assert set(outcomes) <= {"like", "undecided"}
    assert len({captured.reconstructions[0].image for captured in captures}) == 3

    alone = run_audit(sample("undefended", **keys), Counter())
    assert alone.evidence == report.evidence
    assert alone.captured == report.captured

    page = render_html(report)
    assert all(captured.reconstructions[0].image in page for captured in captures)
    terminal = Console(width=200, file=io.StringIO())
    render_console(report, terminal)
    assert f"{others[1]} (label {wanted[2]}, inferred" in terminal.file.getvalue()


def test_one_wrong_capture_is_no_pass_for_the_round(
    sample: Callable[..., Spec], round_of_three: list[str]
) -> None:
    first, second, third = round_of_three
    halved = {name: 0.5 * tensor for name, tensor in load_file(second).items()}
    save_file(halved, second)
    keys = {**FEW, "capture.gradient": first, "evidence.reconstruction_trials": 0}
    report = run_audit(
        sample("undefended", **keys, **{"capture.others": [second, third]}), Counter()
    )
    assert report.verdict.grade == "inconclusive"
    assert f"the declared model and loss ({second})" in report.verdict.reason
    assert "model.loss.scale 0.5 would fit" in report.verdict.reason


def test_the_captures_of_a_round_lack_the_same_parameters(
    sample: Callable[..., Spec], round_of_three: list[str]
) -> None:
    first, second, _ = round_of_three
    tensors = load_file(second)
    del tensors["0.bias"]
    save_file(tensors, second)
    spec = sample("undefended", **FEW, **{"capture.gradient": first, "capture.others": [second]})
    with pytest.raises(InputError, match=r"has no '0.bias', which the first capture has"):
        prepare(spec)


def test_a_capture_is_named_once(sample: Callable[..., Spec], round_of_three: list[str]) -> None:
    first, second, _ = round_of_three
    keys = {**FEW, "capture.gradient": first, "capture.others": [second, first]}
    with pytest.raises(SpecError, match=r"holds the same values as another capture"):
        prepare(sample("undefended", **keys))


def test_a_capture_that_the_time_did_not_reach_is_no_pass(
    sample: Callable[..., Spec], round_of_three: list[str], tmp_path: Path
) -> None:
    """Nothing was asked of it, whatever the first one gives."""
    first, *others = round_of_three
    few = {**FEW, "capture.gradient": first, "capture.others": others}
    spec = sample("undefended", **few)
    path = tmp_path / "audit.jsonl"
    run_audit(spec, Counter(), ledger=path)
    rows = path.read_text().splitlines(keepends=True)
    _, declaration, *trials = rows
    declared = Declared.model_validate_json(declaration)
    plans, results = declared.plans, {one.name: one.result for one in EXPERIMENTS}
    whole = read_outcomes(path, [row.strip() for row in trials], results, plans)
    attacked = [one for one in whole if (one.experiment, one.trial) != ("capture", 2)]
    assert lacking(declared, Ledger(whole)) == []
    assert lacking(declared, Ledger(attacked)) == ["the attack on the capture"]
