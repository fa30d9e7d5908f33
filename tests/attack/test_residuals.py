from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.attack.objective import LatentObjective
from ggl_audit.attack.residuals import Residuals, compressed
from ggl_audit.basics.gradient import flat, norm, stack
from ggl_audit.defenses import Clip, Context, Defense, Noise, Pipeline, Quantize, Sign, shipped
from ggl_audit.defenses.capabilities import HasSmoothReplica
from ggl_audit.defenses.sparsify import Sparsify
from ggl_audit.inputs.model import ClientModel
from ggl_audit.priors.loading import load_prior
from ggl_audit.spec import RegularizerSpec, Spec
from tests.conftest import plain_gradient

PIPELINES: list[list[Defense]] = [
    [],
    [Sparsify(fraction=0.9)],
    [Clip(bound=0.5)],
    [Sign()],
    [Clip(bound=1.0), Quantize(bits=3)],
]


def context() -> Context:
    return Context(torch.Generator().manual_seed(0))


def case(model: ClientModel, defense: Pipeline) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, 4, 1, 1, 16, 16, generator=random)
    labels = torch.randint(10, (2, 4, 1), generator=random)
    truths = torch.rand(2, 1, 16, 16, generator=random)
    observed = [defense.apply(plain_gradient(model, truth, 3), context()) for truth in truths]
    return images, labels, observed


@pytest.mark.parametrize("way", ["layer by layer", "whole gradients"])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("steps", PIPELINES, ids=lambda s: str(Pipeline(s)))
def test_products_are_those_of_residuals_of_a_plain_loop(
    model: ClientModel,
    steps: list[Defense],
    distance: Any,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "whole gradients":
        monkeypatch.setattr(Matching, "residual_products", lambda *_: None)
    defense = Pipeline(steps)
    images, labels, observed = case(model, defense)
    matching = Matching(model, defense, distance)
    losses, products = Residuals(matching)(images, labels, stack(observed))
    expected = matching.distances(images, labels, stack(observed))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    for t, seen in enumerate(observed):
        rows = []
        for n in range(4):
            gradient = plain_gradient(model, images[t, n, 0], int(labels[t, n, 0]))
            smooth = defense.replica.smooth([gradient], seen)
            if distance == "l2":
                rows.append((flat(seen) - flat(smooth)) / norm(seen))
            else:
                rows.append((flat(seen) / norm(seen) - flat(smooth) / norm(smooth)) * 0.5**0.5)
        table = torch.stack(rows)
        table[1:] -= table[0].clone()
        torch.testing.assert_close(products[t], table @ table.T, rtol=2e-3, atol=2e-5)
        if defense.replica.is_smooth:
            torch.testing.assert_close(products[t, 0, 0], losses[t, 0], rtol=1e-3, atol=1e-6)


def test_compression_keeps_products_on_average_and_short_ones_exactly() -> None:
    random = torch.Generator().manual_seed(0)
    residuals = torch.randn(3, 60_000, generator=random)
    assert compressed(residuals, 60_000) is residuals
    small = compressed(residuals, 4096)
    assert small.shape == (3, 4096)
    # The error of a product of two is about |a| |b| sqrt(2 / m).
    error = (small @ small.T - residuals @ residuals.T).abs() / 60_000
    assert float(error.max()) < 5 * (2 / 4096) ** 0.5
    assert float(error.max()) > 0


@pytest.mark.parametrize("step", [Sign(), Sign(scale="mean"), Quantize(bits=2), Quantize(bits=4)])
def test_a_smooth_replica_has_slopes_where_the_replica_has_none(
    model: ClientModel, step: Defense
) -> None:
    images, _, _ = case(model, Pipeline([step]))
    gradient = plain_gradient(model, images[0, 0, 0], 1)
    observed = step.apply(plain_gradient(model, images[0, 1, 0], 1), context())
    weight = "0.weight"

    def moved(method: Any) -> float:
        other = dict(gradient) | {weight: gradient[weight] * 1.001}
        other[weight].view(-1)[0] *= 1.01
        before, after = method(gradient, observed), method(other, observed)
        return float((after[weight] - before[weight]).view(-1)[1:5].abs().max())

    own = moved(step.smooth)
    assert own > 0
    smooth, exact = step.smooth(gradient, observed), step.replicate(gradient, observed)
    close = flat(smooth) @ flat(exact) / (norm(smooth) * norm(exact))
    assert float(close) > 0.8


def test_a_step_is_smooth_unless_it_says_otherwise() -> None:
    plateaus = {name for name, step in shipped().items() if issubclass(step, HasSmoothReplica)}
    assert plateaus == {"sign", "quantize", "float_format"}
    assert not Pipeline([Clip(bound=1), Sign()]).replica.is_smooth
    assert Pipeline([Clip(bound=1), Noise(std=0.1)]).replica.is_smooth


@pytest.mark.parametrize("members", [1, 2])
def test_with_noise_the_loss_is_the_posterior_s(
    sample: Callable[..., Spec], model: ClientModel, members: int
) -> None:
    """Differences of the loss are those of -2 std^2 log p(z | o) / |o|^2, by a plain loop."""
    spec = sample("undefended")
    prior = load_prior(spec, model)
    defense = Pipeline([Noise(std=0.2)])
    image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    observed = defense.apply(plain_gradient(model, image, 3), context())
    latents = torch.randn(1, 3, members * prior.size, generator=torch.Generator().manual_seed(1))
    labels = torch.full((1, members), 3)

    def objective(name: Any) -> LatentObjective:
        matching = Matching(model, defense, "l2")
        regularizer = RegularizerSpec(name=name)
        return LatentObjective(matching, prior, stack([observed]), labels, regularizer)

    if members == 2:
        weights = objective("posterior")._penalty(latents)
    else:
        weights = objective("posterior").losses(latents) - objective("none").losses(latents)
    expected = 0.04 * latents.square().sum(2) / norm(observed) ** 2
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
    if members == 1:
        evaluated = objective("posterior").evaluate(latents, "products")
        assert evaluated.products is not None
        first = evaluated.products[0, 0, 0]
        torch.testing.assert_close(first, evaluated.losses[0, 0], rtol=1e-3, atol=1e-5)
