"""What must come out where something is sent beside parameters that are clipped and noised well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ggl_audit.audit import run_audit
from ggl_audit.inputs.images import digits
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

MODEL = """
from torch import nn

def net():
    return nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Flatten(), nn.Linear(294, 10),
    )
"""
LR, CLIP, NOISE = 0.1, 0.1, 0.3
UNSENT: dict[str, Any] = {"capture__unsent": ["*running*"]}


@pytest.fixture
def audit(sample: Callable[..., Spec], tmp_path: Path) -> Callable[..., Report]:
    """Audits an update in train mode: what is sent of it, and what is declared."""
    (tmp_path / "models.py").write_text(MODEL)
    there: dict[str, Any] = {}
    exec(MODEL, there)  # noqa: S102
    torch.manual_seed(5)
    before: nn.Module = there["net"]()
    save_file(before.state_dict(), tmp_path / "before.safetensors")

    def run(seed: int, sends: Callable[[str], bool], more: dict[str, Any], **keys: Any) -> Report:
        data = digits("private")
        image, label = data.images[seed : seed + 1], data.labels[seed : seed + 1]
        module: nn.Module = there["net"]()
        module.load_state_dict(before.state_dict())
        loss = nn.functional.cross_entropy(module.train()(image * 2 - 1), label)
        gradients = torch.autograd.grad(loss, [*module.parameters()])
        update = [LR * gradient for gradient in gradients]
        factor = min(1.0, CLIP / float(torch.cat([u.flatten() for u in update]).norm()))
        generator = torch.Generator().manual_seed(seed)
        after = {name: t for name, t in module.state_dict().items() if sends(name)}
        for (name, parameter), own in zip(module.named_parameters(), update, strict=True):
            noise = NOISE * torch.randn(own.shape, generator=generator)
            after[name] = parameter.detach() - factor * own - noise
        save_file({**after, **more}, tmp_path / "after.safetensors")
        usual = {
            "model__factory": f"{tmp_path / 'models.py'}:net",
            "model__weights": str(tmp_path / "before.safetensors"),
            "model__mode": "train",
            "capture__gradient": None,
            "capture__after": str(tmp_path / "after.safetensors"),
            "capture__kind": "update",
            "capture__labels": label.tolist(),
            "capture__local": {"lr": LR},
            "defense": [{"name": "clip", "bound": CLIP}, {"name": "noise", "std": NOISE}],
            "attack__evaluations": 49,
            "attack__method": "ggl",
            "evidence__matching_trials": 100,
            "evidence__reconstruction_trials": 0,
            "evidence__control_trials": 1,
        }
        return run_audit(sample("undefended", seed=seed, **{**usual, **keys}), Counter())

    return run


def everything(name: str) -> bool:
    return True


def parameters(name: str) -> bool:
    return "running" not in name and "num" not in name


@pytest.mark.parametrize("seed", range(3))
def test_parameters_alone_pass(audit: Callable[..., Report], seed: int) -> None:
    report = audit(seed, parameters, {}, **UNSENT)
    assert report.verdict.grade in ("A", "B"), report.verdict.reason
    assert any("Never sent, as capture.unsent says" in said for said in report.assumptions)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_in_the_clear_never_pass(audit: Callable[..., Report], seed: int) -> None:
    report = audit(seed, everything, {})
    assert report.verdict.of("image").grade not in ("A", "B")
    ceiling = report.evidence.ceiling
    assert ceiling is not None
    assert ceiling.successes == ceiling.trials
    guarantee = {"unit": "sample", "reduction": "sum", "rounds": 1}
    promised = audit(
        seed, everything, {}, guarantee={**guarantee, "sampling_rate": 1, "delta": 1e-5}
    )
    assert {"GGL002", "GGL006"} <= {finding.id for finding in promised.findings}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "whether they were sent is not said"),
        ({"optimizer.momentum": torch.ones(6, 1, 3, 3)}, "optimizer state"),
        ({"odd": torch.ones(2)}, "not the model's"),
    ],
    ids=["undeclared", "optimizer", "odd"],
)
def test_what_is_not_measured_forbids_a_pass(
    audit: Callable[..., Report], seed: int, more: dict[str, torch.Tensor], words: str
) -> None:
    report = audit(seed, parameters, more, **(UNSENT if more else {}))
    assert report.verdict.grade == "inconclusive"
    assert words in report.verdict.reason
    if more:
        ignored = [{"name": name, "reason": "it is drawn at random"} for name in more]
        passed = audit(seed, parameters, more, **UNSENT, capture__ignored=ignored)
        assert passed.verdict.grade in ("A", "B"), passed.verdict.reason
        assert any("it is drawn at random" in said for said in passed.assumptions)
