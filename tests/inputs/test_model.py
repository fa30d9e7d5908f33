from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import grad

from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.model import ClientModel, load_model
from ggl_audit.spec import Spec
from tests.conftest import plain_gradient

CPU = torch.device("cpu")

USER_MODELS = """
import torch
from torch import nn

def normed(mode_probe=False):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 14 * 14, 10))

def dropping():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10))

def frozen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 10))
    net[1].requires_grad_(False)
    return net

def headless():
    return nn.Sequential(nn.Conv2d(1, 10, 16), nn.Flatten())

def failing():
    raise RuntimeError("no data")

def leaving():
    raise SystemExit(0)

class Rectified(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(256, 10)
        nn.init.constant_(self.last.bias, 0.3)
    def forward(self, x):
        return nn.functional.relu(self.last(x.flatten(1)))

def text():
    return "a model"

def regression():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 1))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(256, 10)
    def forward(self, x):
        x = x.flatten(1)
        return self.head(x if x.sum() > 0 else -x)
"""


@pytest.fixture
def user(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(USER_MODELS)

    def read(factory: str, **overrides: object) -> Spec:
        return sample(
            "undefended",
            model__factory=f"{tmp_path / 'nets.py'}:{factory}",
            model__weights=None,
            **overrides,
        )

    return read


def test_the_loss_and_its_gradient_are_those_of_a_plain_backward_pass(model: ClientModel) -> None:
    image, label = torch.rand(1, 16, 16), 7
    ours = grad(model.loss)(model.parameters, image[None], torch.tensor([label]))
    plain = plain_gradient(model, image, label)
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)


def test_the_loss_scale_scales_the_gradient(sample: Callable[..., Spec]) -> None:
    image, label = torch.rand(1, 1, 16, 16), torch.tensor([1])
    once = load_model(sample("undefended"), CPU)
    twice = load_model(sample("undefended", model__loss={"scale": 2.0}), CPU)
    g1 = grad(once.loss)(once.parameters, image, label)
    g2 = grad(twice.loss)(twice.parameters, image, label)
    torch.testing.assert_close(g2["7.bias"], 2 * g1["7.bias"])


def test_the_head_and_its_representation_are_found(model: ClientModel) -> None:
    assert model.head is not None
    assert (model.head.weight, model.head.bias) == ("7.weight", "7.bias")
    images = torch.rand(3, 1, 16, 16)
    features = model.representation(images)
    assert features is not None
    weight, bias = model.parameters["7.weight"], model.parameters["7.bias"]
    torch.testing.assert_close(features @ weight.T + bias, model.logits(model.parameters, images))


def test_frozen_parameters_are_no_part_of_the_gradient(user: Callable[..., Spec]) -> None:
    model = load_model(user("frozen"), CPU)
    assert list(model.parameters) == ["3.weight", "3.bias"]


def test_a_model_without_a_linear_head_has_none(user: Callable[..., Spec]) -> None:
    assert load_model(user("headless"), CPU).head is None


def test_a_rectified_layer_is_no_head(user: Callable[..., Spec]) -> None:
    assert load_model(user("Rectified"), CPU).head is None


def test_train_mode_uses_batch_statistics_and_leaves_buffers_alone(
    user: Callable[..., Spec],
) -> None:
    image = torch.rand(1, 1, 16, 16)
    train = load_model(user("normed", model__mode="train"), CPU)
    module = train.module
    expected = torch.nn.Sequential(*module)((image - 0.5) / 0.5)
    got = train.logits(train.parameters, image)
    torch.testing.assert_close(got, expected)
    evaluated = load_model(user("normed"), CPU)
    before = {k: v.clone() for k, v in evaluated.constants.items()}
    evaluated.logits(evaluated.parameters, image)
    assert all(torch.equal(before[k], v) for k, v in evaluated.constants.items())
    assert not torch.allclose(evaluated.logits(evaluated.parameters, image), got)


def test_the_same_seed_builds_the_same_model(user: Callable[..., Spec]) -> None:
    one, other = load_model(user("headless"), CPU), load_model(user("headless"), CPU)
    assert torch.equal(one.parameters["0.weight"], other.parameters["0.weight"])


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("headles", "Did you mean 'headless'"),
        ("failing", "RuntimeError: no data"),
        ("leaving", "SystemExit: 0"),
        ("text", "returned a str"),
        ("regression", "expected logits"),
    ],
)
def test_a_factory_that_gives_no_classifier_is_named(
    user: Callable[..., Spec], factory: str, words: str
) -> None:
    with pytest.raises(SpecError, match=words) as error:
        load_model(user(factory), CPU)
    assert error.value.key == ("model", "factory")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("models.py", "is not file.py:callable"),
        ("gone.py:net", "is not a file"),
        ("no_such_package_here:net", "ModuleNotFoundError"),
        ("torchvision:resnet81", "Did you mean 'resnet"),
    ],
)
def test_a_factory_that_is_not_there(sample: Callable[..., Spec], factory: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_model(sample("undefended", model__factory=factory, model__weights=None), CPU)


def test_torchvision_models_by_name(sample: Callable[..., Spec]) -> None:
    spec = sample(
        "undefended",
        model__factory="torchvision:resnet18",
        model__kwargs={"num_classes": 10},
        model__weights=None,
        model__input={"shape": [3, 32, 32]},
    )
    model = load_model(spec, CPU)
    assert model.classes == 10
    assert model.head is not None
    assert model.head.weight == "fc.weight"


def test_images_that_the_model_does_not_take(sample: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match=r"model.input.shape: the model .* does not take"):
        load_model(sample("undefended", model__input={"shape": [3, 16, 16]}), CPU)


def test_dropout_in_train_mode_is_refused(user: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match="drops units at random"):
        load_model(user("dropping", model__mode="train"), CPU)
    load_model(user("dropping"), CPU)


def test_weights_that_do_not_fit_are_named(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    good = load_file(samples / "weights" / "round_0.safetensors")
    path = tmp_path / "w.safetensors"

    def loaded(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, path)
        load_model(sample("undefended", model__weights=str(path)), CPU)

    loaded(good)
    with pytest.raises(InputError, match=r"has no '7.bias' \(10,\)"):
        loaded({k: v for k, v in good.items() if k != "7.bias"})
    with pytest.raises(InputError, match=r"holds 'extra'"):
        loaded({**good, "extra": torch.zeros(1)})
    with pytest.raises(InputError, match=r"'7.bias' has the shape \(9,\)"):
        loaded({**good, "7.bias": torch.zeros(9)})
    with pytest.raises(InputError, match=r"'7.bias' holds values that are NaN"):
        loaded({**good, "7.bias": torch.full((10,), torch.nan)})
