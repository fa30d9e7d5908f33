"""Models that return more than one tensor, with the losses that clients take of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.attack.labels import infer_labels
from ggl_audit.attack.layers import parts_of
from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import stack
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import ReasonError, SpecError
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.outputs import candidates, choose, described, first_rows
from ggl_audit.spec import Spec

CPU = torch.device("cpu")

MODELS = """
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
import torch
from torch import nn
from torch.nn import functional as F

Out = namedtuple("Out", ["logits", "aux"])
Pair = namedtuple("Pair", ["main", "aux"])

class ModelOutput(OrderedDict):
    "As the transformers library has it: a dict whose keys are attributes."
    def __getattr__(self, name):
        return self[name] if name in self else super().__getattribute__(name)

@dataclass
class Answer:
    logits: torch.Tensor
    aux: torch.Tensor
    loss: torch.Tensor | None = None

RETURNED = {
    "tensor": lambda main, aux: main,
    "named": Out,
    "pair": Pair,
    "tuple": lambda main, aux: (main, aux),
    "single": lambda main, aux: (main,),
    "scalar": lambda main, aux: (main, aux.square().mean()),
    "dict": lambda main, aux: {"logits": main, "aux": aux},
    "other": lambda main, aux: {"aux": aux, "main": main},
    "transformers": lambda main, aux: ModelOutput(logits=main, aux=aux),
    "object": Answer,
    "namespace": lambda main, aux: SimpleNamespace(main=main, aux=aux, hidden=(aux, aux)),
    "packed": lambda main, aux: torch.cat([main, aux], 1),
    "nothing": lambda main, aux: {"loss": main.mean(), "kind": "none"},
    "list": lambda main, aux: [aux, main],
}

class Net(nn.Module):
    def __init__(self, returns="named", squeezes=False):
        super().__init__()
        self.returns, self.squeezes = returns, squeezes
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.Tanh())
        self.aux = nn.Linear(12, 10)
        self.fc = nn.Linear(12, 10)
    def forward(self, x):
        seen = self.body(x)
        if self.squeezes:
            seen = seen.squeeze()
        return RETURNED[self.returns](self.fc(seen), self.aux(seen))

def both(out, y, weight=0.4):
    if isinstance(out, (Out, Pair, tuple, list)):
        main, aux = out
    elif isinstance(out, torch.Tensor):
        main, aux = out[:, :10], out[:, 10:]
    elif isinstance(out, dict):
        main, aux = out.get("logits", out.get("main")), out["aux"]
    else:
        main, aux = getattr(out, "logits", None), out.aux
        main = out.main if main is None else main
    if aux.ndim == 0:
        return F.cross_entropy(main, y) + weight * aux
    return F.cross_entropy(main, y) + weight * F.cross_entropy(aux, y)

def of_class(out, y):
    assert type(out) is Out
    return both(out, y)
"""

OUTPUTS = {
    "tensor": None,
    "named": "logits",
    "single": 0,
    "scalar": 0,
    "dict": "logits",
    "transformers": "logits",
    "object": "logits",
}
"""What is plain, by what is returned."""

DECLARED = {
    "pair": "main",
    "tuple": 0,
    "list": 1,
    "other": "main",
    "namespace": "main",
}
"""What has to be declared."""


@pytest.fixture
def user(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(MODELS)

    def read(returns: str, loss: str | None = None, **overrides: object) -> Spec:
        changes: dict[str, object] = {
            "model__weights": None,
            "model__kwargs": {"returns": returns},
            **overrides,
        }
        if loss is not None:
            changes["model__loss"] = f"{tmp_path / 'nets.py'}:{loss}"
        return sample("undefended", model__factory=f"{tmp_path / 'nets.py'}:Net", **changes)

    return read


def agrees_with_a_plain_loop(
    spec: Spec, plain_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Compares the mapped gradients with backward passes through the module's own parts."""
    model = load_model(spec, CPU)
    net = copy.deepcopy(model.module)
    batch_size = model.batch_size
    images, labels = torch.rand(2, batch_size, 1, 16, 16), torch.randint(10, (2, batch_size))
    found = ClientGradients(model, Pipeline()).gradients(images, labels)
    for index in range(2):
        net.zero_grad()
        seen = net.body(model.normalize(images[index]))  # type: ignore[operator]
        main, aux = net.fc(seen), net.aux(seen)  # type: ignore[operator]
        plain_loss(main, aux, labels[index]).backward()
        for name, parameter in net.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][index], expected, rtol=1e-4, atol=1e-6)


def alone(main: torch.Tensor, _aux: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(main, labels)


def together(main: torch.Tensor, aux: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(main, labels) + 0.4 * F.cross_entropy(aux, labels)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("returns", [*OUTPUTS, *DECLARED])
def test_the_loss_is_of_the_output(
    user: Callable[..., Spec], returns: str, batch_size: int
) -> None:
    declared = {"model__output": DECLARED[returns]} if returns in DECLARED else {}
    spec = user(returns, capture__batch_size=batch_size, **declared)
    model = load_model(spec, CPU)
    assert model.output == {**OUTPUTS, **DECLARED}[returns]
    assert (model.classes, model.whole) == (10, False)
    agrees_with_a_plain_loop(spec, alone)


@pytest.mark.parametrize(
    "returns",
    [
        "named",
        "pair",
        "tuple",
        "list",
        "dict",
        "other",
        "object",
        "transformers",
        "namespace",
        "packed",
    ],
)
def test_a_loss_of_ones_own_is_given_all(user: Callable[..., Spec], returns: str) -> None:
    for batch_size in (1, 2):
        spec = user(returns, "both", capture__batch_size=batch_size)
        if returns == "list":
            agrees_with_a_plain_loop(spec, lambda main, aux, y: together(aux, main, y))
        else:
            agrees_with_a_plain_loop(spec, together)
        assert load_model(spec, CPU).whole is (returns != "packed")


def test_a_loss_of_ones_own_is_given_what_is_declared(user: Callable[..., Spec]) -> None:
    spec = user("named", "both", model__output="aux")
    with pytest.raises(SpecError, match="cannot be taken of outputs"):
        load_model(spec, CPU)  # as the loss asks for two
    kwargs = {"factory": "torch.nn.functional:cross_entropy"}
    agrees_with_a_plain_loop(
        user("named", model__loss=kwargs, model__output="aux"),
        lambda main, aux, labels: F.cross_entropy(aux, labels),
    )


def test_the_class_that_a_loss_asks_for_is_the_models(user: Callable[..., Spec]) -> None:
    agrees_with_a_plain_loop(user("named", "of_class"), together)


def test_what_is_no_tensor_of_the_batch_is_given_too(user: Callable[..., Spec]) -> None:
    agrees_with_a_plain_loop(
        user("scalar", "both"),
        lambda main, aux, labels: F.cross_entropy(main, labels) + 0.4 * aux.square().mean(),
    )


@pytest.mark.parametrize(
    ("returns", "declared", "key", "words"),
    [
        ("tuple", None, "output", r"a tuple of 0 \(1, 10\), 1 \(1, 10\) for 1 images.*output: 0"),
        ("pair", None, "output", r"a Pair of 'main' \(1, 10\), 'aux' \(1, 10\).*output: main"),
        ("other", None, "output", r"a dict of 'aux' \(1, 10\), 'main' \(1, 10\).*output: aux"),
        ("namespace", None, "output", r"a SimpleNamespace of 'main'.*'hidden' tuple.*own, which"),
        ("nothing", None, "factory", r"a dict of 'loss' \(\), 'kind' str .*expected one tensor"),
        ("tensor", "logits", "output", r"'logits', but the model returned a tensor \(1, 10\)"),
        ("named", "logit", "output", r"'logit', but the model returned a Out of 'logits'"),
        ("dict", 2, "output", r"2, but the model returned a dict of"),
        ("tuple", 2, "output", r"2, but the model returned a tuple of"),
        ("namespace", "hidden", "output", r"which is a tuple of 0 .*expected one tensor with a"),
        ("scalar", 1, "output", r"1, which is a tensor \(\) for 1 images; expected one"),
    ],
)
def test_what_is_not_plain_is_listed_with_the_way_out(
    user: Callable[..., Spec], returns: str, declared: Any, key: str, words: str
) -> None:
    with pytest.raises(SpecError, match=words) as error:
        load_model(user(returns, model__output=declared), CPU)
    assert error.value.key == ("model", key)


@pytest.mark.parametrize("returns", ["named", "dict", "tuple", "object"])
def test_the_head_is_that_of_the_output(user: Callable[..., Spec], returns: str) -> None:
    declared = {"model__output": 0} if returns == "tuple" else {}
    model = load_model(user(returns, **declared), CPU)
    assert model.head is not None
    assert model.head.weight == "fc.weight"
    images = torch.rand(3, 1, 16, 16)
    features = model.representation(images)
    assert features is not None
    weight, bias = model.parameters["fc.weight"], model.parameters["fc.bias"]
    torch.testing.assert_close(features @ weight.T + bias, model.logits(model.parameters, images))
    gradients = ClientGradients(model, Pipeline()).gradients(images, torch.tensor([4, 7, 1]))
    assert infer_labels(gradients, model.head).tolist() == [4, 7, 1]


@pytest.mark.parametrize(
    ("returns", "known"), [("named", True), ("dict", True), ("tuple", True), ("object", False)]
)
def test_layer_by_layer_where_that_is_exact(
    user: Callable[..., Spec], returns: str, known: bool
) -> None:
    model = load_model(user(returns, "both"), CPU)
    images, labels = torch.rand(4, 1, 16, 16), torch.tensor([1, 2, 3, 4])
    matching = Matching(model, Pipeline(), "l2")
    assert (matching._layer_wise is not None) is known
    observed = stack([{n: t[0] for n, t in matching.clients.gradients(images, labels).items()}])
    distances = matching.distances(images[None], labels[None], observed)[0]
    whole = matching._by_gradients(images[None, :, None], labels[None, :, None], observed)[0]
    torch.testing.assert_close(distances, whole, rtol=1e-3, atol=1e-5)
    assert float(distances[0]) < 1e-6
    assert float(distances[1:].min()) > 1e-3
    if known:
        parts = {part.name: part for part in parts_of(model, images, labels)}
        assert set(parts) == set(model.parameters)


def test_what_mixes_the_batch_is_not_taken_layer_by_layer(user: Callable[..., Spec]) -> None:
    model = load_model(user("scalar", "both"), CPU)
    assert Matching(model, Pipeline())._layer_wise is None


@pytest.mark.parametrize("returns", ["named", "dict", "object"])
def test_a_single_image_that_is_squeezed_away(user: Callable[..., Spec], returns: str) -> None:
    kwargs = {"returns": returns, "squeezes": True}
    spec = user(returns, model__kwargs=kwargs, capture__batch_size=3)
    model = load_model(spec, CPU)
    assert model.fewest == 2
    images, labels = torch.rand(3, 1, 16, 16), torch.tensor([1, 2, 3])
    own = ClientGradients(model, Pipeline()).gradients(images, labels)
    whole = ClientGradients(model, Pipeline()).gradients(images[None], labels[None])
    for name, tensor in own.items():
        torch.testing.assert_close(tensor.mean(0), whole[name][0], rtol=1e-4, atol=1e-6)


def test_places_of_what_is_returned() -> None:
    rows, other = torch.rand(3, 10), torch.rand(4, 3)
    assert candidates(rows, 3) == [None]
    assert candidates(other, 3) == []
    assert candidates({"a": other, "b": rows}, 3) == ["b"]
    assert candidates([rows, rows], 3) == [0, 1]
    assert candidates({"logits": other, "b": rows}, 3) == ["b"]
    assert choose([other, rows], 1) is rows
    assert choose({"a": other, "b": rows}, 1) is rows
    assert choose(rows, None) is rows
    for returned, place in (([rows], 1), (rows, 0), (rows, "T"), ({"a": rows}, "b"), (None, 0)):
        with pytest.raises(LookupError):
            choose(returned, place)
    assert described((rows, None)) == "a tuple of 0 (3, 10), 1 NoneType"
    assert described(range(3)) == "a range"
    assert described([rows] * 12).endswith("7 (3, 10), 4 more")
    cut = first_rows({"a": rows, "b": [other, 2.0, None]}, 2, 3)
    assert cut["a"].shape == (2, 10)
    assert cut["b"][0] is other
    with pytest.raises(ReasonError, match="cannot be cut"):
        first_rows(nn.Identity(), 1, 2)
