"""Each layer counts in the mode in which the client's forward pass calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline, build_pipeline
from ggl_audit.errors import InputError, SpecError
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.declarations import other_declarations
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel, in_other_mode
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import DefenseSpec, Spec

CPU = torch.device("cpu")

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, drop=0.0):
        super().__init__()
        track = {"affine": True, "track_running_stats": True}
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), norm(4, **track), nn.SiLU(), nn.Dropout(drop)
        )
        self.neck = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), norm(8, **track), nn.SiLU())
        self.fc = nn.Linear(128, 10)
        for layer in (self.backbone[1], self.neck[1]):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 2)
    def forward(self, x):
        return self.fc(self.neck(self.backbone(x)).flatten(1))

class Stays(Net):
    "Fine-tuning: the backbone stays in eval mode."
    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

class LastTrains(Net):
    "In eval mode, whatever is asked for, but for the last normalization."
    def train(self, mode=True):
        super().train(False)
        self.neck.train()
        return self

class Inside(Net):
    "Frozen in the forward pass."
    def forward(self, x):
        self.backbone[1].eval()
        return super().forward(x)

class Both(Net):
    "One layer in two modes."
    def forward(self, x):
        seen = self.backbone(x)
        self.backbone.eval()
        seen = seen + self.backbone(x)
        self.backbone.train()
        return self.fc(self.neck(seen).flatten(1))

def instance(kind="Net"):
    return globals()[kind](nn.InstanceNorm2d)

def dropping(kind="Stays"):
    return globals()[kind](drop=0.5)

class Returning(Net):
    "As some write it: train() returns nothing."
    def train(self, mode=True):
        super().train(mode)
        self.apply(lambda layer: layer.eval() if "BatchNorm" in type(layer).__name__ else None)

def fixed():
    return Net(torchvision_like)

def torchvision_like(channels, affine, track_running_stats):
    from torchvision.ops import FrozenBatchNorm2d
    return FrozenBatchNorm2d(channels)

def frozen():
    net = Net()
    net.backbone.requires_grad_(False)
    return net

def alone():
    layers = nn.Conv2d(1, 4, 3, 4), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*layers)
"""


@pytest.fixture
def user(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(MODELS)

    def read(factory: str, **overrides: object) -> Spec:
        changes = {"model__weights": None, "model__mode": "train", **overrides}
        return sample("undefended", model__factory=f"{tmp_path / 'nets.py'}:{factory}", **changes)

    return read


def the_clients_own(spec: Spec) -> nn.Module:
    """The model as a client has it, who calls ``train()`` and no code of this project."""
    torch.manual_seed(spec.seed)
    net = build_module(spec.model.factory or "", spec.model.kwargs, spec.folder, "model")
    net.train(spec.model.mode == "train")
    return net


def plain(net: nn.Module, model: ClientModel, images: torch.Tensor, labels: list[int]) -> Gradient:
    """The gradient by a plain backward pass."""
    net = copy.deepcopy(net)
    F.cross_entropy(net(model.normalize(images)), torch.tensor(labels)).backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def away(one: Gradient, other: Gradient) -> float:
    """The squared relative distance."""
    return float(
        sum(((one[n] - other[n]) ** 2).sum() for n in other)  # type: ignore[arg-type]
        / sum((other[n] ** 2).sum() for n in other)
    )


MIXTURES = [
    ("Net", {}, []),
    ("Net", {"model__eval_modules": ["backbone"]}, ["backbone"]),
    ("Net", {"model__eval_modules": ["*.1"]}, ["backbone.1", "neck.1"]),
    ("Net", {"model__mode": "eval"}, []),
    ("Stays", {}, []),
    ("Stays", {"model__mode": "eval"}, []),
    ("LastTrains", {}, []),
    ("LastTrains", {"model__mode": "eval"}, []),
    ("Inside", {}, []),
    ("Returning", {}, []),
    ("fixed", {}, []),
    ("dropping", {}, []),
    ("instance", {}, []),
    ("instance", {"model__kwargs": {"kind": "Stays"}}, []),
    ("instance", {"model__eval_modules": ["neck.*"]}, ["neck"]),
    ("frozen", {"model__eval_modules": ["backbone"]}, ["backbone"]),
]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("factory", "declared", "evaluated"), MIXTURES)
def test_every_mixture_of_modes_is_that_of_a_plain_loop(
    user: Callable[..., Spec],
    factory: str,
    declared: dict[str, object],
    evaluated: list[str],
    batch_size: int,
) -> None:
    spec = user(factory, capture__batch_size=batch_size, **declared)
    net = the_clients_own(spec)
    for name in evaluated:
        net.get_submodule(name).eval()
    model = load_model(spec, CPU)
    images, labels = torch.rand(2, batch_size, 1, 16, 16), torch.randint(10, (2, batch_size))
    found = ClientGradients(model, Pipeline()).gradients(images, labels)
    for index in range(2):
        expected = plain(net, model, images[index], labels[index].tolist())
        assert away({n: t[index] for n, t in found.items()}, expected) < 1e-10


def test_modes_differ_where_they_should(user: Callable[..., Spec]) -> None:
    images, labels = torch.rand(1, 1, 1, 16, 16), torch.tensor([[3]])
    found = [
        ClientGradients(load_model(user("Net", **declared), CPU), Pipeline()).gradients(
            images, labels
        )
        for declared in (
            {},
            {"model__eval_modules": ["backbone"]},
            {"model__eval_modules": ["neck"]},
            {"model__mode": "eval"},
        )
    ]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert away(one, other) > 1e-3


def test_batch_norm_of_a_batch_mixes_and_that_of_running_statistics_does_not(
    user: Callable[..., Spec],
) -> None:
    mixing = {
        "Net": True,
        "Stays": True,
        "LastTrains": True,
        "Inside": True,
        "instance": False,
        "alone": True,
    }
    for factory, mixes in mixing.items():
        assert load_model(user(factory, capture__batch_size=3), CPU).mixes is mixes, factory
    still = {"model__eval_modules": ["*"]}
    assert not load_model(user("Net", capture__batch_size=3, **still), CPU).mixes


def test_a_clip_of_each_sample_goes_by_the_layers(user: Callable[..., Spec]) -> None:
    declared = [DefenseSpec.model_validate({"name": "clip", "bound": 1.0, "unit": "sample"})]
    defense = build_pipeline(declared, Path(), 2)
    still = {"model__eval_modules": ["backbone", "neck"], "capture__batch_size": 2}
    defense.bind(load_model(user("Net", **still), CPU))
    with pytest.raises(ValueError, match="mixes the samples"):
        defense.bind(
            load_model(user("LastTrains", model__mode="eval", **{"capture__batch_size": 2}), CPU)
        )


def test_dropout_is_refused_only_where_it_drops(user: Callable[..., Spec]) -> None:
    for declared in ({}, {"model__kwargs": {"kind": "Net"}, "model__eval_modules": ["*.3"]}):
        load_model(user("dropping", **declared), CPU)
    with pytest.raises(SpecError, match=r"train, but backbone\.3 drops units at random"):
        load_model(user("dropping", model__kwargs={"kind": "Net"}), CPU)


def test_running_statistics_are_needed_where_they_are_used(
    user: Callable[..., Spec], tmp_path: Path
) -> None:
    state = the_clients_own(user("Net")).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({n: t for n, t in state.items() if not n.startswith("neck.1.running")}, path)
    given = {"model__weights": str(path)}
    for factory in ("Stays", "Inside", "LastTrains"):
        load_model(user(factory, **given), CPU)
    with pytest.raises(InputError, match=r"has no 'neck.1.running_mean'"):
        load_model(user("Net", model__mode="eval", **given), CPU)
    save_file({n: t for n, t in state.items() if not n.startswith("backbone.1.running")}, path)
    load_model(user("Net", **given), CPU)
    for factory, declared in (
        ("Stays", {}),
        ("Returning", {}),
        ("fixed", {}),
        ("Inside", {}),
        ("Net", {"model__eval_modules": ["backbone"]}),
    ):
        with pytest.raises(InputError, match=r"has no 'backbone.1.running_mean'"):
            load_model(user(factory, **given, **declared), CPU)


def test_a_report_can_say_which_layers_are_in_another_mode(user: Callable[..., Spec]) -> None:
    def apart(factory: str, **declared: object) -> list[str]:
        spec = user(factory, **declared)
        return in_other_mode(load_model(spec, CPU).module, spec.model.mode)

    assert apart("Net") == []
    assert apart("Stays") == ["backbone.1", "backbone.3"]
    assert apart("LastTrains", model__mode="eval") == ["neck.1"]
    assert apart("Inside") == ["backbone.1"]


@pytest.mark.parametrize(
    ("factory", "declared", "key", "words"),
    [
        ("Both", {}, ("model", "factory"), r"calls backbone\.1 in train mode and in eval mode"),
        (
            "Net",
            {"model__eval_modules": ["neck", "backbne"]},
            ("model", "eval_modules", 1),
            "'backbne' is no module of the model. Did you mean 'backbone'",
        ),
    ],
)
def test_modes_that_cannot_be_are_named(
    user: Callable[..., Spec],
    factory: str,
    declared: dict[str, object],
    key: tuple[str | int, ...],
    words: str,
) -> None:
    with pytest.raises(SpecError, match=words) as error:
        load_model(user(factory, **declared), CPU)
    assert error.value.key == key


def test_eval_modules_are_for_a_factory_in_train_mode(user: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match="eval_modules are for a factory in mode: train"):
        user("Net", model__mode="eval", model__eval_modules=["neck"])


def fitting(spec: Spec, images: torch.Tensor, observed: Gradient, labels: list[int]) -> list[str]:
    """The other declarations under which the images give what was observed."""
    others, causes = digits("private").images[:40], []
    for cause, other in other_declarations(spec, load_model(spec, CPU)):
        matching = Matching(load_model(other, CPU), Pipeline())
        tried = torch.tensor(labels)
        check = check_truth(matching, Pipeline(), observed, images, others, tried)
        causes += [cause.text] if check.outcome == "agrees" else []
    return causes


@pytest.mark.parametrize(
    ("factory", "declared", "evaluated", "cause"),
    [
        ("Net", {}, ["backbone"], "in train mode, with eval_modules: [backbone]"),
        ("Net", {"model__mode": "eval"}, ["backbone"], "with eval_modules: [backbone]"),
        ("Net", {}, ["backbone", "neck"], "in eval mode"),
        ("Net", {"model__eval_modules": ["backbone"]}, [], "in train mode"),
        ("instance", {}, ["backbone"], "in train mode, with eval_modules: [backbone]"),
        ("frozen", {}, ["backbone"], "in train mode, with eval_modules: [backbone]"),
    ],
)
def test_the_mode_of_a_right_capture_is_found(
    user: Callable[..., Spec],
    factory: str,
    declared: dict[str, object],
    evaluated: list[str],
    cause: str,
) -> None:
    spec = user(factory, **declared)
    net = the_clients_own(spec)
    net.train()
    for name in evaluated:
        net.get_submodule(name).eval()
    images, labels = digits("private").images[:1], digits("private").labels[:1].tolist()
    model = load_model(spec, CPU)
    observed = plain(net, model, images, labels)
    found = fitting(spec, images, observed, labels)
    assert found
    assert all(one.endswith(cause) for one in found)
    declared_one = the_clients_own(spec)
    for name in spec.model.eval_modules:
        declared_one.get_submodule(name).eval()
    right = plain(declared_one, model, images, labels)
    assert fitting(spec, images, right, labels) == []


def test_of_many_frozen_layers_the_largest_parts_are_named(user: Callable[..., Spec]) -> None:
    spec = user("frozen")
    causes = [cause.text for cause, _ in other_declarations(spec, load_model(spec, CPU))]
    assert "the model was in train mode, with eval_modules: [backbone]" in causes
    model = load_model(user("Net"), CPU)
    fixed = {n: t for n, t in model.parameters.items() if n.startswith("neck.1")}
    kept = {n: t for n, t in model.parameters.items() if n not in fixed}
    partly = replace(model, parameters=kept, constants={**model.constants, **fixed})
    causes = [cause.text for cause, _ in other_declarations(spec, partly)]
    assert "the model was in train mode, with eval_modules: [neck]" in causes
