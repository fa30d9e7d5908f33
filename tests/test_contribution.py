from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, flat, norm, take
from ggl_audit.case.loading import load_client
from ggl_audit.client.contribution import ORDER, Contribution
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Context, Pipeline
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import Spec

CPU = torch.device("cpu")
BOUND = 0.5

Client = tuple[Pipeline, ClientModel]


def context(seed: int = 0) -> Context:
    return Context(torch.Generator().manual_seed(seed))


def batch(images: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    data = digits("private")
    chosen = slice(start, start + images)
    return data.images[chosen].double(), data.labels[chosen]


@pytest.fixture
def client(sample: Callable[..., Spec]) -> Callable[..., Client]:
    """In double precision, so that a comparison is one of formulas and not of rounding."""

    def build(batch_size: int, **keys: Any) -> Client:
        spec = sample("undefended", capture__batch_size=batch_size, evidence__truth=None, **keys)
        return load_client(spec, CPU, torch.float64)

    return build


def loss_of(
    module: nn.Module, model: ClientModel, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = module((images - model.mean) / model.std)
    reduction = "sum" if model.loss_sum else "mean"
    return model.loss_scale * F.cross_entropy(logits, labels, reduction=reduction)


def backward(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    module = copy.deepcopy(model.module)
    module.zero_grad()
    loss_of(module, model, images, labels).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def sgd(
    model: ClientModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    orders: list[torch.Tensor],
    together: int,
    proximal: float = 0.0,
    **options: float,
) -> Gradient:
    """Weights before training minus weights after it, by PyTorch's own optimizer."""
    module = copy.deepcopy(model.module)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), **options)
    for order in orders:
        for i in range(0, len(order), together):
            part = order[i : i + together]
            optimizer.zero_grad()
            loss = loss_of(module, model, images[part], labels[part])
            for name, parameter in module.named_parameters():
                loss = loss + proximal / 2 * (parameter - start[name]).square().sum()
            loss.backward()
            optimizer.step()
    return {name: start[name] - p.detach() for name, p in module.named_parameters()}


def assert_same(found: Gradient, expected: Gradient, tolerance: float = 1e-9) -> None:
    assert list(found) == list(expected)
    difference = {name: found[name] - expected[name] for name in expected}
    assert float(norm(difference)) <= tolerance * float(norm(expected))


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_gradient_of_a_batch_is_that_of_a_plain_backward_pass(
    client: Callable[..., Client], batch_size: int, reduction: str, scale: float
) -> None:
    defense, model = client(batch_size, model__loss={"reduction": reduction, "scale": scale})
    images, labels = batch(batch_size)
    found = Contribution(model, defense)(images, labels, {})
    assert_same(found, backward(model, images, labels))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_clip_of_each_sample_is_that_of_a_plain_loop(
    client: Callable[..., Client], batch_size: int, reduction: str, scope: str
) -> None:
    clip = {"name": "clip", "bound": BOUND, "unit": "sample", "scope": scope}
    defense, model = client(batch_size, defense=[clip], model__loss={"reduction": reduction})
    images, labels = batch(batch_size)
    expected = {name: torch.zeros_like(p) for name, p in model.parameters.items()}
    for image, label in zip(images, labels, strict=True):
        one = backward(model, image[None], label[None])
        for name, tensor in one.items():
            length = norm(one) if scope == "global" else tensor.norm()
            share = min(1.0, BOUND / float(length)) / (batch_size if reduction == "mean" else 1)
            expected[name] += share * tensor
    share = Contribution(model, defense)(images, labels, {})
    assert_same(defense.release([share], [context()]), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bound", [0.2, 1.0, 1e3])
def test_a_clip_of_each_sample_is_that_of_opacus(
    client: Callable[..., Client], activation: type[nn.Module], reduction: str, bound: float
) -> None:
    """Opacus is what clients run; its noise is switched off here."""
    reason = "opacus, a development dependency, is not installed"
    opacus = pytest.importorskip("opacus", reason=reason)
    optimizers = pytest.importorskip("opacus.optimizers", reason=reason)
    clip = {"name": "clip", "bound": bound, "unit": "sample"}
    defense, model = client(5, defense=[clip], model__loss={"reduction": reduction})
    for index, layer in enumerate(model.module):
        if isinstance(layer, nn.ReLU):
            model.module[index] = activation()
    images, labels = batch(5)

    module = opacus.GradSampleModule(copy.deepcopy(model.module), loss_reduction=reduction)
    module.train()
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=5,
        loss_reduction=reduction,
    )
    loss_of(module, model, images, labels).backward()
    optimizer.pre_step()
    expected = {n.removeprefix("_module."): p.grad.clone() for n, p in module.named_parameters()}

    found = Contribution(model, defense)(images, labels, {})
    assert_same(found, expected, tolerance=1e-5)
    for name in expected:
        assert_same({name: found[name]}, {name: expected[name]}, tolerance=1e-5)


LOCAL = [
    {},
    {"epochs": 3},
    {"epochs": 2, "momentum": 0.9},
    {"epochs": 2, "weight_decay": 0.05},
    {"epochs": 2, "proximal": 2.0},
    {"epochs": 3, "momentum": 0.5, "weight_decay": 0.01, "proximal": 0.3},
]


@pytest.mark.parametrize("local", LOCAL, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_update_is_that_of_pytorchs_optimizer(
    client: Callable[..., Client], batch_size: int, local: dict[str, float]
) -> None:
    """Three sets at once; of three images in batches of two, the last batch has one."""
    declared = {"lr": 0.3, "batch_size": 2, **local}
    defense, model = client(batch_size, capture__kind="update", capture__local=declared)
    images, labels = batch(3 * batch_size)
    sets = images.unflatten(0, (3, batch_size)), labels.unflatten(0, (3, batch_size))
    together = ClientGradients(model, defense).gradients(*sets)
    alone = Contribution(model, defense)
    options = {name: value for name, value in local.items() if name != "epochs"}
    for i in range(3):
        order = [torch.arange(batch_size)] * int(local.get("epochs", 1))
        expected = sgd(model, sets[0][i], sets[1][i], order, 2, lr=0.3, **options)
        assert_same(alone(sets[0][i], sets[1][i], {}), expected)
        assert_same(take(together, i), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_update_sees_the_reduction_and_the_scale_of_the_loss(
    client: Callable[..., Client], reduction: str
) -> None:
    loss = {"reduction": reduction, "scale": 0.2}
    local = {"lr": 0.2, "batch_size": 2, "epochs": 2}
    defense, model = client(3, capture__kind="update", capture__local=local, model__loss=loss)
    images, labels = batch(3)
    expected = sgd(model, images, labels, [torch.arange(3)] * 2, 2, lr=0.2)
    assert_same(Contribution(model, defense)(images, labels, {}), expected)


def test_local_batches_hold_all_images_unless_declared(client: Callable[..., Client]) -> None:
    defense, model = client(3, capture__kind="update", capture__local={"lr": 0.2, "epochs": 2})
    images, labels = batch(3)
    expected = sgd(model, images, labels, [torch.arange(3)] * 2, 3, lr=0.2)
    assert_same(Contribution(model, defense)(images, labels, {}), expected)


def test_a_shuffled_order_is_the_one_that_was_drawn(client: Callable[..., Client]) -> None:
    local = {"lr": 0.5, "epochs": 3, "batch_size": 2, "order": "shuffled", "momentum": 0.5}
    defense, model = client(4, capture__kind="update", capture__local=local)
    matching = Matching(model, defense)
    images, labels = batch(8)
    images, labels = images.unflatten(0, (2, 4)), labels.unflatten(0, (2, 4))
    drawn = matching.clients.draw(context(5), 2)
    assert drawn[ORDER].shape == (2, 3, 4)
    assert torch.equal(drawn[ORDER].sort(-1).values, torch.arange(4).expand(2, 3, 4))
    assert len({tuple(order.tolist()) for order in drawn[ORDER].flatten(0, 1)}) > 1
    found = matching.clients.gradients(images, labels, drawn)
    for i in range(2):
        expected = sgd(model, images[i], labels[i], list(drawn[ORDER][i]), 2, lr=0.5, momentum=0.5)
        assert_same(take(found, i), expected)
    fixed = take(matching.clients.gradients(images, labels), 0)
    assert float(norm({n: fixed[n] - found[n][0] for n in fixed})) > 1e-3 * float(norm(fixed))


def test_each_client_draws_its_own_order(client: Callable[..., Client]) -> None:
    local = {"lr": 0.5, "batch_size": 1, "order": "shuffled"}
    defense, model = client(8, capture__kind="update", capture__local=local)
    drawn = ClientGradients(model, defense).draw(context(), 6)[ORDER]
    assert len({tuple(order.flatten().tolist()) for order in drawn}) == 6


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_step_with_a_learning_rate_of_one_is_the_gradient(
    client: Callable[..., Client], batch_size: int
) -> None:
    defense, model = client(batch_size, capture__kind="update", capture__local={"lr": 1.0})
    images, labels = batch(batch_size)
    expected = backward(model, images, labels)
    assert_same(Contribution(model, defense)(images, labels, {}), expected)


def test_a_clip_of_each_sample_acts_in_every_local_step(client: Callable[..., Client]) -> None:
    clip = {"name": "clip", "bound": BOUND, "unit": "sample"}
    local = {"lr": 0.4, "epochs": 2, "batch_size": 2}
    defense, model = client(3, capture__kind="update", capture__local=local, defense=[clip])
    images, labels = batch(3)
    module = copy.deepcopy(model.module)
    for _ in range(2):
        for part in torch.arange(3).split(2):
            step = [torch.zeros_like(p) for p in module.parameters()]
            for i in part:
                module.zero_grad()
                loss_of(module, model, images[i][None], labels[i][None]).backward()
                grads = [p.grad for p in module.parameters()]
                length = float(torch.cat([g.flatten() for g in grads]).norm())
                for total, g in zip(step, grads, strict=True):
                    total += min(1.0, BOUND / length) / len(part) * g
            with torch.no_grad():
                for parameter, g in zip(module.parameters(), step, strict=True):
                    parameter -= 0.4 * g
    trained = dict(module.named_parameters())
    expected = {name: p - trained[name].detach() for name, p in model.parameters.items()}
    assert_same(Contribution(model, defense)(images, labels, {}), expected)


def test_many_sets_at_once_are_each_as_alone_whatever_the_chunk(
    client: Callable[..., Client],
) -> None:
    clip = {"name": "clip", "bound": BOUND, "unit": "sample"}
    defense, model = client(2, defense=[clip])
    images, labels = batch(10)
    sets = images.unflatten(0, (5, 2)), labels.unflatten(0, (5, 2))
    matching = Matching(model, defense)
    whole = matching.clients.gradients(*sets)
    matching.clients.chunk = 2
    parts = matching.clients.gradients(*sets)
    alone = Contribution(model, defense)
    for i in range(5):
        assert_same(take(whole, i), alone(sets[0][i], sets[1][i], {}))
        assert_same(take(parts, i), take(whole, i))


def test_nothing_is_left_behind_in_the_model(client: Callable[..., Client]) -> None:
    local = {"lr": 0.5, "epochs": 2, "momentum": 0.9}
    defense, model = client(2, capture__kind="update", capture__local=local)
    before = flat(model.parameters).clone()
    images, labels = batch(2)
    contribution = Contribution(model, defense)
    first = flat(contribution(images, labels, {}))
    assert torch.equal(first, flat(contribution(images, labels, {})))
    assert torch.equal(flat(model.parameters), before)
