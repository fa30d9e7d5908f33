"""Soteria, federated dropout and PRECODE, each against a plain computation of the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from ggl_audit.basics.gradient import Gradient, flat
from ggl_audit.defenses.base import Context, Defense, Drawn
from ggl_audit.defenses.clip import Clip
from ggl_audit.defenses.federated_dropout import FederatedDropout
from ggl_audit.defenses.precode import Bottleneck, Precode
from ggl_audit.defenses.soteria import Soteria
from ggl_audit.inputs.model import ClientModel, Head


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Linear(12, 10),
        nn.Sigmoid(),
        nn.Linear(10, 5),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


def normalized_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(6, 8, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


MODELS: list[Callable[[], nn.Sequential]] = [mlp, cnn, normalized_cnn, lenet]


def client(module: nn.Module, batch_size: int = 1) -> ClientModel:
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return ClientModel(
        module=module,
        parameters={name: p.detach() for name, p in module.named_parameters()},
        constants=dict(module.named_buffers()),
        shape=(1, 8, 8),
        mean=torch.zeros(1, 1, 1),
        std=torch.ones(1, 1, 1),
        loss_scale=1.0,
        classes=5,
        head=Head(linear[-1], f"{linear[-1]}.weight", f"{linear[-1]}.bias"),
        batch_size=batch_size,
    )


def batch(seed: int, images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (images,), generator=random)
    return torch.rand(images, 1, 8, 8, generator=random), labels


def gradient(
    model: ClientModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    drawn: Drawn | None = None,
    step: Defense | None = None,
) -> Gradient:
    def loss(parameters: Gradient) -> torch.Tensor:
        values = {**model.constants, **(drawn or {}), **parameters}
        error = F.cross_entropy(functional_call(model.module, values, (images,)), labels)
        return error + step.penalty(model.module) if isinstance(step, Precode) else error

    return grad(loss)(model.parameters)


def context(seed: int = 0, images: torch.Tensor | None = None) -> Context:
    return Context(torch.Generator().manual_seed(seed), images)


def distance(one: Gradient, other: Gradient) -> float:
    return float((flat(one) - flat(other)).norm())


# Soteria


def ratios_by_a_loop(model: ClientModel, images: torch.Tensor) -> torch.Tensor:
    """The published score, feature by feature and image by image."""
    body = model.module[:-1]
    total = torch.zeros(model.parameters[model.head.weight].shape[1])
    for image in images:
        x = image[None].clone().requires_grad_()
        features = body(x)[0]
        for i, feature in enumerate(features):
            (derivative,) = torch.autograd.grad(feature, x, retain_graph=True)
            size = feature.detach().abs()
            total[i] += derivative.norm() / size if size > 0 else 0
    return total


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("images", [1, 3])
def test_soteria_prunes_what_a_loop_over_features_ranks_first(
    make: Callable[[], nn.Sequential], images: int
) -> None:
    torch.manual_seed(1)
    model = client(make())
    x, y = batch(5, images)
    step = Soteria(fraction=0.6).bind(model)
    whole = gradient(model, x, y)
    sent = step.apply(whole, context(images=x))
    expected = ratios_by_a_loop(model, x)
    pruned = int(0.6 * len(expected))
    kept = torch.ones(len(expected))
    kept[expected.argsort(stable=True)[:pruned]] = 0
    weight = model.head.weight
    # Dead features, whose columns are zero anyway, may be counted in any order.
    assert torch.equal(sent[weight], whole[weight] * kept)
    assert all(torch.equal(sent[name], whole[name]) for name in whole if name != weight)


def test_soteria_needs_a_head() -> None:
    model = client(mlp())
    with pytest.raises(ValueError, match="output of a linear layer"):
        Soteria(fraction=0.5).bind(ClientModel(**{**model.__dict__, "head": None}))


def test_soteria_accuses_the_wrong_only() -> None:
    torch.manual_seed(2)
    model = client(cnn())
    step, less = (Soteria(fraction=share).bind(model) for share in (0.7, 0.5))
    accused = []
    for seed in range(1000):
        x, y = batch(seed)
        whole = gradient(model, x, y)
        sent = step.apply(whole, context(seed, x if seed % 2 else None))
        assert not step.contradiction(sent, lambda *_: 0.0)[0]
        noisy = {name: tensor + 1e-3 for name, tensor in whole.items()}
        assert step.contradiction(noisy, lambda *_: 0.0)[0]
        accused.append(step.contradiction(less.apply(noisy, context(seed)), lambda *_: 0.0)[0])
    assert all(accused)


def test_the_replica_of_soteria_matches_and_maps() -> None:
    torch.manual_seed(3)
    model = client(lenet())
    step = Soteria(fraction=0.8).bind(model)
    candidates = [gradient(model, *batch(seed)) for seed in range(8)]
    stacked = {name: torch.stack([c[name] for c in candidates]) for name in candidates[0]}
    for i in range(8):
        observed = step.apply(candidates[i], context(i, batch(i)[0]))
        assert distance(step.replicate(candidates[i], observed), observed) == 0
        assert distance(candidates[i], observed) > 0
        mapped = vmap(step.replicate, in_dims=(0, None))(stacked, observed)
        distances = [distance({n: t[j] for n, t in mapped.items()}, observed) for j in range(8)]
        assert min(range(8), key=distances.__getitem__) == i


# Federated dropout


def kept_units(drawn: Drawn, mask: str) -> torch.Tensor:
    return drawn[mask].nonzero().flatten()


def test_dropout_in_an_mlp_is_a_smaller_mlp() -> None:
    torch.manual_seed(4)
    step = FederatedDropout(kept=0.5)
    module = step.wrap(mlp())
    model = client(module)
    step = step.bind(model)
    x, y = batch(1, 3)
    drawn = step.draw(context(7), 3)
    one, two = kept_units(drawn, "3.kept_units"), kept_units(drawn, "5.kept_units")
    assert (len(one), len(two)) == (6, 5)
    small = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 5)
    )
    full = model.parameters
    values = {
        "1.weight": full["1.weight"][one],
        "1.bias": full["1.bias"][one],
        "3.weight": full["3.weight"][two][:, one],
        "3.bias": full["3.bias"][two],
        "5.weight": full["5.weight"][:, two],
        "5.bias": full["5.bias"],
    }
    small.load_state_dict(values)
    F.cross_entropy(small(x), y).backward()
    got = small.get_parameter
    expected = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
    expected["1.weight"][one] = got("1.weight").grad
    expected["1.bias"][one] = got("1.bias").grad
    expected["3.weight"][two[:, None], one] = got("3.weight").grad
    expected["3.bias"][two] = got("3.bias").grad
    expected["5.weight"][:, two] = got("5.weight").grad
    expected["5.bias"][:] = got("5.bias").grad
    sent = gradient(model, x, y, drawn)
    for name in expected:
        torch.testing.assert_close(sent[name], expected[name], rtol=1e-4, atol=1e-7)


def test_dropout_in_a_cnn_is_a_smaller_cnn() -> None:
    torch.manual_seed(5)
    step = FederatedDropout(kept=0.5)
    model = client(step.wrap(cnn()))
    step = step.bind(model)
    x, y = batch(2, 2)
    drawn = step.draw(context(8), 2)
    masks = ("3.kept_units", "6.kept_units", "8.kept_units")
    one, two, three = (kept_units(drawn, mask) for mask in masks)
    assert (len(one), len(two), len(three)) == (3, 4, 5)
    small = cnn()
    small[0], small[3] = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    small[6], small[8] = nn.Linear(64, 5), nn.Linear(5, 5)
    full = model.parameters
    block = (two[:, None] * 16 + torch.arange(16)).flatten()
    where = {
        "0.weight": (one,),
        "0.bias": (one,),
        "3.weight": (two[:, None], one),
        "3.bias": (two,),
        "6.weight": (three[:, None], block),
        "6.bias": (three,),
        "8.weight": (slice(None), three),
        "8.bias": (slice(None),),
    }
    small.load_state_dict({name: full[name][index] for name, index in where.items()})
    F.cross_entropy(small(x), y).backward()
    sent = gradient(model, x, y, drawn)
    for name, index in where.items():
        expected = torch.zeros_like(full[name])
        expected[index] = small.get_parameter(name).grad
        torch.testing.assert_close(sent[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", MODELS)
def test_without_a_draw_the_model_is_the_same(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(6)
    module = make()
    x, _ = batch(3, 2)
    before = module(x)
    assert torch.equal(FederatedDropout(kept=0.5).wrap(module)(x), before)


@pytest.mark.parametrize("make", MODELS)
def test_the_kept_units_are_read_off_the_capture(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(7)
    step = FederatedDropout(kept=0.6)
    model = client(step.wrap(make()))
    step = step.bind(model)
    for seed in range(5):
        x, y = batch(seed, 2)
        drawn = step.draw(context(seed), 2)
        observed = gradient(model, x, y, drawn)
        (guess,) = step.guesses(observed)
        assert guess.keys() == drawn.keys()
        assert all(bool((guess[mask] <= drawn[mask]).all()) for mask in drawn)
        # Dead units are taken for left out; on the client's images they compute zero anyway.
        again = gradient(model, x, y, guess)
        assert distance(again, observed) <= 1e-6 * float(flat(observed).norm())
        assert distance(gradient(model, x, y), observed) > 0.05 * float(flat(observed).norm())
    assert step.guesses(None) == [{}]


def test_guesses_map_over_observations() -> None:
    torch.manual_seed(8)
    step = FederatedDropout(kept=0.6)
    model = client(step.wrap(cnn()))
    step = step.bind(model)
    drawn = [step.draw(context(seed), 1) for seed in range(4)]
    observed = [gradient(model, *batch(seed), drawn[seed]) for seed in range(4)]
    stacked = {name: torch.stack([o[name] for o in observed]) for name in observed[0]}
    mapped = vmap(lambda g: step.guesses(g)[0])(stacked)
    for i, single in enumerate(observed):
        for mask, values in step.guesses(single)[0].items():
            assert torch.equal(mapped[mask][i], values)

    # The guessed sub-models differ between the maps' rows.
    def mapped_gradient(guess: Drawn, images: torch.Tensor) -> Gradient:
        return gradient(model, images, torch.zeros(1, dtype=torch.long), guess)

    images = torch.stack([batch(seed)[0] for seed in range(4)])
    together = vmap(mapped_gradient)(mapped, images)
    alone = mapped_gradient(step.guesses(observed[2])[0], images[2])
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name][2], tensor, rtol=1e-4, atol=1e-7)


def test_dropout_never_identifies_less_with_the_guess() -> None:
    torch.manual_seed(9)
    step = FederatedDropout(kept=0.5)
    model = client(step.wrap(lenet()))
    step = step.bind(model)
    with_guess = without = 0
    for trial in range(20):
        x, _ = batch(trial, 12)
        y = torch.zeros(1, dtype=torch.long)
        observed = gradient(model, x[:1], y, step.draw(context(trial), 1))
        (guess,) = step.guesses(observed)

        def nearest(
            drawn: Drawn, x: torch.Tensor = x, y: torch.Tensor = y, to: Gradient = observed
        ) -> int:
            candidates = [distance(gradient(model, image[None], y, drawn), to) for image in x]
            return min(range(12), key=candidates.__getitem__)

        with_guess += nearest(guess) == 0
        without += nearest({}) == 0
    assert with_guess == 20
    assert without < 20


@pytest.mark.parametrize("make", MODELS)
def test_dropout_accuses_the_wrong_only(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(10)
    step = FederatedDropout(kept=0.5)
    model = client(step.wrap(make()))
    step, more = step.bind(model), FederatedDropout(kept=0.8).bind(model)
    for seed in range(250):
        x, y = batch(seed, 2)
        right = gradient(model, x, y, step.draw(context(seed), 2))
        assert not step.contradiction(right, lambda *_: 0.0)[0]
        random = torch.Generator().manual_seed(seed)
        dense = {n: torch.randn(p.shape, generator=random) for n, p in model.parameters.items()}
        control = step.apply(dense, context(seed))
        assert not step.contradiction(control, lambda *_: 0.0)[0]
        assert step.contradiction(dense, lambda *_: 0.0)[0]
        assert step.contradiction(more.apply(dense, context(seed)), lambda *_: 0.0)[0]
        assert step.apply(dense, context(seed, x)) is dense


def test_a_control_without_images_has_the_zeros_of_a_sub_model() -> None:
    torch.manual_seed(11)
    step = FederatedDropout(kept=0.5)
    model = client(step.wrap(normalized_cnn()))
    step = step.bind(model)
    dense = {name: torch.ones_like(p) for name, p in model.parameters.items()}
    control = step.apply(dense, context(1))
    drawn = step.guesses(control)[0]
    assert int(drawn["3.kept_units"].sum()) == 3
    real = gradient(model, *batch(1, 4), drawn)
    zeros = flat(control) == 0
    assert bool((flat(real)[zeros] == 0).all())
    assert bool((control["1.weight"] == drawn["3.kept_units"]).all())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.stem(x))
        return self.head((features + F.relu(self.block(features))).flatten(1))


def test_dropout_refuses_models_that_are_no_chain() -> None:
    torch.manual_seed(12)
    step = FederatedDropout(kept=0.5)
    with pytest.raises(ValueError, match="before block also act by another way"):
        step.bind(client(step.wrap(Residual())))
    with pytest.raises(ValueError, match="the model has none"):
        step.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(ValueError, match="1 takes 7 inputs"):
        step.wrap(nn.Sequential(nn.Linear(64, 6), nn.Linear(7, 5)))
    normal = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)
    )
    with pytest.raises(ValueError, match="before 4 also act"):
        step.bind(client(step.wrap(normal)))


# PRECODE


def plain_precode(model: ClientModel, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Logits and divergence, written out with the weights."""
    values = model.parameters
    prefix = next(n.removesuffix("encoder.weight") for n in values if n.endswith("encoder.weight"))
    head = prefix.removesuffix("bottleneck.") + "head."
    features = nn.Sequential(*list(model.module)[:-1])(x)
    coded = features @ values[f"{prefix}encoder.weight"].T + values[f"{prefix}encoder.bias"]
    size = coded.shape[1] // 2
    normal = torch.distributions.Normal(coded[:, :size], (1 + coded[:, size:].exp()).log())
    z = normal.mean + noise * normal.stddev
    decoded = z @ values[f"{prefix}decoder.weight"].T + values[f"{prefix}decoder.bias"]
    standard = torch.distributions.Normal(torch.zeros(size), torch.ones(size))
    divergence = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    return decoded @ values[f"{head}weight"].T + values[f"{head}bias"], divergence


@pytest.mark.parametrize("make", MODELS)
def test_precode_is_its_formula(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(13)
    step = Precode(size=7, weight=0.3)
    model = client(step.wrap(make()), batch_size=3)
    step = step.bind(model)
    x, y = batch(4, 3)
    drawn = step.draw(context(2), 3)
    (noise,) = drawn.values()
    assert noise.shape == (3, 7)
    got = functional_call(model.module, drawn, (x,))
    logits, divergence = plain_precode(model, x, noise)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.penalty(model.module), 0.3 * divergence, rtol=1e-4, atol=1e-5)
    sent = gradient(model, x, y, drawn, step)
    leaves = {name: p.clone().requires_grad_() for name, p in model.parameters.items()}
    output = functional_call(model.module, {**drawn, **leaves}, (x,))
    (F.cross_entropy(output, y) + step.penalty(model.module)).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(sent[name], leaf.grad, rtol=1e-4, atol=1e-6)


def test_the_divergence_maps() -> None:
    torch.manual_seed(14)
    step = Precode(size=6, weight=0.5)
    model = client(step.wrap(cnn()))
    step = step.bind(model)
    x, y = batch(1, 4)
    noise = torch.randn(4, 1, 6)
    name = next(iter(step.draw(context(), 1)))

    def one(image: torch.Tensor, label: torch.Tensor, noise: torch.Tensor) -> Gradient:
        return gradient(model, image[None], label[None], {name: noise}, step)

    together = vmap(one)(x, y, noise)
    for i in range(4):
        for tensor, mapped in zip(
            flat(one(x[i], y[i], noise[i])),
            flat({n: t[i] for n, t in together.items()}),
            strict=True,
        ):
            torch.testing.assert_close(mapped, tensor, rtol=1e-4, atol=1e-6)
    # What the transforms left in the module does not keep it from being copied.
    assert copy.deepcopy(model.module).state_dict().keys() == model.module.state_dict().keys()


def test_precode_goes_before_the_head() -> None:
    bare = Precode(size=3).wrap(nn.Linear(64, 5))
    assert {"bottleneck.encoder.weight", "head.weight"} <= bare.state_dict().keys()
    module = Precode(size=3).wrap(mlp())
    assert isinstance(module.get_submodule("5.bottleneck"), Bottleneck)
    assert not any("noise" in name for name in module.state_dict())
    with pytest.raises(ValueError, match="the model has none"):
        Precode().wrap(nn.Conv2d(1, 2, 3))
    model = client(module)
    with pytest.raises(ValueError, match="has to give the logits; 5 does not"):
        Precode(size=3).bind(ClientModel(**{**model.__dict__, "head": None}))


@pytest.mark.parametrize("make", [cnn, lenet])
@pytest.mark.parametrize("images", [1, 3])
def test_the_noise_of_precode_does_not_hide_the_images(
    make: Callable[[], nn.Sequential], images: int
) -> None:
    torch.manual_seed(15)
    step = Precode(size=32)
    model = client(step.wrap(make()), batch_size=images)
    step = step.bind(model)
    plain = exact = 0
    for trial in range(15):
        x, _ = batch(trial, 10 * images)
        y = torch.zeros(images, dtype=torch.long)
        groups = x.split(images)
        observed = gradient(model, groups[0], y, step.draw(context(trial), images), step)
        candidates = [gradient(model, group, y, None, step) for group in groups]
        without = [distance(c, observed) for c in candidates]
        replicas = [step.replicate(c, observed) for c in candidates]
        replicated = [distance(replica, observed) for replica in replicas]
        assert replicated[0] < 0.01 * without[0]
        plain += min(range(10), key=without.__getitem__) == 0
        exact += min(range(10), key=replicated.__getitem__) == 0
    assert exact == 15
    assert plain < 15


def test_precode_leaves_out_what_is_random_where_the_span_does_not_show() -> None:
    torch.manual_seed(16)
    step = Precode(size=8)
    model = client(step.wrap(cnn()), batch_size=10)
    step = step.bind(model)
    x, y = batch(1, 10)
    observed = gradient(model, x, y, step.draw(context(1), 10), step)
    replica = step.replicate(gradient(model, x, y, None, step), observed)
    random = {name for name in observed if name.startswith("8.")}
    assert all(torch.equal(replica[name], observed[name]) for name in random)
    assert not torch.equal(replica["0.weight"], observed["0.weight"])
    assert distance(replica, observed) < distance(gradient(model, x, y, None, step), observed)
    hidden = step.replicate(observed, None)
    assert all(not hidden[name].any() for name in random)
    assert torch.equal(hidden["0.weight"], observed["0.weight"])


@pytest.mark.parametrize("images", [1, 3])
def test_precode_accuses_the_wrong_only(images: int) -> None:
    torch.manual_seed(17)
    step = Precode(size=6)
    model = client(step.wrap(mlp()), batch_size=images)
    step = step.bind(model)
    name = "5.bottleneck.encoder.weight"
    for seed in range(500):
        right = gradient(model, *batch(seed, images), step.draw(context(seed), images), step)
        assert not step.contradiction(right, lambda *_: 0.0)[0]
        half = {name: tensor.half().float() for name, tensor in right.items()}
        assert not step.contradiction(half, lambda *_: 0.0)[0]
        random = torch.Generator().manual_seed(seed)
        dense = {name: torch.randn(right[name].shape, generator=random)}
        assert step.contradiction(dense, lambda *_: 0.0)[0]
    more = gradient(model, *batch(1, images + 2), step.draw(context(1), images + 2), step)
    assert step.contradiction(more, lambda *_: 0.0)[0]
    accused, said = Precode().contradiction({}, lambda *_: 0.0)
    assert not accused
    assert "leaves nothing" in said.text


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_clip_after_it_does_not_hide_the_span(scope: str) -> None:
    torch.manual_seed(18)
    step = Precode(size=32)
    model = client(step.wrap(cnn()))
    step = step.bind(model)
    clip = Clip.model_validate({"bound": 0.05, "scope": scope})
    assert clip.leaves(step.trace)
    for trial in range(10):
        x, _ = batch(trial, 10)
        y = torch.zeros(1, dtype=torch.long)
        sent = gradient(model, x[:1], y, step.draw(context(trial), 1), step)
        observed = clip.apply(sent, context(trial))
        distances = []
        for image in x:
            candidate = gradient(model, image[None], y, None, step)
            replica = clip.replicate(step.replicate(candidate, observed), observed)
            distances.append(distance(replica, observed))
        assert min(range(10), key=distances.__getitem__) == 0
