from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ggl_audit.audit import run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.errors import SpecError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

OWN = '''
from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.defenses import Context, Defense


class Own(Defense):
    name: ClassVar[str] = "own"
    source: ClassVar[str] = "this file"
    broken_by: ClassVar[str] = "nobody yet"
    trace: ClassVar[str] = "levels"
    preserves: ClassVar[frozenset[str]] = frozenset({"norm", "noise"})

    step: float = Field(default=1e-4, gt=0)

    def apply(self, gradient, context):
        return {n: self.step * torch.round(t / self.step) for n, t in gradient.items()}

    def replicate(self, gradient, observed):
        return self.apply(gradient, None)

    def contradiction(self, observed, later_noise):
        away = max(float((t - s).abs().max()) for t, s in zip(
            observed.values(), self.apply(observed, None).values()))
        return away > 1e-3 * self.step, f"values are {away:.2g} away from the grid"


class Unchecked(Own):
    trace: ClassVar[str] = "protocol"

    def apply(self, gradient, context):
        return gradient

    def contradiction(self, observed, later_noise):
        return False, "taken for granted"


class SecretlyRandom(Unchecked):
    std: float = 0.1

    def apply(self, gradient, context):
        def noisy(t):
            return t + self.std * torch.randn(t.shape, generator=context.generator, dtype=t.dtype)
        return {n: noisy(t) for n, t in gradient.items()}

    def replicate(self, gradient, observed):
        return gradient


class Zeros(Unchecked):
    def replicate(self, gradient, observed):
        return {n: torch.zeros_like(t) for n, t in gradient.items()}


class Scrambled(Unchecked):
    """All but the last tensor in another order, always the same one; the replica lacks it."""

    def apply(self, gradient, context):
        *others, last = gradient
        sent = {}
        for name in others:
            random = torch.Generator().manual_seed(0)
            values = gradient[name].flatten()
            order = torch.randperm(len(values), generator=random)
            sent[name] = values[order].view_as(gradient[name])
        return {**sent, last: gradient[last]}

    def replicate(self, gradient, observed):
        return gradient


def rounding(step=1e-4):
    return Own(step=step)


def secretly_random(std=0.1):
    return SecretlyRandom(std=std)


def zeros():
    return Zeros()


def scrambled():
    return Scrambled()


def raises():
    raise ValueError("planted")


def exits():
    raise SystemExit(0)


def something_else():
    return {"fraction": 0.9}


def a_class():
    return Own


class Failing(Unchecked):
    def apply(self, gradient, context):
        raise RuntimeError("planted")


not_callable = 3
'''

SEARCHED = {
    "attack__evaluations": 100,
    "evidence__matching_trials": 200,
    "evidence__reconstruction_trials": 5,
    "evidence__control_trials": 1,
    "evidence__public": ["label"],  # what follows is about the images
}
WELL_SEARCHED = {
    "attack__evaluations": 400,
    "evidence__matching_trials": 30,
    "evidence__reconstruction_trials": 8,
    "evidence__public": ["label"],
}


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "own.py").write_text(OWN)

    def declare(name: str, **parameters: Any) -> dict[str, Any]:
        return {"factory": f"{tmp_path / 'own.py'}:{name}", **parameters}

    return declare


@pytest.fixture
def audit(sample: Callable[..., Spec], tmp_path: Path) -> Callable[..., Report]:
    """Makes the capture as declared and audits it; the private image is not held unless said."""

    def run(*steps: dict[str, Any], held: bool = False, **keys: Any) -> Report:
        data = digits("private")
        image, sent = tmp_path / "private.png", tmp_path / "sent.safetensors"
        write_image(image, data.images[0])
        spec = sample(
            "undefended",
            **{
                **SEARCHED,
                "defense": list(steps),
                "capture__gradient": str(sent),
                "evidence__truth": str(image) if held else None,
                **keys,
            },
        )
        write_capture(sent, capture_gradient(spec, [image], [int(data.labels[0])]))
        return run_audit(spec, Counter())

    return run


@pytest.mark.parametrize("held", [False, True])
def test_a_users_own_defense_works_from_capture_to_report(
    own: Callable[..., dict[str, Any]], audit: Callable[..., Report], tmp_path: Path, held: bool
) -> None:
    report = audit(own("rounding", step=0.001), held=held, **WELL_SEARCHED)
    assert report.verdict.grade in ("D", "F")
    assert report.evidence.ceiling is not None
    assert report.evidence.ceiling.rate == 1
    checks = {check.step: check.outcome for check in report.evidence.checks}
    assert checks["own(step=0.001)"] == "agrees"
    assert set(checks.values()) == {"agrees"}
    assert str(tmp_path / "own.py") in [file.path for file in report.inputs]


def test_the_parameters_of_ones_own_defense_count(
    own: Callable[..., dict[str, Any]],
    audit: Callable[..., Report],
    sample: Callable[..., Spec],
    tmp_path: Path,
) -> None:
    """Rounded to another grid than is declared."""
    audit(own("rounding", step=0.001), evidence__matching_trials=0)
    spec = sample(
        "undefended",
        defense=[own("rounding", step=0.01)],
        capture__gradient=str(tmp_path / "sent.safetensors"),
        evidence__truth=None,
    )
    report = run_audit(spec, Counter())
    assert report.verdict.grade == "inconclusive"
    assert "GGL005" in [finding.id for finding in report.findings]


def test_ones_own_defense_goes_with_others(
    own: Callable[..., dict[str, Any]], audit: Callable[..., Report]
) -> None:
    steps = [{"name": "clip", "bound": 1.0}, own("rounding", step=0.001)]
    report = audit(*steps, {"name": "noise", "std": 1e-4})
    assert report.evidence.ceiling is not None
    assert report.evidence.ceiling.rate == 1
    assert report.verdict.grade not in ("A", "B")


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_a_secretly_random_defense_is_not_taken_for_safe(
    own: Callable[..., dict[str, Any]], audit: Callable[..., Report], std: float
) -> None:
    report = audit(own("secretly_random", std=std))
    assert report.verdict.grade not in ("A", "B")
    image = report.verdict.of("image")
    assert image.grade == "C" or "replica" in image.reason


@pytest.mark.parametrize("name", ["zeros", "scrambled"])
def test_a_wrong_replica_is_not_taken_for_a_safe_defense(
    own: Callable[..., dict[str, Any]], audit: Callable[..., Report], name: str
) -> None:
    report = audit(own(name))
    assert report.verdict.grade not in ("A", "B")
    assert "replica" in report.verdict.of("image").reason


@pytest.mark.parametrize(
    "name",
    [
        "zeros",
        "secretly_random",
        pytest.param(
            "scrambled",
        ),
    ],
)
def test_a_little_noise_does_not_hide_a_wrong_replica(
    own: Callable[..., dict[str, Any]], audit: Callable[..., Report], name: str
) -> None:
    report = audit(own(name), {"name": "noise", "std": 1e-7})
    assert report.verdict.grade not in ("A", "B"), report.verdict


@pytest.mark.parametrize("name", ["zeros", "scrambled"])
def test_a_wrong_replica_in_a_cohort_is_not_taken_for_safe(
    own: Callable[..., dict[str, Any]],
    sample: Callable[..., Spec],
    tmp_path: Path,
    name: str,
) -> None:
    data = digits("private")
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(images):
        write_image(path, data.images[i])
    spec = sample(
        "undefended",
        **{**SEARCHED, "attack__evaluations": 13},
        defense=[own(name), {"name": "secure_aggregation", "clients": 2}],
        capture__gradient=str(tmp_path / "sent.safetensors"),
        evidence__truth=None,
    )
    sent = capture_gradient(spec, images, data.labels[:2].tolist())
    write_capture(tmp_path / "sent.safetensors", sent)
    report = run_audit(spec, Counter())
    assert report.verdict.grade not in ("A", "B"), report.verdict


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("raises", {}, "ValueError: planted"),
        ("exits", {}, "SystemExit"),
        ("something_else", {}, "returned a dict; expected a ggl_audit.defenses.Defense"),
        ("a_class", {}, "expected a ggl_audit.defenses.Defense"),
        ("rounding", {"stop": 1}, "TypeError"),
        ("rounding", {"step": -1}, "greater than 0"),
        ("not_callable", {}, "no callable 'not_callable'"),
        ("roundin", {}, "Did you mean 'rounding'"),
    ],
)
def test_a_factory_that_fails_is_told_with_its_key(
    own: Callable[..., dict[str, Any]],
    sample: Callable[..., Spec],
    samples: Path,
    tmp_path: Path,
    name: str,
    parameters: dict[str, Any],
    problem: str,
) -> None:
    declared = [{"name": "clip", "bound": 1.0}, own(name, **parameters)]
    spec = sample("undefended", defense=declared)
    with pytest.raises(SpecError) as error:
        load_client(spec, torch.device("cpu"))
    assert problem in str(error.value)
    assert error.value.key[:2] == ("defense", 1)

    settings = [f"--set=defense.0.{key}={value}" for key, value in declared[1].items()]
    (tmp_path / "spec.yaml").write_text(
        (samples / "digits_sparsified.yaml")
        .read_text()
        .replace("models.py", str(samples / "models.py"))
        .replace("weights/", f"{samples}/weights/")
        .replace("captures/", f"{samples}/captures/")
    )
    result = CliRunner().invoke(
        app,
        [
            "run",
            str(tmp_path / "spec.yaml"),
            "--device=cpu",
            "--set=defense.0.name=null",
            "--set=defense.0.fraction=null",
            *settings,
        ],
    )
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


CLIENT = """
import torch.nn.functional as F


def step(model, images, labels, reduction):
    model.zero_grad()
    F.cross_entropy(model(images), labels, reduction=reduction).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
"""


@pytest.mark.parametrize(
    "reduction",
    [
        "mean",
        pytest.param(
            "sum",
        ),
    ],
)
def test_own_code_is_compared_with_the_declaration_on_a_batch(
    sample: Callable[..., Spec], tmp_path: Path, reduction: str
) -> None:
    """The mean is declared; of one image the sum is the same."""
    (tmp_path / "client.py").write_text(CLIENT)
    data = digits("private")
    images = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(images):
        write_image(path, data.images[i])
    spec = sample(
        "undefended",
        capture__batch_size=4,
        capture__gradient=str(tmp_path / "sent.safetensors"),
        evidence__truth=None,
        client={"step": f"{tmp_path / 'client.py'}:step", "kwargs": {"reduction": reduction}},
    )
    write_capture(
        tmp_path / "sent.safetensors", capture_gradient(spec, images, data.labels[:4].tolist())
    )
    assert bool(prepare(spec).doubts) == (reduction == "sum")
