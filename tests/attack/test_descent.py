from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ggl_audit.attack.analytic import representation
from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.descent import Descent, descend, total_variation
from ggl_audit.attack.matching import Matching
from ggl_audit.attack.objective import LatentObjective
from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attack.refine import LAYERS, refine
from ggl_audit.basics.gradient import stack
from ggl_audit.defenses import Clip, Defense, Pipeline, Sign, Sparsify
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.priors.loading import load_prior
from ggl_audit.spec import RegularizerSpec, Spec
from tests.conftest import plain_gradient


@pytest.fixture
def curved(model: ClientModel) -> ClientModel:
    """The same without kinks, at which a gradient jumps and no derivative shows it."""
    layers = [nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in model.module]
    return dataclasses.replace(model, module=nn.Sequential(*layers))


@pytest.fixture
def private(model: ClientModel) -> tuple[torch.Tensor, torch.Tensor, Any]:
    data = digits("private")
    images, labels = data.images[:2], data.labels[:2]
    sent = [plain_gradient(model, image, int(y)) for image, y in zip(images, labels, strict=True)]
    return images, labels, stack(sent)


def psnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(-10 * (found - truth).square().flatten(1).mean(1).log10().mean())


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("steps", [[], [Clip(bound=0.5)], [Sparsify(fraction=0.9)], [Sign()]])
def test_derivatives_are_those_of_the_distance(
    curved: ClientModel, private: Any, steps: list[Defense], distance: Any
) -> None:
    model, (_, labels, observed) = curved, private
    defense = Pipeline(steps)
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 1, 16, 16, generator=random)
    seen = {name: tensor.clone() for name, tensor in observed.items()}
    derivatives = Derivatives(model, defense, distance)
    at, slopes = derivatives(images, labels[:, None], seen)
    if not steps:
        expected = Matching(model, defense, distance).distances(images, labels[:, None], seen)
        torch.testing.assert_close(at, expected[:, 0], rtol=1e-4, atol=1e-6)
    direction = torch.randn(images.shape, generator=random)
    ahead, _ = derivatives(images + 1e-3 * direction, labels[:, None], seen)
    behind, _ = derivatives(images - 1e-3 * direction, labels[:, None], seen)
    along = (slopes * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / 2e-3, along, rtol=0.05, atol=2e-3)


def test_the_representation_is_an_extra_term(model: ClientModel, private: Any) -> None:
    images, labels, observed = private
    shown = representation(model, observed)
    assert shown is not None
    others = torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    plain, _ = Derivatives(model, Pipeline(), "l2")(others, labels[:, None], observed)
    more = Derivatives(model, Pipeline(), "l2", shown, 0.5)
    with_term, slopes = more(others, labels[:, None], observed)
    taken = model.representation(others[:, 0])
    assert taken is not None
    away = torch.where(shown == 0, 0.0, taken - shown).square().sum(1) / shown.square().sum(1)
    torch.testing.assert_close(with_term - plain, 0.5 * away, rtol=1e-3, atol=1e-5)
    assert bool(slopes.any())
    at_truth, _ = more(images[:, None], labels[:, None], observed)
    assert float(at_truth.max()) < 1e-6


def test_total_variation_is_the_mean_difference_of_neighbours() -> None:
    images = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]])
    assert float(total_variation(images)[0]) == pytest.approx((1 + 0.5) / 2 + (0 + 0.5) / 2)


def test_a_descent_keeps_its_best_and_stays_in_the_range(model: ClientModel, private: Any) -> None:
    images, labels, observed = private
    counted: list[int] = []
    start = images[:, None].clone()
    found = descend(
        start,
        torch.clone,
        Derivatives(model, Pipeline(), "l2"),
        labels[:, None],
        observed,
        Descent(steps=3, step=10.0, pixels=True),  # much too long
        counted.append,
    )
    torch.testing.assert_close(found.images, images[:, None])
    assert float(found.losses.max()) < 1e-6
    assert counted == [8, 8, 8]


def test_pixels_are_found_without_any_prior(model: ClientModel, private: Any) -> None:
    images, labels, observed = private
    derivatives = Derivatives(model, Pipeline(), "cosine")

    def attack(seed: int) -> torch.Tensor:
        randoms = [np.random.default_rng([seed, place]) for place in range(len(labels))]
        return attack_pixels(
            model, derivatives, labels[:, None], observed, 150, randoms, lambda _: None
        ).images[:, 0]

    found = attack(0)
    assert psnr(found, images) > 22
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    torch.testing.assert_close(attack(0), found, rtol=0, atol=0)
    # It is no more than what the gradient says: another image's gives another picture.
    assert psnr(found, images.flip(0)) < 15


def test_a_refinement_comes_nearer_than_the_generator_can(
    sample: Callable[..., Spec], model: ClientModel, private: Any
) -> None:
    images, labels, observed = private
    prior = load_prior(sample("undefended"), model)
    latents = torch.zeros(2, prior.size, requires_grad=True)
    adam = torch.optim.Adam([latents], lr=0.05)
    for _ in range(200):  # the best that the generator can draw
        adam.zero_grad()
        (prior.decode(latents, labels) - images).square().sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    best = prior.decode(latents, labels).detach()
    derivatives = Derivatives(model, Pipeline(), "l2")
    found = refine(
        prior, derivatives, latents.detach(), labels[:, None], observed, 120, lambda _: None
    )
    assert psnr(found.images[:, 0], images) > psnr(best, images) + 1
    start = Matching(model, Pipeline(), "l2").distances(best[:, None], labels[:, None], observed)
    assert bool((found.losses < start[:, 0]).all())


class Opaque(nn.Module):
    """A generator without layers that could be found."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.own = [inner]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        drawn: torch.Tensor = self.own[0](*inputs)
        return drawn


@pytest.mark.parametrize("opaque", [False, True])
def test_each_stage_has_its_share_of_the_steps(
    sample: Callable[..., Spec], model: ClientModel, private: Any, opaque: bool
) -> None:
    _, labels, observed = private
    prior = load_prior(sample("undefended"), model)
    if opaque:
        prior = type(prior)(Opaque(prior.generator), prior.space, prior.classes, prior.source)
    counted: list[int] = []
    derivatives = Derivatives(model, Pipeline(), "l2")
    latents = torch.zeros(2, prior.size)
    refine(prior, derivatives, latents, labels[:, None], observed, 12, counted.append)
    stages = 2 if opaque else 2 + LAYERS
    assert len(counted) == stages * (12 // stages)


def test_adam_on_latents_gets_the_derivatives_of_its_loss(
    sample: Callable[..., Spec], curved: ClientModel, private: Any
) -> None:
    model, (_, labels, observed) = curved, private
    prior = load_prior(sample("undefended"), model)
    matching = Matching(model, Pipeline(), "l2")
    objective = LatentObjective(matching, prior, observed, labels, RegularizerSpec(name="kl"))
    latents = torch.randn(2, 2, prior.size, generator=torch.Generator().manual_seed(0))
    evaluated = objective.evaluate(latents, "derivatives")
    torch.testing.assert_close(evaluated.losses, objective.losses(latents), rtol=1e-3, atol=1e-5)
    assert evaluated.derivatives is not None
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    ahead, behind = (objective.losses(latents + s * 1e-3 * direction) for s in (1, -1))
    along = (evaluated.derivatives * direction).sum(2)
    torch.testing.assert_close((ahead - behind) / 2e-3, along, rtol=0.05, atol=5e-3)
