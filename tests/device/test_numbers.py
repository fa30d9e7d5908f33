"""What is computed on a device is what the processor computes, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.matching import Distance, Matching
from ggl_audit.attack.residuals import Residuals
from ggl_audit.basics.gradient import Gradient, each, stack
from ggl_audit.client.randomness import client_context
from ggl_audit.defenses import (
    Clip,
    Context,
    Defense,
    FloatFormat,
    Noise,
    Pipeline,
    Qsgd,
    Quantize,
    RandomK,
    Sign,
    Sparsify,
    TernGrad,
    Threshold,
)
from ggl_audit.evidence.fidelity import candidate_distances
from ggl_audit.inputs.model import ClientModel
from ggl_audit.optimizers import Evaluation, start_optimizer
from ggl_audit.priors.loading import load_prior
from ggl_audit.spec import AttackSpec, Spec

pytestmark = pytest.mark.device

CPU = torch.device("cpu")
SHAPE, CLASSES = (3, 12, 12), 5
TRIALS, CANDIDATES = 2, 6
CLOSE = {"rtol": 2e-3, "atol": 2e-4}
"""Of sums of float32 in another order."""


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8 * 36, CLASSES),
    )


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Linear(32, CLASSES),
    )


def client(make: Callable[[], nn.Module], device: torch.device) -> ClientModel:
    torch.manual_seed(0)
    module = make().eval().to(device)
    one = torch.ones(1, 1, 1, device=device)
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}
    buffers = dict(module.named_buffers())
    return ClientModel(module, parameters, buffers, SHAPE, 0.5 * one, 0.5 * one, 1.0, CLASSES, None)


def material(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(TRIALS, CANDIDATES, 1, *SHAPE, generator=random)
    labels = torch.arange(TRIALS * CANDIDATES).reshape(TRIALS, CANDIDATES, 1) % CLASSES
    return images.to(device), labels.to(device)


def observations(model: ClientModel, steps: list[Defense]) -> Gradient:
    """Defended gradients of the first candidates, with the processor's randomness everywhere."""
    images, labels = material(CPU)
    matching = Matching(client_on_cpu(model), Pipeline([]))
    found = matching.clients.gradients(images[:, 0], labels[:, 0])
    sent = [
        Pipeline(steps).apply(
            each(lambda t, i=i: t[i], found), Context(torch.Generator().manual_seed(i))
        )
        for i in range(TRIALS)
    ]
    return each(lambda tensor: tensor.to(model.device), stack(sent))


def client_on_cpu(model: ClientModel) -> ClientModel:
    return client(plain if isinstance(model.module[1], nn.ReLU) else normalized, CPU)


CASES: list[tuple[Callable[[], nn.Module], list[Defense], Distance]] = [
    (plain, [], "likelihood"),
    (normalized, [], "l2"),
    (normalized, [Sparsify(fraction=0.9)], "cosine"),
    (plain, [Sign()], "l2"),
    (normalized, [Clip(bound=0.5), Noise(std=0.01)], "likelihood"),
    (plain, [Quantize(bits=4)], "likelihood"),
    (plain, [Clip(bound=0.5, scope="layer")], "cosine"),
    (normalized, [FloatFormat(format="bfloat16")], "l2"),
    (plain, [Threshold(least=1e-3)], "likelihood"),
]


def named(value: object) -> str:
    """The same in every process, as a function's address is not."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("make", "steps", "distance"), CASES, ids=named)
def test_distances(
    device: torch.device,
    make: Callable[[], nn.Module],
    steps: list[Defense],
    distance: Distance,
) -> None:
    expected = computed(make, steps, distance, CPU)
    found = computed(make, steps, distance, device)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.cpu(), expected[name], **CLOSE)


def computed(
    make: Callable[[], nn.Module], steps: list[Defense], distance: Distance, device: torch.device
) -> dict[str, torch.Tensor]:
    """The distances layer by layer and by whole gradients, residuals, derivatives."""
    model = client(make, device)
    images, labels = material(device)
    observed = observations(model, steps)
    pipeline = Pipeline(steps)
    matching = Matching(model, pipeline, distance)
    results = {
        "distances": matching.distances(images, labels, observed),
        "by gradients": matching._by_gradients(images, labels, observed),
    }
    if distance != "likelihood":
        results["residuals"], results["products"] = Residuals(matching)(images, labels, observed)
        derivatives = Derivatives(model, pipeline, distance)
        results["distance"], results["slopes"] = derivatives(images[:, 1], labels[:, 1], observed)
    return results


def test_a_step_that_is_repeated_takes_what_it_is_given(device: torch.device) -> None:
    """From the third on, CUDA repeats a recording; each has pictures of its own."""
    here, there = (Derivatives(client(plain, one), Pipeline([]), "l2") for one in (CPU, device))
    observed = observations(client(plain, CPU), [])
    images, labels = material(CPU)
    for number in range(CANDIDATES):
        given = images[:, number], labels[:, number]
        seen = each(lambda tensor: tensor.to(device), observed)
        found = there(*(tensor.to(device) for tensor in given), seen)
        for own, expected in zip(found, here(*given, observed), strict=True):
            torch.testing.assert_close(own.cpu(), expected, **CLOSE)
    assert device.type != "cuda" or any(there._sloped._recorded.values())


@pytest.mark.parametrize("members", [2])
def test_batches_by_turns(device: torch.device, members: int) -> None:
    def turned(where: torch.device) -> torch.Tensor:
        model = replace(client(plain, where), batch_size=members)
        matching = Matching(model, Pipeline([Sparsify(fraction=0.5)]), "l2")
        images, labels = material(where)
        candidates = images[:, :4].reshape(TRIALS, 2, 2, *SHAPE)
        given = images[:, 4:, 0]
        seen = matching.clients.gradients(given, labels[:, 4:, 0])
        return matching.distances_in_turn(candidates, labels[:, 4:, 0], 0.9 * given, seen).cpu()

    torch.testing.assert_close(turned(device), turned(CPU), **CLOSE)


RANDOM_STEPS: list[Defense] = [
    Noise(std=0.1),
    Noise(std=0.1, distribution="laplace"),
    Qsgd(levels=16),
    TernGrad(),
    RandomK(fraction=0.5),
    Sparsify(fraction=0.5, scope="global"),
]


@pytest.mark.parametrize("step", RANDOM_STEPS, ids=str)
def test_each_step_draws_on_the_device(device: torch.device, step: Defense) -> None:
    model = client(plain, device)
    context = client_context(0, "test", device, 0)
    gradient = each(torch.randn_like, dict(model.parameters))
    sent, again = (
        step.apply(gradient, client_context(0, "test", device, number)) for number in (0, 0)
    )
    assert context.generator.device.type == device.type
    for name, tensor in sent.items():
        assert tensor.device.type == device.type
        assert torch.equal(tensor.cpu(), again[name].cpu())
    replica = step.replicate(gradient, sent)
    assert {tensor.device.type for tensor in replica.values()} == {device.type}
    accused, detail = step.contradiction(sent, lambda *_: 0.0)
    assert not accused, detail


OPTIMIZERS = ["cma", "pycma:diagonal", "nevergrad:DE", "adam", "gauss_newton", "random"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_ask_and_are_told_on_the_device(device: torch.device, name: str) -> None:
    attack = AttackSpec(optimizer=name, evaluations=600, population=12)
    optimizer = start_optimizer(attack, 6)([0, 1], 600, device)
    target = torch.linspace(-1, 1, 6, device=device)

    def losses(latents: torch.Tensor) -> Evaluation:
        away = latents - target
        derivatives = 2 * away if optimizer.wants == "derivatives" else None
        products = None
        if optimizer.wants == "products":
            left = torch.cat([away[:, :1], away[:, 1:] - away[:, :1]], dim=1)
            products = left @ left.mT
        return Evaluation(away.square().sum(-1), derivatives=derivatives, products=products)

    first = None
    for _ in range(12):
        candidates = optimizer.ask()
        assert candidates.device.type == device.type
        told = losses(candidates)
        first = told.losses.amin(1) if first is None else first
        optimizer.tell(told)
    found = losses(optimizer.recommend()[:, None]).losses[:, 0]
    assert bool((found <= first).all())


def test_the_bundled_prior_draws_the_same_pictures(
    device: torch.device, sample: Callable[..., Spec]
) -> None:
    from ggl_audit.inputs.model_loading import load_model

    spec = sample("undefended")
    drawn = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    pictures = []
    for where in (CPU, device):
        prior = load_prior(spec, load_model(spec, where))
        assert prior.size == drawn.shape[1]
        pictures.append(prior.decode(drawn.to(where), torch.arange(4, device=where)).cpu())
    torch.testing.assert_close(pictures[1], pictures[0], **CLOSE)


def test_distances_of_pictures(device: torch.device) -> None:
    images, _ = material(CPU)
    found = []
    for where in (CPU, device):
        distances = candidate_distances(client(plain, where), None)
        pictures = images[0, :, 0].to(where)
        found.append({n: d(pictures[:1], pictures).cpu() for n, d in distances.items()})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **CLOSE)
