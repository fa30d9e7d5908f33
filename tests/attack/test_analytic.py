"""Exact recovery, against images whose gradients a plain backward pass has computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from ggl_audit.attack.analytic import is_exact, recover_input, representation
from ggl_audit.basics.gradient import Gradient, each, flat, stack
from ggl_audit.defenses import (
    Clip,
    Context,
    Defense,
    FloatFormat,
    Mixup,
    Noise,
    Pipeline,
    Sign,
    Sparsify,
)
from ggl_audit.inputs.losses import BinaryCrossEntropy
from ggl_audit.inputs.model import ClientModel, Head
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import LocalTrainingSpec, Spec

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mlp(inputs: int, *hidden: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for units in hidden:
        layers += [nn.Linear(inputs, units), activation()]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, 4))


def client(
    module: nn.Module, *shape: int, head: str | None = None, colour: bool = False, **more: Any
) -> ClientModel:
    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if colour else ([0.5], [0.5])
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    return ClientModel(
        module=module,
        parameters=trained,
        constants={**fixed, **dict(module.named_buffers())},
        shape=(shape[0], shape[1], shape[2]),
        mean=torch.tensor(mean).view(-1, 1, 1),
        std=torch.tensor(std).view(-1, 1, 1),
        loss_scale=1.0,
        classes=4,
        head=None if head is None else Head(head, f"{head}.weight", f"{head}.bias"),
        **more,
    )


def sent(
    model: ClientModel, images: torch.Tensor, labels: torch.Tensor, loss: Loss = F.cross_entropy
) -> Gradient:
    """What is sent of each image, by a plain backward pass of the module."""
    gradients = []
    for image, label in zip(images, labels, strict=True):
        seen = image.flip(0) if model.bgr else image
        model.module.zero_grad()
        loss(model.module((seen[None] - model.mean) / model.std), label[None]).backward()
        own = dict(model.module.named_parameters())
        gradients.append({name: own[name].grad.clone() for name in model.parameters})
    return stack(gradients)


def defended(observed: Gradient, *steps: Defense) -> Gradient:
    count = len(next(iter(observed.values())))
    context = Context(torch.Generator().manual_seed(0))
    return stack(
        [
            Pipeline(steps).apply({n: t[i] for n, t in observed.items()}, context)
            for i in range(count)
        ]
    )


def some(*shape: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.rand(count, *shape, generator=random), torch.arange(count) % 4


@pytest.fixture
def digit_sized() -> ClientModel:
    torch.manual_seed(0)
    return client(mlp(256, 48, 20), 1, 16, 16, head="5")


@examples(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    units=st.integers(1, 12),
    count=st.integers(1, 3),
    activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.LeakyReLU]),
    binary=st.booleans(),
)
def test_images_of_any_shape_are_recovered(
    shape: tuple[int, int, int],
    units: int,
    count: int,
    activation: type[nn.Module],
    binary: bool,
) -> None:
    torch.manual_seed(0)
    module = mlp(shape[0] * shape[1] * shape[2], units, activation=activation)
    images, labels = some(*shape, count=count)
    model = client(module, *shape)
    observed = sent(model, images, labels)
    if binary:
        model = client(module, *shape, criterion=BinaryCrossEntropy())
        targets = F.one_hot(labels, 4).float()
        observed = sent(model, images, targets, F.binary_cross_entropy_with_logits)
    recovered = recover_input(model, observed)
    assert recovered is not None
    assert recovered.shape == images.shape
    assert float((recovered - images).abs().max()) < 1e-4


def test_rectified_units_that_are_off_do_not_matter(digit_sized: ClientModel) -> None:
    images, labels = some(1, 16, 16)
    observed = sent(digit_sized, images, labels)
    assert bool((observed["1.bias"] == 0).any())
    recovered = recover_input(digit_sized, observed)
    assert recovered is not None
    assert float((recovered - images).abs().max()) < 1e-4


def test_colours_in_either_order_and_their_normalization() -> None:
    torch.manual_seed(0)
    images, labels = some(3, 5, 4)
    for bgr in (False, True):
        model = client(mlp(60, 9), 3, 5, 4, colour=True, bgr=bgr)
        recovered = recover_input(model, sent(model, images, labels))
        assert recovered is not None
        assert float((recovered - images).abs().max()) < 1e-4


def test_a_common_scale_cancels_and_weight_decay_is_taken_off(digit_sized: ClientModel) -> None:
    images, labels = some(1, 16, 16)
    observed = sent(digit_sized, images, labels)
    local = LocalTrainingSpec(lr=0.1, weight_decay=0.01, momentum=0.9)
    update = {n: 0.1 * (t + 0.01 * digit_sized.parameters[n]) for n, t in observed.items()}
    trained = client(digit_sized.module, 1, 16, 16, local=local)
    for model, scaled in (
        (digit_sized, defended(observed, Clip(bound=0.01))),
        (trained, update),
    ):
        recovered = recover_input(model, scaled)
        assert recovered is not None
        assert float((recovered - images).abs().max()) < 1e-4


def test_of_a_sparsified_gradient_every_pixel_that_was_sent_is_exact(
    digit_sized: ClientModel,
) -> None:
    images, labels = some(1, 16, 16)
    observed = defended(sent(digit_sized, images, labels), Sparsify(fraction=0.9))
    recovered = recover_input(digit_sized, observed)
    assert recovered is not None
    shown = 0
    for t in range(3):
        weight, bias = observed["1.weight"][t], observed["1.bias"][t]
        for pixel in range(256):
            rows = [i for i in range(48) if weight[i, pixel] != 0 and bias[i] != 0]
            expected = float(images[t].flatten()[pixel]) if rows else 0.5
            assert float(recovered[t].flatten()[pixel]) == pytest.approx(expected, abs=1e-4)
            shown += bool(rows)
    assert 0.3 < shown / (3 * 256) < 0.9


def test_under_noise_the_error_is_that_of_least_squares(digit_sized: ClientModel) -> None:
    # To first order the error of x_j is the noise along the layer's error d, of dL/dW and x_j
    # times that of dL/db, over |d|: the variance is std^2 (1 + x_j^2) / |d|^2.
    images = 0.25 + 0.5 * some(1, 16, 16, count=1)[0]  # nothing is clamped
    once = sent(digit_sized, images, torch.tensor([2]))
    normalized, size = (images[0] - 0.5) / 0.5, float(once["1.bias"].norm())
    observed = each(lambda tensor: tensor.repeat(400, *[1] * (tensor.ndim - 1)), once)
    found = []
    for relative in (0.01, 0.04):
        noisy = defended(observed, Noise(std=relative * size))
        recovered = recover_input(digit_sized, noisy)
        assert recovered is not None
        found.append(float((recovered - images).square().mean()))
        predicted = float((0.5 * relative) ** 2 * (1 + normalized.square()).mean())
        # The error of dL/db is shared by all pixels of an image, so 400 draws of it: 7 % each.
        assert found[-1] == pytest.approx(predicted, rel=0.1)
    assert found[1] / found[0] == pytest.approx(16, rel=0.1)


def test_under_strong_noise_all_columns_tell_the_rows(digit_sized: ClientModel) -> None:
    images, labels = some(1, 16, 16, count=4)
    clean = sent(digit_sized, images, labels)
    observed = defended(clean, Noise(std=0.2 * float(clean["1.bias"].norm(dim=1).mean())))
    recovered = recover_input(digit_sized, observed)
    assert recovered is not None
    assert 0 <= float(recovered.min()) <= float(recovered.max()) <= 1
    weight, bias = observed["1.weight"], observed["1.bias"]
    weighed = (bias[:, :, None] * weight).sum(1) / bias.square().sum(1, keepdim=True)
    by_bias_alone = (weighed * 0.5 + 0.5).clamp(0, 1).view_as(images)
    error = (recovered - images).square().mean()
    assert float(error) < 0.5 * float((by_bias_alone - images).square().mean())


class Deceptive(nn.Module):
    """Its first linear layer comes second."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


class Functional(nn.Module):
    """Has no layers, only parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 16))
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1) @ self.kernel.T + self.offset


class Permuting(nn.Module):
    """Takes the pixels in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.flatten(1)[:, torch.arange(15, -1, -1)])


class Twice(nn.Module):
    """Uses its first layer for the image and for its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.last(torch.tanh(self.first(x)) + torch.sigmoid(self.first(-x)))


@pytest.mark.parametrize(
    "make",
    [
        Deceptive,
        Functional,
        lambda: nn.Sequential(nn.Conv2d(1, 6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4)),
    ],
)
def test_the_layer_is_found_by_what_it_takes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = client(make(), 1, 4, 4)
    images, labels = some(1, 4, 4)
    recovered = recover_input(model, sent(model, images, labels))
    assert recovered is not None
    assert float((recovered - images).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        Permuting,
        Twice,
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 4, 9, padding=1), nn.Flatten(), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.ReLU(), mlp(16, 6)),
        lambda: nn.Sequential(nn.Linear(4, 16), nn.Flatten(), nn.Linear(64, 4)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 6).requires_grad_(False), mlp(6, 5)),
    ],
)
def test_other_models_give_nothing(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = client(make(), 1, 4, 4)
    assert recover_input(model, sent(model, *some(1, 4, 4))) is None


def test_several_images_and_several_steps_give_nothing() -> None:
    torch.manual_seed(0)
    module = mlp(16, 6)
    observed = sent(client(module, 1, 4, 4), *some(1, 4, 4))
    for more in (
        {"batch_size": 2},
        {"local": LocalTrainingSpec(lr=0.1, epochs=2)},
    ):
        model = client(module, 1, 4, 4, head="3", **more)
        assert recover_input(model, observed) is None
        assert representation(model, observed) is None


def test_a_layer_that_is_not_sent_gives_nothing() -> None:
    torch.manual_seed(0)
    model = client(mlp(16, 6), 1, 4, 4, head="3")
    observed = sent(model, *some(1, 4, 4))
    for name in ("1.weight", "1.bias"):
        rest = {n: tensor for n, tensor in observed.items() if n != name}
        assert recover_input(model, rest) is None
        assert recover_input(model.without([name]), rest) is None
    for name in ("3.weight", "3.bias"):
        rest = {n: tensor for n, tensor in observed.items() if n != name}
        assert representation(model, rest) is None
        assert representation(model.without([name]), rest) is None


@pytest.mark.parametrize("steps", [[], [Clip(bound=0.1)]], ids=str)
def test_the_representation_is_what_the_head_took(model: ClientModel, steps: list[Defense]) -> None:
    images, labels = some(1, 16, 16)
    found = representation(model, defended(sent(model, images, labels), *steps))
    expected = model.representation(images)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_features_that_were_removed_are_zero_and_the_others_right(
    digit_sized: ClientModel,
) -> None:
    images, labels = some(1, 16, 16)
    observed = sent(digit_sized, images, labels)
    kept = (torch.arange(20) % 3 > 0).float()
    found = representation(digit_sized, {**observed, "5.weight": observed["5.weight"] * kept})
    expected = digit_sized.representation(images)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected.detach() * kept, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Its head gives a hint before it gives the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.head(torch.tanh(self.first(x.flatten(1))))))


def test_a_head_without_bias_or_of_several_uses_gives_no_representation() -> None:
    torch.manual_seed(0)
    images, labels = some(1, 4, 4)
    shared = client(Shared(), 1, 4, 4, head="head")
    assert representation(shared, sent(shared, images, labels)) is None
    headless = client(mlp(16, 6), 1, 4, 4)
    assert representation(headless, sent(headless, images, labels)) is None
    module = nn.Sequential(mlp(16, 6), nn.Linear(4, 4, bias=False))
    biasless = replace(client(module, 1, 4, 4), head=Head("1", "1.weight", None))
    assert representation(biasless, sent(biasless, images, labels)) is None


@pytest.mark.parametrize("steps", [[], [Clip(bound=0.1)], [Sparsify(fraction=0.3)]], ids=str)
def test_only_the_very_image_is_exact(digit_sized: ClientModel, steps: list[Defense]) -> None:
    model, defense = digit_sized, Pipeline(steps)
    images, labels = some(1, 16, 16, count=8)
    observed = defended(sent(model, images, labels), *steps)
    recovered = recover_input(model, observed)
    assert recovered is not None
    assert bool(is_exact(model, defense, recovered, labels, observed).all())
    random = torch.Generator().manual_seed(2)
    bright = images.clone()
    bright[:, :, 3, 7] += 0.02
    wrong = {
        "another image": images.roll(1, 0),
        "noise": images + 0.001 * torch.randn(images.shape, generator=random),
        "a pixel": bright,
        "contrast": 0.5 + 0.999 * (images - 0.5),
        "brightness": images + 0.001,
        "256 levels": (images * 255).round() / 255,
        "grey": torch.full_like(images, 0.5),
    }
    for name, pictures in wrong.items():
        assert not bool(is_exact(model, defense, pictures, labels, observed).any()), name
    assert not bool(is_exact(model, defense, images, (labels + 1) % 4, observed).any())
    nothing = defended(each(torch.zeros_like, observed), Noise(std=0.01))
    recovered = recover_input(model, nothing)
    assert recovered is not None
    assert not bool(is_exact(model, Pipeline(), recovered, labels, nothing).any())


def test_a_mean_over_clients_and_a_gradient_under_noise_are_not_exact(
    digit_sized: ClientModel,
) -> None:
    images, labels = some(1, 16, 16, count=2)
    each_client = sent(digit_sized, images, labels)
    mean = each(lambda tensor: tensor.mean(0, keepdim=True).expand_as(tensor), each_client)
    noisy = defended(each_client, Noise(std=1e-4))
    for steps, observed in (([], mean), ([Noise(std=1e-4)], noisy)):
        recovered = recover_input(digit_sized, observed)
        assert recovered is not None
        assert not bool(is_exact(digit_sized, Pipeline(steps), recovered, labels, observed).any())


class Halving(Defense):
    """A user's own step, of which nothing is known."""

    name = "halving"

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        return each(lambda tensor: tensor / 2, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return each(lambda tensor: tensor / 2, gradient)


@pytest.mark.parametrize(
    "step", [Sign(), FloatFormat(format="bfloat16"), Mixup(), Halving()], ids=str
)
def test_nothing_is_exact_where_other_images_may_give_the_same(
    digit_sized: ClientModel, step: Defense
) -> None:
    images, labels = some(1, 16, 16)
    observed = defended(sent(digit_sized, images, labels), step)
    assert not bool(is_exact(digit_sized, Pipeline([step]), images, labels, observed).any())


def test_a_gradient_that_hardly_depends_on_the_image_proves_none(
    digit_sized: ClientModel,
) -> None:
    # All that is left is dL/db of the head where the prediction is certain to be wrong: -1.
    module = digit_sized.module
    with torch.no_grad():
        module[5].bias.copy_(torch.tensor([30.0, 0.0, 0.0, 0.0]))
    images, labels = some(1, 16, 16)
    labels[:] = 1
    model = client(module, 1, 16, 16, head="5")
    whole = sent(model, images, labels)
    observed = {**each(torch.zeros_like, whole), "5.bias": whole["5.bias"]}
    defense = Pipeline([Sparsify(fraction=0.99, scope="global")])
    others = some(1, 16, 16, count=6)[0][3:]
    own = flat(
        {n: t[0] - whole[n][0] for n, t in sent(model, others, labels).items() if n == "5.bias"}
    )
    assert float(own.norm()) < 1e-5
    assert not bool(is_exact(model, defense, others, labels, observed).any())


def test_what_leaves_more_than_rounding_is_not_exact_however_far_others_are() -> None:
    torch.manual_seed(0)
    sensitive = client(mlp(64, 12, activation=nn.Tanh), 1, 8, 8)
    sensitive = replace(sensitive, std=torch.full((1, 1, 1), 0.01))
    images = 0.5 + 0.02 * (some(1, 8, 8)[0] - 0.5)
    labels = torch.tensor([0, 1, 2])
    observed = sent(sensitive, images, labels)
    assert bool(is_exact(sensitive, Pipeline(), images, labels, observed).all())
    random = torch.Generator().manual_seed(2)
    near = images + 2e-5 * torch.randn(images.shape, generator=random)
    assert not bool(is_exact(sensitive, Pipeline(), near, labels, observed).any())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_in_a_saved_program_the_layer_is_found_too(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = mlp(256, 8, 6).eval()
    path = tmp_path / "program.pt2"
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (torch.rand(2, 1, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    spec = sample("undefended", model__factory=None, model__weights=None, model__exported=str(path))
    saved = load_model(spec, torch.device("cpu"))
    images, labels = some(1, 16, 16)
    plain = client(module, 1, 16, 16)
    observed = sent(plain, images, labels)
    names = dict(zip(observed, saved.parameters, strict=True))
    observed = {names[name]: tensor for name, tensor in observed.items()}
    recovered, taken = recover_input(saved, observed), representation(saved, observed)
    expected = saved.representation(images)
    assert recovered is not None
    assert taken is not None
    assert expected is not None
    assert float((recovered - images).abs().max()) < 1e-4
    torch.testing.assert_close(taken, expected.detach(), rtol=1e-4, atol=1e-5)


def test_in_a_file_of_bfloat16_it_is_exact_to_that_rounding(digit_sized: ClientModel) -> None:
    images, labels = some(1, 16, 16, count=8)
    eps = torch.finfo(torch.bfloat16).eps
    observed = each(lambda tensor: tensor.bfloat16().float(), sent(digit_sized, images, labels))
    assert bool(is_exact(digit_sized, Pipeline(), images, labels, observed, eps).all())
    assert not bool(is_exact(digit_sized, Pipeline(), images, labels, observed).any())
    random = torch.Generator().manual_seed(2)
    noisy = images + 0.01 * torch.randn(images.shape, generator=random)
    for wrong in (noisy, images.roll(1, 0)):
        assert not bool(is_exact(digit_sized, Pipeline(), wrong, labels, observed, eps).any())
