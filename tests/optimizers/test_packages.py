"""A package of one file adds an optimizer, and all that there is for ours is there for its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.audit import plan_experiments, run_audit
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.experiments.forecast import planned_evaluations
from ggl_audit.optimizers import families, find_family, start_optimizer, wants_more
from ggl_audit.spec import AttackSpec, Spec
from tests.conftest import SAMPLES, SMALL, Counter

Install = Callable[[str, str, str], Path]

EVOLUTION = '''
"""A (1 + P) evolution strategy."""

from typing import ClassVar

import numpy as np

from ggl_audit.optimizers import Search


class Evolution(Search):
    name: ClassVar[str] = "one-plus"
    source: ClassVar[str] = "Evolutionsstrategie (Rechenberg, 1973)"
    good_for: ClassVar[str] = "nothing but this test"

    def __init__(self, dimension, population, sigma, seed):
        self._random = np.random.default_rng(seed)
        self._shape, self._sigma = (population, dimension), sigma
        self._best, self._least = np.zeros(dimension), np.inf

    @classmethod
    def begin(cls, task, seed):
        return cls(task.dimension, task.attack.population, task.attack.sigma, seed)

    def ask(self):
        self._asked = self._best + self._sigma * self._random.standard_normal(self._shape)
        return self._asked

    def tell(self, losses):
        if losses.min() < self._least:
            self._best, self._least = self._asked[losses.argmin()], losses.min()

    def recommend(self):
        return self._best
'''

DESCENT = '''
"""The steepest descent of all searches at once."""

from typing import ClassVar

import torch

from ggl_audit.optimizers import Family, Wants


class Descent(Family):
    name: ClassVar[str] = "steepest"
    source: ClassVar[str] = "Cauchy (1847)"
    good_for: ClassVar[str] = "nothing but this test"
    learns_from: ClassVar[Wants] = "derivatives"

    def __init__(self, latents):
        self._latents = latents

    @classmethod
    def start(cls, task):
        return cls(torch.zeros(len(task.seeds), 1, task.dimension, device=task.device))

    def ask(self):
        return self._latents

    def tell(self, evaluation):
        self._latents = self._latents - 0.1 * evaluation.derivatives

    def recommend(self):
        return self._latents[:, 0]
'''

NAMELESS = """
from ggl_audit.optimizers import Search

class Toy(Search):
    name = {name!r}
    source = "nowhere"

class NoFamily:
    pass
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(params=["one-plus", "steepest"])
def added(request: pytest.FixtureRequest, package: Install) -> str:
    if request.param == "one-plus":
        package("optimizers", "one-plus = toy_evolution:Evolution", EVOLUTION)
    else:
        package("optimizers", "steepest = toy_descent:Descent", DESCENT)
    return str(request.param)


def test_it_is_listed_with_its_source(added: str) -> None:
    listed = call("list", "optimizers").stdout
    assert added in listed
    assert find_family(added).source.split()[0] in listed
    assert "gauss_newton" in listed


def test_an_audit_with_it_evaluates_what_is_planned_and_names_it(
    sample: Callable[..., Spec], added: str
) -> None:
    spec = sample("undefended", attack__optimizer=added, attack__evaluations=101)
    case = prepare(spec)
    plans = {one.name: one.plan() for one in plan_experiments(case)}
    planned, counter = planned_evaluations(plans), Counter()
    report = run_audit(spec, counter)
    assert counter.done == counter.planned == planned
    each = GenerativeGradientLeakage(case).evaluations()
    assert each == (100 if wants_more(added) else 101)
    assert report.spec["attack"]["optimizer"] == added
    assert any(f"the search by {added} with" in said for said in report.assumptions)
    search = next(attack for attack in report.evidence.attacks if attack.name == "ggl")
    assert search.floor is not None
    assert search.floor.trials == 3


def test_a_check_counts_it(sample: Callable[..., Spec], added: str) -> None:
    case = prepare(sample("undefended", attack__optimizer=added))
    plans = {one.name: one.plan() for one in plan_experiments(case)}
    planned = planned_evaluations(plans)
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    spec = SAMPLES / "digits_undefended.yaml"
    result = call("check", spec, *settings, f"--set=attack.optimizer={added}")
    assert result.exit_code == 0, result.output
    assert f"evaluates {planned:,} candidates" in " ".join(result.stdout.split())


def test_its_near_names_are_told(added: str) -> None:
    with pytest.raises(SpecError, match=f"Did you mean '{added}'"):
        find_family(f"{added}s")


@pytest.mark.parametrize("name", ["cma", "pycma:NAME", "nevergrad:Mine"])
def test_a_name_that_is_taken_is_refused(package: Install, name: str) -> None:
    module = f"toy_{name.replace(':', '_').lower()}"
    source = NAMELESS.format(name=name) + "    good_for = 'nothing'\nToy.good_for = 'nothing'\n"
    package("optimizers", f"toy = {module}:Toy", source)
    with pytest.raises(AuditError, match=rf"{module}\.Toy and .* are both the optimizer '{name}'"):
        families()
    result = call("list", "optimizers")
    assert result.exit_code == 2
    assert "Rename one of them" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("Toy", "the optimizer toy_wrong.*Toy has no good_for"),
        ("NoFamily", "'toy' of another package is a type; expected a class that derives from"),
        ("Toy.name", "'toy' of another package is a str; expected a class that derives from"),
    ],
)
def test_what_is_no_family_is_refused(package: Install, named: str, words: str) -> None:
    module = f"toy_wrong_{named.replace('.', '_').lower()}"
    package("optimizers", f"toy = {module}:{named}", NAMELESS.format(name="toy"))
    with pytest.raises(AuditError, match=words):
        families()


def test_what_cannot_run_is_told_before_the_search(package: Install) -> None:
    source = NAMELESS.format(name="toy") + "Toy.good_for = 'nothing'\n"
    package("optimizers", "toy = toy_abstract:Toy", source)
    with pytest.raises(SpecError, match="toy cannot be used here") as error:
        start_optimizer(AttackSpec(optimizer="toy"), 4)
    assert error.value.key == ("attack", "optimizer")
