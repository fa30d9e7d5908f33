"""A defense is one file: of this program's folder, or of another package, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from ggl_audit.audit import run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.cli import app
from ggl_audit.defenses import Step, build_pipeline, known, shipped
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.report.html import render_html
from ggl_audit.spec import DefenseSpec, Spec
from tests.conftest import Counter

Install = Callable[[str, str, str], Path]

FOLDER = Path(__file__).parent.parent.parent / "ggl_audit" / "defenses"

TOY = '''
from typing import ClassVar

from pydantic import Field

from ggl_audit.basics.gradient import each
from ggl_audit.defenses import Defense


class Rounding(Defense):
    """Rounds each value to a multiple of a step."""

    name: ClassVar[str] = "toy_rounding"
    source: ClassVar[str] = "a package of one file"
    trace: ClassVar[str] = "values"

    step: float = Field(gt=0, description="between two values")

    def apply(self, gradient, context):
        return each(lambda tensor: self.step * (tensor / self.step).round(), gradient)

    def replicate(self, gradient, observed):
        return self.apply(gradient, None)

    def contradiction(self, observed, later_noise):
        away = max(float((t / self.step - (t / self.step).round()).abs().max())
                   for t in observed.values())
        return away > 0.01, f"values are up to {away:.2g} steps off the grid"
'''

DECLARED = {"name": "toy_rounding", "step": 1e-4}


@pytest.fixture
def toy(package: Install) -> None:
    package("defenses", "toy_rounding = toy_rounding_package:Rounding", TOY)


def step(**parameters: object) -> DefenseSpec:
    return DefenseSpec.model_validate(parameters)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_each_step_of_this_folder_is_a_file_of_its_own() -> None:
    steps = {name: kind for name, kind in shipped().items() if issubclass(kind, Step)}
    assert len(steps) >= 18
    for name, kind in steps.items():
        assert (FOLDER / f"{name}.py").is_file()
        assert kind.__module__ == f"ggl_audit.defenses.{name}"
    assert {"dp_sgd", "dp_fedavg"} <= shipped().keys()


def test_no_file_of_this_folder_lists_the_others() -> None:
    for file in FOLDER.glob("*.py"):
        named = [name for name in shipped() if f'"{name}"' in file.read_text()]
        assert len(named) <= 2, file


@pytest.mark.usefixtures("toy")
def test_a_defense_of_another_package_is_listed() -> None:
    listed = printed("list", "defenses")
    assert "toy_rounding" in listed
    assert "Rounds each value to a multiple of a step." in listed
    assert "step: between two values (needed)" in listed
    assert "toy_rounding" not in shipped()


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("parameters", "key"),
    [({}, "step"), ({"step": -1.0}, "step"), ({"step": 1.0, "stop": 2}, "stop")],
)
def test_the_parameters_of_a_defense_of_another_package_are_checked(
    parameters: dict[str, float], key: str
) -> None:
    assert str(build_pipeline([step(**DECLARED)])) == "toy_rounding(step=0.0001)"
    with pytest.raises(SpecError) as error:
        build_pipeline([step(name="clip", bound=1.0), step(name="toy_rounding", **parameters)])
    assert error.value.key == ("defense", 1, key)
    with pytest.raises(SpecError, match="Did you mean 'toy_rounding'"):
        build_pipeline([step(name="toy_roundin")])


@pytest.mark.usefixtures("toy")
def test_the_schema_has_the_defenses_with_their_parameters(samples: Path) -> None:
    schema = json.loads(printed("schema", "spec"))
    spec = yaml.safe_load((samples / "digits_sparsified.yaml").read_text())

    def fits(*steps: dict[str, object]) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid({**spec, "defense": [*steps]})

    assert fits(DECLARED, {"name": "sparsify", "fraction": 0.9}, {"name": "dp_sgd", "bound": 1.0,
                "noise_multiplier": 1.0}, {"factory": "own.py:Own", "anything": [1]})  # fmt: skip
    assert fits({"name": "clip", "bound": 1, "factory": None})
    assert not fits({"name": "toy_rounding"})
    assert not fits({"name": "toy_rounding", "step": 0})
    assert not fits({"name": "toy_rounding", "step": 1, "stop": 1})
    assert not fits({"name": "sparsify", "fraction": 2})
    assert not fits({"name": "sparsfy", "fraction": 0.9})
    assert not fits({})
    titles = [choice["title"] for choice in schema["$defs"]["DefenseSpec"]["anyOf"]]
    assert titles == [*sorted(known()), "factory"]


@pytest.mark.usefixtures("toy")
def test_a_defense_of_another_package_is_audited(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    data, image, sent = digits("private"), tmp_path / "image.png", tmp_path / "sent.safetensors"
    write_image(image, data.images[0])
    spec = sample(
        "undefended",
        defense=[DECLARED],
        capture__gradient=str(sent),
        evidence__truth=str(image),
        attack__evaluations=50,
        evidence__reconstruction_trials=1,
        evidence__control_trials=1,
    )
    write_capture(sent, capture_gradient(spec, [image], [int(data.labels[0])]))
    report = run_audit(spec, Counter())
    checks = {check.step: check.outcome for check in report.evidence.checks}
    assert checks["toy_rounding(step=0.0001)"] == "agrees"
    assert report.evidence.ceiling is not None
    assert report.evidence.ceiling.rate == 1
    assert "toy_rounding(step=0.0001)" in render_html(report)


def test_a_replica_of_another_package_is_put_to_the_test(
    package: Install, sample: Callable[..., Spec]
) -> None:
    """As that of a user's own file is."""
    failing = TOY.replace("toy_rounding", "toy_failing").replace(
        "return self.apply(gradient, None)", "raise RuntimeError('planted')"
    )
    package("defenses", "toy_failing = toy_failing_package:Rounding", failing)
    with pytest.raises(SpecError, match="toy_failing failed with RuntimeError: planted"):
        run_audit(sample("undefended", defense=[{"name": "toy_failing", "step": 1}]), Counter())


def test_a_name_that_there_is_already_is_refused(package: Install) -> None:
    source = TOY.replace("toy_rounding", "clip")
    package("defenses", "better_clip = toy_clip_package:Rounding", source)
    with pytest.raises(AuditError, match=r"are called 'clip': .*\.clip\.Clip and toy_clip"):
        build_pipeline([])
    result = CliRunner().invoke(app, ["list", "defenses"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("thing", ["7", "Rounding(step=1)", "nameless"])
def test_what_is_no_defense_is_refused(package: Install, thing: str) -> None:
    nameless = "class Nameless(Defense):\n    pass\n\n\nnameless = Nameless\n"
    name = f"toy_{thing[:3].lower()}_package"
    package("defenses", f"toy = {name}:TOY", f"{TOY}\n\n{nameless}\n\nTOY = {thing}\n")
    with pytest.raises(AuditError, match="what a package adds as 'toy' to defenses is none"):
        known()


def test_a_recipe_of_another_package_is_its_steps(package: Install) -> None:
    source = '''
from typing import ClassVar

from ggl_audit.defenses import Clip, Noise, Recipe


class Both(Recipe):
    """Clips and adds noise."""

    name: ClassVar[str] = "toy_recipe"

    size: float

    def as_steps(self, units):
        return [Clip(bound=self.size), Noise(std=self.size / units)]
'''
    package("defenses", "toy_recipe = toy_recipe_package:Both", source)
    defense = build_pipeline([step(name="toy_recipe", size=2.0)], samples=4)
    assert [kept.name for kept in defense.steps] == ["clip", "noise"]
    noise = defense.randomness.total_noise()
    assert noise is not None
    assert noise.std == 0.5
