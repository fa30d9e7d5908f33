from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import grad, jvp

from ggl_audit.basics.gradient import Gradient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import Spec
from tests.conftest import plain_gradient

CPU = torch.device("cpu")

USER_MODELS = """
import torch
import torchvision
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

class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(256, 10)
    def forward(self, x):
        return self.last(self.layers(x).flatten(1))

class Forgetful(Layers):
    def forward(self, x):
        return self.last(nn.functional.dropout(x.flatten(1), 0.5))

class Attending(Layers):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True)
    def forward(self, x):
        x = x.flatten(1).unflatten(1, (16, 16))
        return self.last(self.attention(x, x, x, need_weights=False)[0].flatten(1))

class Counting(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        return super().forward(x)

class Averaging(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 1, 16, 16))
    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0, keepdim=True))
        return super().forward(x - self.mean)

class Clamping(Layers):
    def forward(self, x):
        with torch.no_grad():
            self.last.weight.clamp_(-0.01, 0.01)
        return super().forward(x)

class PairsOnly(Layers):
    def forward(self, x):
        return self.last(x.reshape(2, 256))

class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(8, 10)
    def forward(self, x):
        return self.fc(self.body(x).squeeze())

class Few(Layers):
    def forward(self, x):
        assert len(x) < 20, "too many at a time"
        return super().forward(x)

class Weighing(Layers):
    "Weighs the images of a batch against each other."
    def forward(self, x):
        return super().forward(x) * len(x) * x.flatten(1).sum(1, keepdim=True).softmax(0)

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.LazyLinear(10), nn.LazyLinear(3)
    def forward(self, x):
        return self.used(x.flatten(1))

def narrow():
    layers = nn.Flatten(), nn.Linear(256, 4), nn.GroupNorm(4, 4), nn.Tanh(), nn.Linear(4, 10)
    return nn.Sequential(*layers)

def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10)
    )

def lazy():
    return nn.Sequential(
        nn.LazyConv2d(4, 3, 4), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)
    )

def parallel():
    return nn.DataParallel(convolutional())

def partly_parallel():
    net = convolutional()
    return nn.Sequential(nn.DataParallel(net[:3]), net[3])

def twice():
    return torch.compile(parallel(), backend="eager")

def compiled():
    return torch.compile(convolutional(), backend="eager")

def distributed():
    return nn.parallel.DistributedDataParallel(convolutional())

def sampled():
    from opacus import GradSampleModule
    return GradSampleModule(Layers())

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(10, 256))
        self.offset = nn.Parameter(torch.randn(10))
    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.kernel, self.offset)

def instance():
    return Layers(nn.InstanceNorm2d(1, affine=True, track_running_stats=True))

def layered():
    return Layers(nn.GroupNorm(1, 1), nn.LayerNorm(16), nn.InstanceNorm2d(1), nn.ReLU(inplace=True))

def pooled():
    return nn.Sequential(nn.Conv2d(1, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))

def residual():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10)

def dense():
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)

def transformer():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
"""


@pytest.fixture
def user(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(USER_MODELS)

    def read(factory: str, **overrides: object) -> Spec:
        return sample(
            "undefended",
            model__factory=f"{tmp_path / 'nets.py'}:{factory}",
            **{"model__weights": None, **overrides},
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


def _gradients_agree(model: ClientModel, original: nn.Module, shape: tuple[int, ...]) -> None:
    """Compares with a plain backward pass of the original, one batch after another."""
    count = model.batch_size
    images, labels = torch.rand(2, count, *shape), torch.randint(10, (2, count))
    found = ClientGradients(model, Pipeline()).gradients(images, labels)
    for index in range(2):
        original.zero_grad()
        F.cross_entropy(original(model.normalize(images[index])), labels[index]).backward()
        whole = torch.cat([p.grad.flatten() for p in original.parameters() if p.grad is not None])
        for name, parameter in original.named_parameters():
            assert parameter.grad is not None
            away = (found[name][index] - parameter.grad).norm()
            assert away <= 1e-5 * whole.norm(), name


COLOUR = {"shape": [3, 32, 32]}


@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [
        ("torchvision:resnet18", {"num_classes": 10}),
        ("torchvision:mobilenet_v3_small", {"num_classes": 10}),
        (
            "torchvision.models:VisionTransformer",
            {
                "image_size": 32,
                "patch_size": 8,
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 32,
                "mlp_dim": 64,
                "num_classes": 10,
            },
        ),
    ],
)
def test_torchvision_models_are_mapped_over_candidates(
    factory: str, kwargs: dict[str, int], sample: Callable[..., Spec]
) -> None:
    spec = sample(
        "undefended",
        model__factory=factory,
        model__kwargs=kwargs,
        model__weights=None,
        model__input=COLOUR,
        capture__batch_size=2,
    )
    model = load_model(spec, CPU)
    ClientGradients(model, Pipeline()).try_out()
    _gradients_agree(model, copy.deepcopy(model.module), (3, 32, 32))


@pytest.mark.parametrize("factory", ["layered", "instance", "dense", "transformer", "Functional"])
def test_models_in_eval_mode(user: Callable[..., Spec], factory: str) -> None:
    colour = {"model__input": COLOUR} if factory in ("dense", "transformer") else {}
    model = load_model(user(factory, **colour), CPU)
    _gradients_agree(model, copy.deepcopy(model.module), model.shape)


@pytest.mark.parametrize("factory", ["normed", "instance", "residual", "layered", "pooled"])
def test_models_in_train_mode_and_their_buffers(user: Callable[..., Spec], factory: str) -> None:
    colour = {"model__input": COLOUR} if factory == "residual" else {}
    spec = user(factory, model__mode="train", capture__batch_size=4, **colour)
    original = build_module(spec.model.factory or "", {}, spec.folder, "model").train()
    model = load_model(spec, CPU)
    original.load_state_dict({**original.state_dict(), **model.module.state_dict()})
    before = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    _gradients_agree(model, original, model.shape)
    model.representation(torch.rand(1, *model.shape))
    for name, buffer in model.module.named_buffers():
        assert torch.equal(before[name], buffer), name


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # PyTorch's own use
def test_attention_can_be_differentiated_in_either_way(user: Callable[..., Spec]) -> None:
    model = load_model(user("transformer", model__input=COLOUR), CPU, torch.float64)
    images, labels = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    fast = torch.backends.mha.get_fastpath_enabled()

    def loss(parameters: Gradient) -> torch.Tensor:
        return model.loss(parameters, images, labels)

    gradient = grad(loss)(model.parameters)
    tangent = {name: torch.randn_like(p) for name, p in model.parameters.items()}
    _, forward = jvp(loss, (model.parameters,), (tangent,))
    backward = sum(float((gradient[name] * tangent[name]).sum()) for name in gradient)
    assert float(forward) == pytest.approx(backward, rel=1e-8)
    assert torch.backends.mha.get_fastpath_enabled() is fast


@pytest.mark.parametrize(
    ("factory", "mode"), [("Forgetful", "eval"), ("Forgetful", "train"), ("Attending", "train")]
)
def test_randomness_anywhere_is_refused(user: Callable[..., Spec], factory: str, mode: str) -> None:
    with pytest.raises(SpecError, match=f"{mode}, but the model .* draws at random") as error:
        load_model(user(factory, model__mode=mode), CPU)
    assert error.value.key == ("model", "mode")


def test_attention_without_active_dropout_is_fine(user: Callable[..., Spec]) -> None:
    for more in (
        {"model__mode": "eval"},
        {"model__mode": "train", "model__kwargs": {"dropout": 0}},
    ):
        model = load_model(user("Attending", **more), CPU)
        _gradients_agree(model, copy.deepcopy(model.module), model.shape)


@pytest.mark.parametrize(
    ("factory", "mode", "what"),
    [
        ("Counting", "eval", "buffer calls"),
        ("Averaging", "train", "buffer mean"),
        ("Clamping", "eval", "parameter last.weight"),
    ],
)
def test_a_model_that_changes_itself_is_refused(
    user: Callable[..., Spec], factory: str, mode: str, what: str
) -> None:
    with pytest.raises(SpecError, match=f"changes its {what} in mode {mode}"):
        load_model(user(factory, model__mode=mode), CPU)
    load_model(user("Averaging"), CPU)


def test_a_model_that_knows_its_batch_is_refused(user: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match="takes 2 images at a time, but not 3"):
        load_model(user("PairsOnly", capture__batch_size=2), CPU)
    with pytest.raises(SpecError, match="does not take images"):
        load_model(user("PairsOnly"), CPU)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("factory", ["parallel", "compiled", "twice", "partly_parallel", "sampled"])
def test_wrappers_are_taken_off(user: Callable[..., Spec], factory: str, mode: str) -> None:
    model = load_model(user(factory, model__mode=mode, capture__batch_size=2), CPU)
    inner = {"sampled": "last.weight", "partly_parallel": "0.module.0.weight"}
    assert inner.get(factory, "0.weight") in model.parameters
    _gradients_agree(model, copy.deepcopy(model.module), model.shape)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without processes")
def test_a_wrapper_of_a_group_of_processes_is_taken_off(
    user: Callable[..., Spec], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="process group has not been initialized"):
        load_model(user("distributed"), CPU)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for mode in ("eval", "train"):
            model = load_model(user("distributed", model__mode=mode), CPU)
            _gradients_agree(model, copy.deepcopy(model.module), model.shape)
    finally:
        torch.distributed.destroy_process_group()


def test_lazy_layers_take_their_shapes_from_the_images(
    user: Callable[..., Spec], tmp_path: Path
) -> None:
    plain = load_model(user("convolutional"), CPU)
    path = tmp_path / "weights.safetensors"
    save_file({n: t for n, t in plain.state.items() if t.ndim}, path)
    for mode in ("eval", "train"):
        spec = user("lazy", model__weights=str(path), model__mode=mode)
        model = load_model(spec, CPU)
        assert {n: t.shape for n, t in model.parameters.items()} == {
            n: t.shape for n, t in plain.parameters.items()
        }
        assert all(torch.equal(model.parameters[n], t) for n, t in plain.parameters.items())
        _gradients_agree(model, copy.deepcopy(model.module), model.shape)
    fresh = load_model(user("lazy"), CPU).state
    assert torch.equal(fresh["1.running_mean"], torch.zeros(4))
    with pytest.raises(SpecError, match=r"other.weight of the model .* has no shape, and its"):
        load_model(user("Unused"), CPU)


@pytest.mark.parametrize("factory", ["Squeezing", "narrow"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_models_that_take_no_single_image(
    user: Callable[..., Spec], factory: str, batch_size: int
) -> None:
    model = load_model(user(factory, capture__batch_size=batch_size), CPU, torch.float64)
    assert (model.fewest, model.mixes) == (2, False)
    _gradients_agree(model, copy.deepcopy(model.module), model.shape)
    images, labels = torch.rand(3, *model.shape).double(), torch.tensor([4, 7, 1])
    found = ClientGradients(model, Pipeline()).gradients(images, labels)
    features = [model.representation(image[None]) for image in images]
    for index, image in enumerate(images):
        # A mean over two copies is what one image would give.
        module = copy.deepcopy(model.module)
        outputs = module(model.normalize(torch.stack([image, image])))
        F.cross_entropy(outputs, labels[index].repeat(2)).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-4, atol=1e-7)
        feature = features[index]
        assert feature is not None
        weight, bias = list(model.parameters.values())[-2:]
        torch.testing.assert_close(feature @ weight.T + bias, outputs[:1].detach())


def test_a_model_that_takes_no_single_image_of_a_single_one(user: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match=r"returned a tensor \(10,\) for 1 images"):
        load_model(user("Squeezing"), CPU)
    with pytest.raises(SpecError, match=r"does not take images .* more than 1 value per channel"):
        load_model(user("narrow"), CPU)


def test_a_number_of_images_that_is_not_taken_is_told(user: Callable[..., Spec]) -> None:
    model = load_model(user("Few"), CPU)
    with pytest.raises(SpecError, match=r"does not take 20 images of \[1, 16, 16\] at a time") as e:
        model.representation(torch.rand(20, *model.shape))
    assert "AssertionError: too many at a time" in str(e.value)


def test_a_model_that_weighs_images_against_each_other_is_found(user: Callable[..., Spec]) -> None:
    for batch_size in (1, 2, 64):
        assert load_model(user("Weighing", capture__batch_size=batch_size), CPU).mixes
        assert not load_model(user("Layers", capture__batch_size=batch_size), CPU).mixes


def test_a_head_by_function_is_found(user: Callable[..., Spec]) -> None:
    model = load_model(user("Functional"), CPU)
    assert model.head is not None
    assert (model.head.weight, model.head.bias) == ("kernel", "offset")
    images = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(model.representation(images), model.normalize(images).flatten(1))


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
