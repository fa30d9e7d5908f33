from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from typer.testing import CliRunner

from ggl_audit.basics.gradient import Gradient, norm
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.interpreter import UnsupportedError
from ggl_audit.inputs.model import differentiable_attention
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.programs import load_exported
from ggl_audit.spec import Spec
from tests.conftest import SAMPLES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not reference an nn.Module:UserWarning"),
]

CPU = torch.device("cpu")
DIGITS = SAMPLES / "digits_undefended.yaml"
GREY, COLOUR = (1, 16, 16), (3, 32, 32)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def normalized() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(784, 10),
    )
    net[1].running_mean.uniform_(-1, 1)  # type: ignore[operator, union-attr]
    return net


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Dropout(0.5), nn.Linear(8, 10))


def grouped() -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.GELU(), nn.Flatten())
    return nn.Sequential(*layers, nn.LayerNorm(784), nn.Linear(784, 10))


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


class Buffered(nn.Module):
    """With a buffer, a constant, a split into parts and a size in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(256, 10)
        self.register_buffer("scale", torch.full((1, 256), 2.0))
        self.offset = torch.arange(10.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images.view(images.size(0), -1) * self.scale
        left, right = features.chunk(2, 1)
        return self.last(torch.cat([right, left], 1)) + self.offset


def exported(
    net: nn.Module, images: torch.Tensor, path: Path, fixed: bool = False, taken_apart: bool = False
) -> nn.Module:
    dynamic = None if fixed else ({0: torch.export.Dim("batch", min=1, max=512)},)
    torch._dynamo.reset()  # PyTorch 2.6 exports no more than 8 in one process
    program = torch.export.export(net, (images,), dynamic_shapes=dynamic)
    with path.open("wb") as file:
        torch.export.save(program.run_decompositions() if taken_apart else program, file)
    return load_exported(path)


def taken_apart(net: nn.Module, images: torch.Tensor, path: Path) -> nn.Module:
    return exported(net, images, path, taken_apart=True)


def own_gradients(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[Gradient]:
    """A plain backward pass on each batch."""
    gradients = []
    for batch, own in zip(images, labels, strict=True):
        net.zero_grad()
        F.cross_entropy(net(batch), own).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        )
    return gradients


def mapped_gradients(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: Gradient, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(module, parameters, (images,)), labels)

    with differentiable_attention():
        return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)  # type: ignore[no-any-return]


@pytest.mark.parametrize("save", [exported, taken_apart])
@pytest.mark.parametrize("make", [lenet, normalized, dropping, grouped, Buffered])
def test_a_program_has_the_names_and_the_gradients_of_the_original(
    make: Callable[[], nn.Module], save: Any, tmp_path: Path
) -> None:
    _compare(make, GREY, save, tmp_path)


@pytest.mark.parametrize("save", [exported, taken_apart])
@pytest.mark.parametrize("make", [resnet, transformer])
def test_torchvision_models_as_programs(
    make: Callable[[], nn.Module], save: Any, tmp_path: Path
) -> None:
    _compare(make, COLOUR, save, tmp_path)


def _compare(
    make: Callable[[], nn.Module], shape: tuple[int, int, int], save: Any, folder: Path
) -> None:
    torch.manual_seed(0)
    net = make().eval()
    images, labels = torch.rand(2, 2, *shape), torch.randint(10, (2, 2))
    program = save(net, images[0], folder / "program.pt2").eval()
    assert [n for n, _ in program.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert set(net.state_dict()) <= set(program.state_dict())
    gradients = mapped_gradients(program, images, labels)
    for index, plain in enumerate(own_gradients(net, images, labels)):
        whole = norm(plain)
        for name, tensor in plain.items():
            away = (gradients[name][index] - tensor).norm()
            assert away <= 1e-5 * tensor.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("save", [exported, taken_apart])
@pytest.mark.parametrize(("make", "shape"), [(normalized, GREY), (transformer, COLOUR)])
def test_a_program_can_be_differentiated_forward(
    make: Callable[[], nn.Module], shape: tuple[int, int, int], save: Any, tmp_path: Path
) -> None:
    net, images = make().eval(), torch.rand(2, *shape)
    program = save(net, images, tmp_path / "program.pt2").eval().double()
    parameters = {name: p.detach() for name, p in program.named_parameters()}
    random = torch.Generator().manual_seed(0)
    tangents = {
        name: torch.randn(p.shape, generator=random, dtype=p.dtype)
        for name, p in parameters.items()
    }

    def outputs(module: nn.Module, parameters: Gradient) -> torch.Tensor:
        found: torch.Tensor = functional_call(module, parameters, (images.double(),))
        return found

    with differentiable_attention():
        _, tangent = jvp(lambda p: outputs(program, p), (parameters,), (tangents,))
    step, original = 1e-6, net.double()
    with torch.no_grad():
        moved = [
            outputs(original, {n: p + sign * step * tangents[n] for n, p in parameters.items()})
            for sign in (1, -1)
        ]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_other_numbers_of_images_than_a_fixed_batch(tmp_path: Path) -> None:
    net = normalized().eval()
    program = exported(net, torch.rand(2, *GREY), tmp_path / "p.pt2", fixed=True).eval()
    for count in (1, 2, 3, 5):
        images = torch.rand(count, *GREY)
        torch.testing.assert_close(program(images), net(images))


def test_copies_leave_the_statistics_of_a_batch_as_they_are(tmp_path: Path) -> None:
    net = normalized().train()
    program = exported(net, torch.rand(4, *GREY), tmp_path / "p.pt2", fixed=True).train()
    for count in (1, 2, 4):
        images = torch.rand(count, *GREY)
        torch.testing.assert_close(program(images), net(images))
    with pytest.raises(UnsupportedError, match="for 4 images, not 3"):
        program(torch.rand(3, *GREY))


@pytest.fixture
def declare(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    """A spec of the sample audit with a program as its model."""

    def read(**more: Any) -> Spec:
        model = {"exported": str(tmp_path / "program.pt2"), "input": {"shape": [*GREY]}}
        for key in [key for key in more if key.startswith("model__")]:
            model[key.removeprefix("model__")] = more.pop(key)
        return sample("undefended", model=model, **more)

    return read


@pytest.mark.parametrize("save", [exported, taken_apart])
def test_a_saved_mode_has_to_be_declared(
    save: Any, declare: Callable[..., Spec], tmp_path: Path
) -> None:
    for own, other in (("train", "eval"), ("eval", "train")):
        save(normalized().train(own == "train"), torch.rand(2, *GREY), tmp_path / "program.pt2")
        load_model(declare(model__mode=own, capture__batch_size=2), CPU)
        with pytest.raises(SpecError, match=f"{other}, but the program .* in {own} mode") as error:
            load_model(declare(model__mode=other, capture__batch_size=2), CPU)
        assert error.value.key == ("model", "mode")


@pytest.mark.parametrize("save", [exported, taken_apart])
def test_training_uses_batch_statistics_and_leaves_buffers_alone(
    save: Any, declare: Callable[..., Spec], tmp_path: Path
) -> None:
    net = normalized().train()
    images, labels = torch.rand(4, *GREY), torch.arange(4)
    save(net, images, tmp_path / "program.pt2")
    model = load_model(declare(model__mode="train", capture__batch_size=4), CPU)
    before = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    found = vmap(grad(model.loss), in_dims=(None, 0, 0))(
        model.parameters, images[None], labels[None]
    )
    for name, tensor in own_gradients(net, images[None], labels[None])[0].items():
        torch.testing.assert_close(found[name][0], tensor, rtol=1e-4, atol=1e-6)
    assert before
    for name, buffer in model.module.named_buffers():
        assert torch.equal(before[name], buffer), name


@pytest.mark.parametrize("save", [exported, taken_apart])
def test_active_dropout_is_refused(save: Any, declare: Callable[..., Spec], tmp_path: Path) -> None:
    save(dropping().train(), torch.rand(2, *GREY), tmp_path / "program.pt2")
    with pytest.raises(SpecError, match="draws at random"):
        load_model(declare(model__mode="train", capture__batch_size=2), CPU)


def test_a_batch_of_another_size_than_the_exported_one(
    declare: Callable[..., Spec], tmp_path: Path
) -> None:
    exported(lenet(), torch.rand(4, *GREY), tmp_path / "program.pt2", fixed=True)
    assert load_model(declare(capture__batch_size=4), CPU).classes == 10
    with pytest.raises(SpecError, match=r"exported for 4 images at a time.*dynamic_shapes"):
        load_model(declare(), CPU)


def test_a_program_that_takes_multiples_of_the_batch(
    declare: Callable[..., Spec], tmp_path: Path
) -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(256, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(images.reshape(-1, 2, 256)).reshape(-1, 10)

    net = Paired()
    batch = 2 * torch.export.Dim("pairs", max=256)
    program = torch.export.export(net, (torch.rand(4, *GREY),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    model = load_model(declare(capture__batch_size=2), CPU)
    for count in (2, 3, 4):
        images = torch.rand(count, *GREY)
        expected = net.last(images.flatten(1))
        torch.testing.assert_close(model.logits(model.parameters, images), expected)
    with pytest.raises(SpecError, match="does not take images"):
        load_model(declare(), CPU)


@pytest.mark.parametrize("save", [exported, taken_apart])
def test_the_head_of_a_program_is_found(
    save: Any, declare: Callable[..., Spec], tmp_path: Path
) -> None:
    net = lenet()
    save(net, torch.rand(2, *GREY), tmp_path / "program.pt2")
    model = load_model(declare(), CPU)
    assert model.head is not None
    assert (model.head.weight, model.head.bias) == ("5.weight", "5.bias")
    images = torch.rand(3, *GREY)
    torch.testing.assert_close(model.representation(images), net[:5](images))  # type: ignore[index]


class Several(nn.Module):
    """Returns two tensors, in a tuple or a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.last = nn.Linear(256, 10), nn.Linear(256, 10)

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = images.flatten(1)
        return self.aux(seen), self.last(seen)


class InATuple(Several):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.both(images)


class InADict(Several):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        aux, logits = self.both(images)
        return {"aux": aux, "logits": logits}


@pytest.mark.parametrize("kind", [InATuple, InADict])
@pytest.mark.parametrize("save", [exported, taken_apart])
def test_a_program_that_returns_several_tensors(
    save: Any, kind: type[Several], declare: Callable[..., Spec], tmp_path: Path
) -> None:
    net = kind()
    save(net, torch.rand(2, *GREY), tmp_path / "program.pt2")
    declared = {"model__output": 1} if kind is InATuple else {}
    model = load_model(declare(**declared), CPU)
    assert model.output == (1 if kind is InATuple else "logits")
    assert model.head is not None
    assert model.head.weight == "last.weight"
    images = torch.rand(3, *GREY)
    torch.testing.assert_close(model.logits(model.parameters, images), net.both(images)[1])
    if kind is InATuple:
        with pytest.raises(SpecError, match="not given, but the model returned a tuple of 0"):
            load_model(declare(), CPU)


@pytest.mark.parametrize("kind", [InATuple, InADict])
def test_other_numbers_of_images_where_several_tensors_are_returned(
    kind: type[Several], tmp_path: Path
) -> None:
    net = kind()
    program = exported(net, torch.rand(2, *GREY), tmp_path / "p.pt2", fixed=True)
    for count in (1, 2, 3):
        images = torch.rand(count, *GREY)
        torch.testing.assert_close(program(images), net(images))


def test_an_audit_of_a_program(
    declare: Callable[..., Spec], sample: Callable[..., Spec], tmp_path: Path
) -> None:
    net = load_model(sample("undefended"), CPU).module
    exported(net, torch.rand(2, *GREY), tmp_path / "program.pt2")
    shape = {"shape": [*GREY], "mean": [0.5], "std": [0.5]}
    case = prepare(declare(model__input=shape))
    assert case.audited.labels == [2]
    assert case.model.module.training is False
    assert any(path.endswith("program.pt2") for path, _ in case.files)
    assert all(check.outcome == "agrees" for check in case.audited.checks)


def test_weights_of_a_file_take_the_place_of_the_program_s(
    declare: Callable[..., Spec], tmp_path: Path
) -> None:
    net, other = Buffered(), Buffered()
    exported(net, torch.rand(2, *GREY), tmp_path / "program.pt2")
    torch.save(other.state_dict(), tmp_path / "other.pt")  # without what is constant in the code
    model = load_model(declare(model__weights=str(tmp_path / "other.pt")), CPU)
    assert torch.equal(model.parameters["last.weight"], other.last.weight)
    images = torch.rand(2, *GREY)
    torch.testing.assert_close(model.logits(model.parameters, images), other(images))


class Mark:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def repack(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info.filename)))


def test_an_expression_in_an_exported_program_is_not_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    exported(lenet(), torch.rand(2, *GREY), tmp_path / "good.pt2")

    def poison(part: Any) -> Any:
        if isinstance(part, dict):
            evil = f"__import__('os').mkdir({str(mark)!r})"
            return {k: evil if k == "expr_str" else poison(v) for k, v in part.items()}
        return [poison(one) for one in part] if isinstance(part, list) else part

    def change(name: str, content: bytes) -> bytes:
        return json.dumps(poison(json.loads(content))).encode() if "models/" in name else content

    repack(tmp_path / "good.pt2", tmp_path / "bad.pt2", change)
    load_exported(tmp_path / "bad.pt2")
    assert not mark.exists()


@pytest.mark.parametrize("target", ["torch.hub.os.mkdir", "os.mkdir", "_operator.call", "#x"])
def test_a_function_by_name_in_an_exported_program_is_refused(target: str, tmp_path: Path) -> None:
    exported(lenet(), torch.rand(2, *GREY), tmp_path / "good.pt2")

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.sigmoid.default", target.encode())

    repack(tmp_path / "good.pt2", tmp_path / "bad.pt2", change)
    with pytest.raises(InputError, match=f"the operator {target}"):
        load_exported(tmp_path / "bad.pt2")


@pytest.mark.parametrize("operator", ["from_file.default", "save.default", "rand.default"])
def test_operators_that_reach_beyond_their_arguments_are_refused(
    operator: str, tmp_path: Path
) -> None:
    exported(lenet(), torch.rand(2, *GREY), tmp_path / "good.pt2")

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"aten.sigmoid.default", f"aten.{operator}".encode())

    repack(tmp_path / "good.pt2", tmp_path / "bad.pt2", change)
    with pytest.raises(InputError, match=f"operator aten::{operator.partition('.')[0]}"):
        load_exported(tmp_path / "bad.pt2")


@pytest.mark.parametrize(
    ("part", "before"),
    [("weights", "state_dict"), ("constants", "constants"), ("sample_inputs", "example_inputs")],
)
def test_a_pickle_in_an_exported_program_runs_nothing(
    part: str, before: str, tmp_path: Path
) -> None:
    """In the files that PyTorch has written since 2.8, and before."""
    exported(Buffered(), torch.rand(2, *GREY), tmp_path / "good.pt2")
    mark = tmp_path / "was_here"
    saved = io.BytesIO()
    torch.save(Mark(mark), saved)
    names = {"weights": "last.weight", "constants": None, "sample_inputs": None}

    def change(name: str, content: bytes) -> bytes:
        if name.endswith(f"model_{part}_config.json"):
            config = json.loads(content)
            own = names[part] or next(iter(config["config"]))
            config["config"][own]["use_pickle"] = True
            return json.dumps(config).encode()
        inside = f"data/{part}/" in name and not name.endswith(".json")
        return saved.getvalue() if inside or name == f"serialized_{before}.pt" else content

    repack(tmp_path / "good.pt2", tmp_path / "bad.pt2", change)
    if part == "sample_inputs":
        load_exported(tmp_path / "bad.pt2")  # they are not even read
    else:
        with pytest.raises(InputError, match=r"saved as a pickle|could run code"):
            load_exported(tmp_path / "bad.pt2")
    assert not mark.exists()


MODEL = ("models/model.json", "serialized_exported_program.json")
"""The end of a program's name in its file, since PyTorch 2.8 and before."""


def older(target: Path, net: nn.Module, images: torch.Tensor, weights: Any) -> None:
    """Writes a program as PyTorch did up to 2.7."""
    exported(net, images, target)
    with zipfile.ZipFile(target) as new:
        model = json.loads(next(new.read(n) for n in new.namelist() if n.endswith(MODEL)))
    model["graph_module"]["signature"]["input_specs"].reverse()  # not in the model's order
    saved, none = io.BytesIO(), io.BytesIO()
    torch.save(weights, saved)
    torch.save({}, none)
    with zipfile.ZipFile(target, "w") as old:
        old.writestr("version", "8.8")
        old.writestr("serialized_exported_program.json", json.dumps(model))
        old.writestr("serialized_state_dict.pt", saved.getvalue())
        old.writestr("serialized_constants.pt", none.getvalue())


def test_the_format_of_older_versions(tmp_path: Path) -> None:
    net, images = lenet(), torch.rand(2, *GREY)
    path = tmp_path / "p.pt2"
    older(path, net, images, dict(net.state_dict(keep_vars=True)))
    program = load_exported(path)
    torch.testing.assert_close(program(images), net(images))
    assert [n for n, _ in program.named_parameters()] == [n for n, _ in net.named_parameters()]
    mark = tmp_path / "was_here"
    older(path, net, images, {"5.weight": Mark(mark)})
    with pytest.raises(InputError):
        load_exported(path)
    assert not mark.exists()


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_exported(tmp_path / "gone.pt")
    with pytest.raises(InputError, match="not a file"):
        load_exported(tmp_path)
    (tmp_path / "text.pt").write_text("model")
    torch.save(lenet().state_dict(), tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(InputError, match=r"not a (whole )?torch\.export file"):
            load_exported(tmp_path / name)


@pytest.mark.parametrize("traced", [False, True])
def test_a_torchscript_file_is_told_what_it_is_wherever_it_is_named(
    traced: bool, sample: Callable[..., Spec], tmp_path: Path
) -> None:
    path, images = tmp_path / "old.pt", torch.rand(2, *GREY)
    torch.jit.save(torch.jit.trace(lenet(), images) if traced else torch.jit.script(lenet()), path)
    program = {"exported": str(path), "input": {"shape": [*GREY]}}
    prior = {"exported": str(path), "latent": {"shape": [48]}}
    specs = [
        sample("undefended", model=program),
        sample("undefended", model__weights=str(path)),
        sample("undefended", prior=prior),
        sample("undefended", capture__gradient=str(path)),
    ]
    for spec in specs:
        with pytest.raises(InputError, match="a TorchScript file, which PyTorch has") as error:
            prepare(spec)
        assert "torch.export.save" in error.value.said.remedy
        assert error.value.path == path
    result = CliRunner().invoke(app, ["check", str(DIGITS), "--model", str(path)])
    assert result.exit_code == 2
    assert "a TorchScript file" in " ".join(result.stderr.split())


def test_the_weights_of_a_torchscript_file_are_read_as_a_state_dict(
    declare: Callable[..., Spec], tmp_path: Path
) -> None:
    """What the message says to do."""
    net, other = lenet(), lenet()
    exported(net, torch.rand(2, *GREY), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.script(other), tmp_path / "old.pt")
    state = torch.jit.load(tmp_path / "old.pt").state_dict()
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(declare(model__weights=str(tmp_path / "weights.pt")), CPU)
    assert torch.equal(model.parameters["5.weight"], other.state_dict()["5.weight"])


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("programs") / "p.pt2"
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
    exported(net, torch.rand(2, 1, 2, 2), path)
    return path.read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_program(
    data: st.DataObject, small_file: bytes, tmp_path_factory: Any
) -> None:
    content = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.one_of(st.none(), st.integers(0, len(content)))) or len(content) :]
    path = tmp_path_factory.mktemp("damaged") / "p.pt2"
    path.write_bytes(content)
    try:
        program = load_exported(path)
    except InputError:
        return
    assert isinstance(program, nn.Module)
