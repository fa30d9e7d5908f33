"""What many tests start from: the sample audits, made small, and a tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from ggl_audit.basics.gradient import Gradient
from ggl_audit.client.randomness import client_contexts
from ggl_audit.defenses import Context
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.spec_file import read_spec
from ggl_audit.spec import Spec

# The same examples in every run: a gate must not fail by chance.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.load_profile("gate")

# As many processes as cores, a thread each unless told, also in the programs that tests start.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

SAMPLES = Path(__file__).parent.parent / "sample_specs"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

SMALL = {
    "attack.evaluations": 200,
    "attack.steps": 12,
    "evidence.matching_trials": 20,
    "evidence.reconstruction_trials": 3,
    "evidence.control_trials": 2,
    "device": "cpu",
}


@pytest.fixture
def samples() -> Path:
    return SAMPLES


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the public data and checkpoints for experiments are not on this machine")
    return SHARED


@pytest.fixture
def sample() -> Callable[..., Spec]:
    """Reads a sample spec with a small budget; further keys as keyword arguments by dotted name."""

    def read(name: str, **overrides: Any) -> Spec:
        changes = {**SMALL, **{key.replace("__", "."): v for key, v in overrides.items()}}
        return read_spec(SAMPLES / f"digits_{name}.yaml", changes.items())

    return read


@pytest.fixture
def model(sample: Callable[..., Spec]) -> ClientModel:
    return load_model(sample("undefended"), torch.device("cpu"))


def contexts(count: int, seed: int = 0) -> list[Context]:
    """The randomness of clients in so many releases."""
    return client_contexts(seed, "test", torch.device("cpu"), range(count))


def plain_gradient(model: ClientModel, image: torch.Tensor, label: int) -> Gradient:
    """The gradient of one image by a plain backward pass, independent of torch.func."""
    module = model.module
    module.zero_grad()
    logits = module((image[None] - model.mean) / model.std)
    (nn.CrossEntropyLoss()(logits, torch.tensor([label])) * model.loss_scale).backward()
    gradient = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return gradient


class Counter:
    """A progress that counts."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.planned = self.done = 0
        self.stages: list[str] = []
        self.said: list[str] = []
        self.interrupt_at = interrupt_at

    def start(self, evaluations: int) -> None:
        self.planned = evaluations

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, evaluations: int) -> None:
        self.done += evaluations
        if self.interrupt_at is not None and self.done >= self.interrupt_at:
            raise KeyboardInterrupt

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Path]:
    """Installs a package of one file, which names one thing in it as an entry point."""

    def install(group: str, point: str, source: str) -> Path:
        folder = tmp_path / "packages"
        name = point.partition("=")[2].strip().partition(":")[0]
        about = folder / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (folder / f"{name}.py").write_text(source)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[ggl_audit.{group}]\n{point}\n")
        monkeypatch.syspath_prepend(str(folder))
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        return folder

    return install
