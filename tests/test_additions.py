"""Another package adds an attack, an experiment or a report format: one file and an entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ggl_audit.audit import judge_ledger, plan_experiments, run_audit
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.report.formats import write_report
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter
from tests.test_ledger import content

Install = Callable[[str, str, str], Path]

ATTACK = '''
"""A grey picture, whatever was observed."""

import torch

from ggl_audit.attacks.attack import Attack, Attempt


class Grey(Attack):
    """One candidate for each gradient."""

    name = "grey"
    source = "grey pictures (nobody, never)"

    def why_not(self):
        return "the release is of several images" if self.case.members > 1 else ""

    def evaluations(self):
        return 1

    def attack(self, observed, labels, randoms, before, advance):
        images = torch.full((*labels.shape, *self.case.model.shape), 0.5)
        matching = self.case.matching(distance=self.case.spec.attack.distance)
        losses = matching.distances(images[:, None], labels[:, None], observed)[:, 0]
        advance(len(labels))
        return Attempt(images, losses)
'''

EXPERIMENT = '''
"""How bright the canaries are: no question of anybody's."""

from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result


class Bright(Result):
    """One canary."""

    mean: float

    @classmethod
    def said(cls, results):
        mean = sum(one.mean for one in results) / len(results)
        return [f"{len(results)} canaries have a mean brightness of {mean:.3f}."]


class Brightness(Experiment[Bright]):
    """The mean brightness of canaries."""

    name = "brightness"
    stage = "the brightness of canaries"
    result = Bright

    def plan(self):
        if self.case.model.shape[0] != 1:
            return NotMeasured(reason="the images have colours")
        return Plan(trials=7, matched=7, together=3)

    def run(self, trials, advance):
        for image in self.case.trials.part(slice(trials.start, trials.stop)).canaries:
            advance(1)
            yield Bright(mean=float(image.mean()))
'''

FORMAT = '''
"""One line."""


def render(report):
    """The grade alone."""
    return f"{report.verdict.grade}\\n"
'''

FEW = {"attack__evaluations": 26, "attack__steps": 2, "evidence__matching_trials": 20}


def listed(kind: str) -> str:
    result = CliRunner().invoke(app, ["list", kind])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def plans(spec: Spec) -> int:
    return planned_evaluations({e.name: e.plan() for e in plan_experiments(prepare(spec))})


def test_an_attack(package: Install, sample: Callable[..., Spec]) -> None:
    spec = sample("undefended", **FEW)
    before = plans(spec)
    package("attacks", "grey = toy_grey:Grey", ATTACK)
    assert "grey pictures (nobody, never)" in listed("attacks")
    assert plans(spec) == before + 2 * (4 + 3)  # the capture's searches, and three canaries
    counter = Counter()
    report = run_audit(spec, counter)
    assert counter.done >= counter.planned == plans(spec)
    (grey,) = (attack for attack in report.evidence.attacks if attack.name == "grey")
    assert grey.floor is not None
    assert grey.floor.successes == 0
    assert "grey" in report.captured.by_attack
    assert "grey pictures" in render_html(report)
    several = sample("undefended", capture__batch_size=2, evidence__truth=None, **FEW)
    (grey,) = (a for a in run_audit(several, Counter()).evidence.attacks if a.name == "grey")
    assert grey.not_measured == "the release is of several images"


def test_an_experiment(package: Install, sample: Callable[..., Spec], tmp_path: Path) -> None:
    spec, ledger = sample("undefended", **FEW), tmp_path / "audit.jsonl"
    before = plans(spec)
    package("experiments", "brightness = toy_brightness:Brightness", EXPERIMENT)
    assert "The mean brightness of canaries." in listed("experiments")
    assert plans(spec) == before + 7
    report = run_audit(spec, Counter(), ledger=ledger, workers=2)
    (made,) = (one for one in report.experiments if one.name == "brightness")
    assert (made.trials, made.planned, made.evaluations) == (7, 7, 7)
    assert made.said[0].startswith("7 canaries have a mean brightness of 0.")
    assert made.said[0] in render_html(report)
    assert content(judge_ledger(ledger)) == content(report)


def test_a_report_format(package: Install, sample: Callable[..., Spec], tmp_path: Path) -> None:
    package("report_formats", "grade = toy_format:render", FORMAT)
    assert ".grade The grade alone." in listed("formats")
    keys = {**FEW, "attack__method": "ggl", "evidence__reconstruction_trials": 0}
    report: Report = run_audit(sample("undefended", **keys), Counter())
    write_report(report, tmp_path / "x.grade")
    assert (tmp_path / "x.grade").read_text() == f"{report.verdict.grade}\n"


@pytest.mark.parametrize("kind", ["attacks", "experiments", "formats"])
def test_our_own_are_listed(kind: str) -> None:
    known = {"attacks": "refined", "experiments": "membership", "formats": ".html"}
    assert known[kind] in listed(kind)
