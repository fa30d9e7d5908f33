"""Models of strangers: a run ends in a report, or in one message, never in a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from ggl_audit.cli import app
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import digits

SMALL = [
    "--device=cpu",
    "--set=attack.evaluations=60",
    "--set=attack.steps=2",
    "--set=evidence.matching_trials=4",
    "--set=evidence.reconstruction_trials=2",
    "--set=evidence.candidates=4",
    "--set=evidence.control_trials=1",
]

MODELS = """
from collections import namedtuple
from torch import nn
from torch.nn import functional as F
from blocks import body

Out = namedtuple("Out", ["logits", "aux"])

class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1)), nn.Linear(8, 10)
    def forward(self, x):
        return self.fc(self.body(x).squeeze())

class Auxiliary(nn.Module):
    def __init__(self, returns="named"):
        super().__init__()
        self.returns = returns
        self.body, self.fc, self.aux = body(), nn.Linear(512, 10), nn.Linear(512, 10)
    def forward(self, x):
        seen = self.body(x).flatten(1)
        both = Out(self.fc(seen), self.aux(seen))
        return both if self.returns == "named" else tuple(both)

class Few(Auxiliary):
    def forward(self, x):
        assert len(x) < 20, "too many at a time"
        return self.fc(self.body(x).flatten(1))

class Stays(nn.Module):
    def __init__(self, stays=True):
        super().__init__()
        self.stays = stays
        self.backbone = nn.Sequential(body(), nn.BatchNorm2d(8))
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(128, 10)
        self.backbone[1].running_var.uniform_(0.3, 2)
    def train(self, mode=True):
        super().train(mode)
        if self.stays:
            self.backbone.eval()
        return self
    def forward(self, x):
        return self.fc(self.neck(self.backbone(x)).flatten(1))

def narrow():
    layers = nn.Flatten(), nn.Linear(256, 4), nn.GroupNorm(4, 4), nn.Tanh(), nn.Linear(4, 10)
    return nn.Sequential(*layers)

def parallel():
    return nn.DataParallel(nn.Sequential(body(), nn.Flatten(), nn.LazyLinear(10)))

def loss(out, y):
    return F.cross_entropy(out[0], y) + 0.4 * F.cross_entropy(out[1], y)

def fussy(out, y):
    assert y.numel() > 1, "a batch is needed"
    return loss(out, y)
"""
BLOCKS = """
from torch import nn
def body():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.SiLU())
"""


def call(command: str, spec: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, str(spec), *SMALL, *arguments])


def ends_well(result: Result) -> str:
    assert result.exit_code in (0, 1, 3), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stdout.split())


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def make(
    folder: Path, factory: str, count: int, *, mode: str = "eval", whole: bool = False
) -> Path:
    """Writes what a client of the model has and sends: weights, gradient, images, and a spec."""
    (folder / "models.py").write_text(MODELS)
    (folder / "blocks.py").write_text(BLOCKS)
    torch.manual_seed(0)
    net: nn.Module = build_module(f"models.py:{factory}", {}, folder, "model")
    images, labels = digits("private").images[:count], digits("private").labels[:count]
    net(images)  # a lazy layer has its shape from then on
    save_file({n: t.clone() for n, t in net.state_dict().items()}, folder / "weights.safetensors")
    net.train(mode == "train")
    outputs = net((images - 0.5) / 0.5)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        weight * F.cross_entropy(part, labels)
        for part, weight in zip(parts[: 2 if whole else 1], (1, 0.4), strict=False)
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    gradient = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()
    }
    save_file(gradient, folder / "gradient.safetensors")
    for index, image in enumerate(images):
        pixels = (image[0] * 255).round().numpy().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    spec = {
        "version": 1,
        "model": {
            "factory": f"models.py:{factory}",
            "weights": "weights.safetensors",
            "input": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
            "mode": mode,
        },
        "capture": {
            "gradient": "gradient.safetensors",
            "batch_size": count,
            "labels": labels.tolist(),
        },
        "prior": {"bundled": "digits"},
        "evidence": {
            "reference": {"bundled": "digits"},
            "truth": [f"{index}.png" for index in range(count)],
        },
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


@pytest.mark.parametrize("factory", ["Squeezing", "narrow", "parallel", "Stays"])
def test_models_that_take_no_single_image_or_have_wrappers(tmp_path: Path, factory: str) -> None:
    spec = make(tmp_path, factory, 2)
    for command in ("check", "run") if factory == "narrow" else ("run",):
        said = ends_well(call(command, spec))
        assert "private image" in said
        assert "contradicts" not in said


def test_an_auxiliary_head(tmp_path: Path) -> None:
    spec = make(tmp_path, "Auxiliary", 1, whole=True)
    whole = "--set=model.loss=models.py:loss"
    said = ends_well(call("run", spec, whole))
    assert "models.py:loss of all that it returns" in said
    assert "the private image: agrees" in said
    said = ends_well(call("check", spec))
    assert "the private image: contradicts" in said


def test_an_output_that_is_not_plain(tmp_path: Path) -> None:
    spec = make(tmp_path, "Auxiliary", 1)
    plain = "--set=model.kwargs={returns: tuple}"
    for command in ("check", "run"):
        said = refused(call(command, spec, plain))
        assert "spec.yaml" in said
        assert "not given, but the model returned a tuple of 0 (1, 10), 1 (1, 10)" in said
    said = ends_well(call("check", spec, plain, "--set=model.output=0"))
    assert "the private image: agrees" in said


def test_a_number_of_images_that_is_not_taken(tmp_path: Path) -> None:
    for command in ("check", "run"):
        said = refused(call(command, make(tmp_path, "Few", 2)))
        assert "images of [1, 16, 16] at a time (AssertionError: too many at a time)" in said


def test_a_loss_that_fails_in_the_end(tmp_path: Path) -> None:
    spec = make(tmp_path, "Auxiliary", 2, whole=True)
    one = "--set=defense=[{name: clip, bound: 1, unit: sample}]"
    said = refused(call("check", spec, "--set=model.loss=models.py:fussy", one))
    assert "for many candidates at a time (a batch is needed)" in said


def test_the_private_image_tells_the_modes(tmp_path: Path) -> None:
    spec = make(tmp_path, "Stays", 1, mode="train")
    assert "the private image: agrees" in ends_well(call("check", spec))
    said = ends_well(call("check", spec, "--set=model.kwargs={stays: false}"))
    assert "would agree if the model was in train mode, with eval_modules: [backbone]" in said
    declared = ("--set=model.kwargs={stays: false}", "--set=model.eval_modules=[backbone]")
    said = ends_well(call("run", spec, *declared))
    assert "the private image: agrees" in said
    assert "model in train mode (but for backbone.1)" in said
