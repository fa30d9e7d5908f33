from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.attacks.suite import choose_attacks
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import InputError, SpecError
from ggl_audit.evidence.square_layers import LAYOUT
from ggl_audit.experiments.alternatives import other_layouts
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.layouts import flattened, trace_arrangements
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.judgement.assumptions import assumptions
from ggl_audit.spec import Spec

Tensors = dict[str, torch.Tensor]

FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, groups=4), nn.ReLU(),
        nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 16),
        nn.Tanh(), nn.Linear(16, 10))

class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(256, 10)
    def forward(self, x):
        return self.head(self.attention(x[:, 0], x[:, 0], x[:, 0])[0].flatten(1))
"""

# As Keras has the weights of the first of these.
KERAS = {
    "conv2d/kernel:0": (3, 3, 1, 4),
    "conv2d/bias:0": (4,),
    "depthwise_conv2d/depthwise_kernel:0": (3, 3, 4, 2),
    "depthwise_conv2d/bias:0": (8,),
    "batch_normalization/gamma:0": (128,),
    "batch_normalization/beta:0": (128,),
    "batch_normalization/moving_mean:0": (128,),
    "batch_normalization/moving_variance:0": (128,),
    "dense/kernel:0": (128, 16),
    "dense/bias:0": (16,),
    "dense_1/kernel:0": (16, 16),
    "dense_1/bias:0": (16,),
    "dense_2/kernel:0": (16, 10),
    "dense_2/bias:0": (10,),
}
STATISTICS = [name for name in KERAS if "moving" in name]


def windows(images: torch.Tensor) -> Any:
    """The 3x3 windows at every second place of (n, height, width, channels), one by one."""
    _, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    for row in range(3):
        for column in range(3):
            yield row, column, padded[:, row : row + height : 2, column : column + width : 2]


def keras_net(weights: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The network with channels last, of plain sums: (n, height, width, 1) to (n, 10)."""
    kernel, bias, depthwise, bias2, gamma, beta, mean, var, *dense = weights
    taken = images
    images = torch.relu(sum(part @ kernel[y, x] for y, x, part in windows(taken)) + bias)
    summed = sum((part[..., None] * depthwise[y, x]).flatten(-2) for y, x, part in windows(images))
    values = torch.relu(summed + bias2).flatten(1)
    values = (values - mean) / (var + 1e-5).sqrt() * gamma + beta
    for place, (matrix, offset) in enumerate(zip(dense[::2], dense[1::2], strict=True)):
        values = values @ matrix + offset
        if place < 2:
            values = torch.tanh(values)
    return values


@pytest.fixture
def keras() -> Tensors:
    torch.manual_seed(3)
    weights = {name: 0.2 * torch.randn(shape) for name, shape in KERAS.items()}
    weights["batch_normalization/moving_variance:0"].abs_()
    return weights


def keras_gradient(weights: Tensors, image: torch.Tensor, label: int) -> Tensors:
    trained = [t.clone().requires_grad_(n not in STATISTICS) for n, t in weights.items()]
    loss = F.cross_entropy(keras_net(trained, image[None]), torch.tensor([label]))
    named = zip(weights, trained, strict=True)
    wanted = {name: tensor for name, tensor in named if name not in STATISTICS}
    return dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()]), strict=True))


@pytest.fixture
def spec(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(FACTORY)

    def declare(factory: str = "net", **more: Any) -> Spec:
        keys = {
            "model__factory": f"{tmp_path / 'nets.py'}:{factory}",
            "model__input__mean": [0.0],
            "model__input__std": [1.0],
            "model__weights": str(tmp_path / "weights.npz"),
            "model__layout": "channels_last",
            "capture__layout": "channels_last",
            "evidence__truth": None,
        }
        return sample("undefended", **{**keys, **more})

    return declare


def save(path: Path, tensors: Tensors, kind: str) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if kind == "list":
        np.savez(path, *arrays.values())
    else:
        np.savez(path, **arrays)


def loaded(spec: Spec) -> ClientModel:
    return load_model(spec, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["list", "names of its own"])
def test_weights_and_gradients_of_keras_are_those_of_the_model(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path, kind: str
) -> None:
    save(tmp_path / "weights.npz", keras, kind)
    model = loaded(spec())
    image = torch.rand(16, 16, 1)
    own = model.logits(model.parameters, image.permute(2, 0, 1)[None])
    torch.testing.assert_close(own, keras_net([*keras.values()], image[None]))
    save(tmp_path / "g.npz", keras_gradient(keras, image, 3), kind)
    read = read_capture(tmp_path / "g.npz", model)
    assert "order of the trained parameters, channels last" in read.how
    loss = F.cross_entropy(model.module(image.permute(2, 0, 1)[None]), torch.tensor([3]))
    expected = torch.autograd.grad(loss, [*model.module.parameters()])
    for tensor, other in zip(read.gradient.values(), expected, strict=True):
        torch.testing.assert_close(tensor, other)


def test_what_is_accepted_as_weights_is_accepted_after_training(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    gradient = keras_gradient(keras, torch.rand(16, 16, 1), 3)
    after = {name: t - 0.1 * gradient.get(name, torch.zeros(())) for name, t in keras.items()}
    save(tmp_path / "after.npz", after, "list")
    update = {
        "capture__gradient": None,
        "capture__kind": "update",
        "capture__local": {"lr": 0.1},
        "capture__after": str(tmp_path / "after.npz"),
    }
    audited = prepare(spec(**update)).audited
    assert [check.outcome for check in audited.checks] == ["agrees"] * len(audited.checks)
    before = {**update, "capture__before": str(tmp_path / "weights.npz")}
    again = prepare(spec(**before)).audited.observed
    for name, tensor in audited.observed.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["list", "names of its own", "renamed"])
def test_channels_last_that_is_not_declared_is_recognised(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path, kind: str
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    model = loaded(spec(capture__layout="channels_first"))
    gradient = keras_gradient(keras, torch.rand(16, 16, 1), 3)
    if kind == "renamed":
        gradient = dict(zip(model.parameters, gradient.values(), strict=True))
    save(tmp_path / "g.npz", gradient, kind)
    words = r"looks like channels last.*\(3, 3, 1, 4\).*Declare capture.layout: channels_last"
    with pytest.raises(InputError, match=words):
        read_capture(tmp_path / "g.npz", model)
    with pytest.raises(InputError, match=r"looks like channels last.*Declare model.layout"):
        loaded(spec(model__layout="channels_first"))


def test_a_file_in_the_layout_of_pytorch_is_not_transposed(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    model = loaded(spec())
    torch.save({n: torch.ones_like(p) for n, p in model.parameters.items()}, tmp_path / "g.pt")
    with pytest.raises(InputError, match=r"is in PyTorch's layout.*Leave capture.layout out"):
        read_capture(tmp_path / "g.pt", model)


def test_names_that_are_sorted_are_no_order_of_layers(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    model = loaded(spec())
    gradient = keras_gradient(keras, torch.rand(16, 16, 1), 3)
    names = [name.replace("gamma", "t").replace("beta", "gamma") for name in gradient]
    swapped = dict(zip([n.replace("/t", "/beta") for n in names], gradient.values(), strict=True))
    save(tmp_path / "g.npz", swapped, "names")
    with pytest.raises(InputError, match=r"'batch_normalization/beta:0' where the model has"):
        read_capture(tmp_path / "g.npz", model)
    numbered = {
        name.replace("dense_1", "dense_10").replace("dense_2", "dense_9"): tensor
        for name, tensor in gradient.items()
    }
    save(tmp_path / "g.npz", numbered, "names")
    with pytest.raises(InputError, match=r"'dense_9/kernel:0' after others of higher numbers"):
        read_capture(tmp_path / "g.npz", model)


def test_what_has_no_known_layout_is_refused(spec: Callable[..., Spec], tmp_path: Path) -> None:
    declared = spec("Attended", model__weights=None)
    model = loaded(declared)
    found = {
        name: torch.ones(10, 256).T if name == "head.weight" else torch.ones_like(parameter)
        for name, parameter in model.parameters.items()
    }
    torch.save(found, tmp_path / "g.pt")
    words = r"how 'attention\.in_proj_weight' \(48, 16\) lies with channels last is not known"
    with pytest.raises(InputError, match=words):
        read_capture(tmp_path / "g.pt", model)


def test_what_the_client_s_own_code_returns_has_the_layout_of_pytorch(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    save(tmp_path / "g.npz", keras_gradient(keras, torch.rand(16, 16, 1), 3), "list")
    (tmp_path / "client.py").write_text(
        "import torch\n"
        "def step(model, images, labels):\n"
        "    loss = torch.nn.functional.cross_entropy(model(images), labels)\n"
        "    named = dict(model.named_parameters())\n"
        "    return dict(zip(named, torch.autograd.grad(loss, [*named.values()])))\n"
    )
    step = f"{tmp_path / 'client.py'}:step"
    case = prepare(spec(capture__gradient=str(tmp_path / "g.npz"), client__step=step))
    assert case.doubts == []
    with pytest.raises(SpecError, match="writes PyTorch's layout"):
        capture_gradient(case.spec, [], [])


def test_what_shapes_do_not_tell_is_tried_or_told(
    spec: Callable[..., Spec], keras: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "weights.npz", keras, "list")
    image = torch.rand(16, 16, 1)
    save(tmp_path / "g.npz", keras_gradient(keras, image, 3), "list")
    path = str(tmp_path / "g.npz")
    right = prepare(spec(capture__gradient=path))
    assert [check.outcome for check in right.audited.checks if check.step == LAYOUT] == ["agrees"]
    assert not any(
        "ambiguous" in said for said in assumptions(right, choose_attacks(right)).of(None)
    )
    own = dict(right.audited.observed)
    # All turned, but for the order of flattening; or all but one square matrix.
    flat = {**own, "6.weight": keras_gradient(keras, image, 3)["dense/kernel:0"].T}
    square = {**own, "8.weight": own["8.weight"].T}
    for number, (wrong, cause) in enumerate(
        [
            (flat, "the inputs of 6.weight are in the order height, width, channel"),
            (square, "the values of 8.weight are transposed"),
        ]
    ):
        torch.save(wrong, tmp_path / f"{number}.pt")
        plain = {"capture__layout": "channels_first", "capture__labels": [3]}
        plain["capture__gradient"] = str(tmp_path / f"{number}.pt")
        case = prepare(spec(**plain))
        others = {why.text: other.audited.observed for why, other in other_layouts(case)}
        assert all(torch.equal(others[cause][name], tensor) for name, tensor in own.items())
        told = [check.outcome for check in case.audited.checks if check.step == LAYOUT]
        assert told == (["contradicts"] if wrong is square else ["agrees"])
        noisy = prepare(spec(**plain, defense=[{"name": "noise", "std": 0.01}]))
        said = "Whether 8.weight is (out, in) or transposed is ambiguous"
        assert any(said in line for line in assumptions(noisy, choose_attacks(noisy)).of(None))


def test_a_model_that_does_not_run_is_named_before_its_layout(spec: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match="does not take images"):
        loaded(spec("Attended", model__weights=None, model__input__shape=[3, 5, 5]))


class Flat(nn.Module):
    """A feature map (n, 4, 6, 6) that is flattened in some way before a linear layer."""

    def __init__(self, way: Callable[[torch.Tensor], torch.Tensor], inputs: int = 144) -> None:
        super().__init__()
        self.convolution, self.way, self.linear = nn.Conv2d(3, 4, 3), way, nn.Linear(inputs, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.way(self.convolution(images)))
        return result


# Where of (height, width, channel) = (6, 6, 4) each input stands: an independent statement of it.
CHANNELS_FIRST = [(h * 6 + w) * 4 + c for c in range(4) for h in range(6) for w in range(6)]


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(input=x, start_dim=1),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.relu().reshape(len(x), 4, -1).flatten(1).sigmoid() * 2,
        lambda x: torch.cat(x.chunk(2, dim=1), dim=1).flatten(1),
        lambda x: F.max_pool2d(x, 1, return_indices=True)[0].flatten(1),
        lambda x: F.dropout(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).flatten(1), 0.0),
    ],
)
def test_the_places_of_a_flattened_map(way: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = Flat(way)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = flattened(trace_arrangements(module, torch.rand(2, 3, 8, 8)))
    assert places["linear.weight"].tolist() == CHANNELS_FIRST
    assert module.training
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@pytest.mark.parametrize(
    ("way", "inputs"),
    [
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), 144),
        (lambda x: x.mean((2, 3)), 4),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), 4),
        (lambda x: x.sum(1).flatten(1), 36),
    ],
)
def test_where_the_order_is_the_same(
    way: Callable[[torch.Tensor], torch.Tensor], inputs: int
) -> None:
    assert flattened(trace_arrangements(Flat(way, inputs), torch.rand(2, 3, 8, 8))) == {}


def test_two_maps_side_by_side_are_flattened_each() -> None:
    module = Flat(lambda x: torch.cat([x.flatten(1), x.mean((2, 3)), x.flatten(1)], 1), 292)
    places = flattened(trace_arrangements(module, torch.rand(2, 3, 8, 8)))["linear.weight"]
    second = [148 + place for place in CHANNELS_FIRST]
    assert places.tolist() == [*CHANNELS_FIRST, *range(144, 148), *second]


def test_colour_images_are_flattened_too_and_grey_ones_have_one_order() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    places = flattened(trace_arrangements(module, torch.rand(1, 3, 2, 2)))["1.weight"]
    assert places.tolist() == [
        (h * 2 + w) * 3 + c for c in range(3) for h in (0, 1) for w in (0, 1)
    ]
    assert flattened(trace_arrangements(module, torch.rand(1, 1, 3, 4))) == {}
