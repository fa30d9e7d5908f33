"""Every way to a distance gives that of a plain loop, on every family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.attack import layer_wise as layer_wise_module
from ggl_audit.attack import layers
from ggl_audit.attack.layers import slices
from ggl_audit.attack.matching import MEMORY, Matching
from ggl_audit.attack.objective import LatentObjective, pictures
from ggl_audit.attack.residuals import Residuals
from ggl_audit.basics.gradient import Gradient, each, flat, norm, stack
from ggl_audit.case.preparation import prepare
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import (
    Aggregation,
    Ats,
    Clip,
    Context,
    Defense,
    Encryption,
    FederatedDropout,
    FloatFormat,
    Mixup,
    Noise,
    Pipeline,
    Precode,
    Qsgd,
    Quantize,
    RandomK,
    SecAdam,
    SecureAggregation,
    Sign,
    Soteria,
    Sparsify,
    Step,
    TernGrad,
    Threshold,
    shipped,
)
from ggl_audit.defenses.capabilities import rounds_remembered
from ggl_audit.defenses.value_wise import ValueWise
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import RegularizerSpec, Spec

SHAPE = (3, 12, 12)
CLASSES = 5
TRIALS, CANDIDATES = 2, 3


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, CLASSES),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=(2, 0), dilation=(2, 1), bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, (3, 2), stride=(2, 3), padding=1, groups=6),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES, bias=False),
    )


class Residual(nn.Module):
    """With batch norm in eval mode, activations in place, and a map so small that padding rules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.first = nn.Conv2d(8, 8, 3, stride=3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, CLASSES)
        for layer in self.norms:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept = self.relu(self.norms[0](self.stem(images)))
        kept = self.relu(self.norms[1](self.first(kept)))
        kept = self.relu(kept + self.norms[2](self.second(kept)))
        return self.head(kept.mean((2, 3)))


class Transformer(nn.Module):
    """Patches with an embedding of their places, attention by linear layers, and layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.places = nn.Embedding(9, 8)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm([9, 8])
        # Without a bias, since that of the keys has no gradient but rounding.
        self.mixed = nn.Linear(8, 24, bias=False)
        self.given, self.beside = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.places(torch.arange(9).expand(len(images), 9))
        queries, keys, values = self.mixed(self.before(tokens)).chunk(3, dim=-1)
        tokens = tokens + self.given(F.scaled_dot_product_attention(queries, keys, values))
        # What is added has one gradient, which is the shift's of the norm as well.
        return self.head((self.after(tokens) + self.beside(tokens)).mean(1))


class Shared(nn.Module):
    """Uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(432, 432), nn.Linear(432, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.body(images.flatten(1)).tanh()))


class Functional(nn.Module):
    """Has a parameter that is not a layer's, and one that is used beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.head = nn.Linear(432, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.scale * images).flatten(1)) + self.head.bias.square()


class PlacesFirst(nn.Module):
    """Has the dimension of the images second, as recurrent layers and attention have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(48, 8), nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = images.reshape(len(images), 9, 48).transpose(0, 1)
        return self.head(self.body(tokens).tanh().mean(0))


LAYER_BY_LAYER: list[Callable[[], nn.Module]] = [lenet, grouped, Residual, Transformer]
WHOLE: list[Callable[[], nn.Module]] = [Shared, Functional, PlacesFirst]
PIPELINES: list[list[Defense]] = [
    [],
    [Noise(std=0.01)],
    [Clip(bound=0.3)],
    [Sparsify(fraction=0.9)],
    [Sparsify(fraction=0.8), Clip(bound=0.1), Noise(std=0.01)],
    [Sign()],
]

EVERY_DEFENSE: list[Step] = [
    Clip(bound=0.5),
    Clip(bound=0.5, scope="layer"),
    Encryption(key_holder="nobody"),
    FederatedDropout(kept=0.5),
    FloatFormat(format="bfloat16"),
    FloatFormat(format="float8_e4m3", scale="tensor"),
    Noise(std=0.1),
    Precode(),
    Qsgd(levels=4),
    Quantize(bits=4),
    RandomK(fraction=0.5),
    SecAdam(),
    SecureAggregation(clients=1),
    Sign(),
    Sign(scale="mean"),
    Sign(scale="mean", error_feedback=1),
    Sign(scale="layer_mean", error_feedback=1),
    Soteria(fraction=0.5),
    Sparsify(fraction=0.5),
    Sparsify(fraction=0.5, scope="global"),
    TernGrad(),
    Threshold(least=0.3),
    Ats(policies=("contrast 6",)),
    Mixup(),
]


def client(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> ClientModel:
    torch.manual_seed(0)
    module = make().eval().to(dtype)
    return ClientModel(
        module=module,
        parameters={name: p.detach() for name, p in module.named_parameters()},
        constants=dict(module.named_buffers()),
        shape=SHAPE,
        mean=torch.full((1, 1, 1), 0.4, dtype=dtype),
        std=torch.full((1, 1, 1), 0.3, dtype=dtype),
        loss_scale=1.0,
        classes=CLASSES,
        head=None,
    )


def plain(model: ClientModel, image: torch.Tensor, label: torch.Tensor) -> Gradient:
    """The gradient of one image by a plain backward pass."""
    module = model.module
    loss = F.cross_entropy(module((image[None] - model.mean) / model.std), label[None])
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return dict(zip(model.parameters, gradients, strict=True))


def distance_of(replica: Gradient, observed: Gradient, distance: str) -> float:
    a, b = flat(replica).double(), flat(observed).double()
    if distance == "cosine":
        return float(1 - a @ b / (a.norm() * b.norm()))
    return float((a - b).square().sum() / b.square().sum())


def context() -> Context:
    return Context(torch.Generator().manual_seed(0))


def way_of(defense: Pipeline, distance: str) -> ValueWise | None:
    return (defense.likelihood if distance == "likelihood" else defense.replica).value_wise()


def trials(model: ClientModel, defense: Pipeline) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(TRIALS, CANDIDATES, *SHAPE, generator=random).to(model.mean)
    labels = torch.randint(CLASSES, (TRIALS, CANDIDATES), generator=random)
    truths = torch.rand(TRIALS, *SHAPE, generator=random).to(model.mean)
    observed = [
        defense.apply(plain(model, truth, torch.tensor(index)), context())
        for index, truth in enumerate(truths)
    ]
    return images, labels, observed


@pytest.mark.parametrize("distance", ["l2", "cosine", "likelihood"])
@pytest.mark.parametrize("steps", PIPELINES, ids=lambda steps: str(Pipeline(steps)))
@pytest.mark.parametrize("make", [*LAYER_BY_LAYER, *WHOLE], ids=lambda make: make.__name__)
def test_every_way_is_the_plain_loop(
    make: Callable[[], nn.Module],
    steps: list[Defense],
    distance: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, defense = client(make), Pipeline(steps)
    images, labels, observed = trials(model, defense)
    expected = torch.zeros(TRIALS, CANDIDATES)
    for t in range(TRIALS):
        for n in range(CANDIDATES):
            gradient = plain(model, images[t, n], labels[t, n])
            if distance == "likelihood":
                expected[t, n] = defense.likelihood.mismatch([gradient], observed[t])
            else:
                replica = defense.replica.replicate([gradient], observed[t])
                expected[t, n] = distance_of(replica, observed[t], distance)
    known = make in LAYER_BY_LAYER and way_of(defense, distance) is not None
    # With each weight by its gradients in one block and in many, and with each as a ghost.
    monkeypatch.setattr(layers, "LEAST_GHOST", 0)
    for block, ghost in ((2**19, 0), (64, 0), (2**19, 10**9)):
        monkeypatch.setattr(layer_wise_module, "BLOCK", block)
        monkeypatch.setattr(layers, "GHOST", ghost)
        matching = Matching(model, defense, distance)
        assert (matching._layer_wise is not None) == known
        found = matching.distances(images, labels, stack(observed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wants", ["losses", "products"])
def test_a_search_of_single_images_holds_no_gradients(
    wants: Any, sample: Callable[..., Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = prepare(sample("sparsified"))
    trials = case.trials.first(2)
    observed = case.client.send(*trials.members, case.contexts("release", range(2)))
    matching = Matching(case.model, case.defense, "l2")
    objective = LatentObjective(
        matching, case.prior, observed, trials.labels, RegularizerSpec(name="none")
    )
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, case.prior.size, generator=random)
    whole = matching._by_gradients(
        pictures(
            case.prior, latents.flatten(0, 1), trials.labels.repeat_interleave(3)[:, None]
        ).unflatten(0, (2, 3)),
        trials.labels[:, None, None].expand(2, 3, 1),
        observed,
    )
    assert matching._layer_wise is not None  # which is tried with whole gradients
    monkeypatch.delattr(ClientGradients, "gradients")
    torch.testing.assert_close(objective.evaluate(latents, wants).losses, whole)


@pytest.mark.parametrize("block", [2**19, 64])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("steps", PIPELINES, ids=lambda steps: str(Pipeline(steps)))
@pytest.mark.parametrize("make", [*LAYER_BY_LAYER, *WHOLE], ids=lambda make: make.__name__)
def test_residual_products_are_those_of_a_plain_loop(
    make: Callable[[], nn.Module],
    steps: list[Defense],
    distance: Any,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, defense = client(make), Pipeline(steps)
    images, labels, observed = trials(model, defense)
    monkeypatch.setattr(layer_wise_module, "BLOCK", block)
    matching = Matching(model, defense, distance)
    found = matching.residual_products(images[:, :, None], labels[:, :, None], stack(observed))
    known = make in LAYER_BY_LAYER and defense.replica.value_wise() is not None
    if not known or not defense.replica.is_smooth:
        assert found is None
        return
    assert found is not None
    losses, products = found
    expected_losses = matching.distances(images, labels, stack(observed))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-6)
    for t, seen in enumerate(observed):
        rows = []
        for image, label in zip(images[t], labels[t], strict=True):
            replica = flat(defense.replica.replicate([plain(model, image, label)], seen)).double()
            target = flat(seen).double()
            if distance == "cosine":
                rows.append((target / target.norm() - replica / replica.norm()) / 2**0.5)
            else:
                rows.append((target - replica) / target.norm())
        table = torch.stack([rows[0], *(row - rows[0] for row in rows[1:])])
        expected = (table @ table.T).float()
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(products[t], expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("memory", [MEMORY, 1], ids=["layer by layer", "whole gradients"])
def test_a_candidate_that_is_not_a_number_has_no_distance(memory: int, distance: Any) -> None:
    images, labels, observed = many(client(lenet), 3)
    images[0, 1] = torch.nan
    matching = Matching(client(lenet), Pipeline([Clip(bound=0.3)]), distance, memory)
    losses, _ = Residuals(matching)(images[:, :, None], labels[:, :, None], observed)
    assert losses.isnan().tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("memory", [MEMORY, 1], ids=["layer by layer", "whole gradients"])
def test_a_candidate_without_a_gradient_has_no_direction(memory: int) -> None:
    model = client(lenet)
    images, labels, observed = many(model, 3)
    model.parameters["5.bias"][labels[0, 1]] += 1e4  # a loss of exactly zero
    found = Residuals(Matching(model, Pipeline([]), "cosine", memory))(
        images[:, :, None], labels[:, :, None], observed
    )
    assert float(found[0][0, 1]) == 1


def test_residuals_are_compared_by_layers_only_where_they_fit_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = client(lenet)
    images, labels, observed = many(model, 8)
    arguments = images[:, :, None], labels[:, :, None], observed
    plenty, little = Matching(model, Pipeline([]), "l2"), Matching(model, Pipeline([]), "l2", 2**16)
    assert plenty.residual_products(*arguments) is not None
    assert little.residual_products(*arguments) is None
    by_layers = Residuals(plenty)(*arguments)
    monkeypatch.setattr(Matching, "residual_products", lambda *_: None)
    for own, whole in zip(by_layers, Residuals(plenty)(*arguments), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("step", EVERY_DEFENSE, ids=str)
def test_a_replica_of_a_kind_is_that_of_the_whole_gradient(step: Step, readable: bool) -> None:
    kind = step.replica_kind if isinstance(step, Defense) else "whole"
    by_values = step.by_values(readable) if kind == "values" else None
    by_factor = step.by_factor() if kind == "scaling" else None
    if kind != "identity" and by_values is None and by_factor is None:
        return
    random = torch.Generator().manual_seed(0)
    shapes = {"one": (4, 3, 3), "other": (7,)}
    gradient = {name: torch.randn(*shape, generator=random) for name, shape in shapes.items()}
    other = {name: torch.randn(*shape, generator=random) for name, shape in shapes.items()}
    plain_step = step.model_copy(update={"error_feedback": 0}) if rounds_remembered(step) else step
    observed = plain_step.apply(other, context())
    expected = step.replicate(gradient, observed if readable else None)
    found = gradient
    if by_factor is not None:
        found = each(lambda tensor: by_factor(norm(gradient)) * tensor, gradient)
    if by_values is not None:
        readings = by_values.readings(observed)
        found = each(torch.clone, gradient)
        for name, tensor in gradient.items():
            values, beside = tensor.flatten(), readings[name].expand_as(tensor).flatten()
            for index in range(len(values)):
                place = slice(index, index + 1)
                found[name].view(-1)[place] = by_values.on_values(values[place], beside[place])
            assert not by_values.on_values(torch.zeros_like(values), beside).any()
    torch.testing.assert_close(found, expected)


def test_every_shipped_defense_says_of_which_kind_it_is() -> None:
    steps = {kind for kind in shipped().values() if issubclass(kind, Step)}
    assert {type(step) for step in EVERY_DEFENSE} == steps
    kinds = {step.replica_kind for step in EVERY_DEFENSE if isinstance(step, Defense)}
    assert kinds == {"identity", "values", "scaling", "whole"}


def test_a_mean_over_clients_leaves_what_they_send_alone() -> None:
    joins = [step for step in EVERY_DEFENSE if isinstance(step, Aggregation) and step.is_mean]
    sent = {"w": torch.ones(3)}
    assert joins
    assert all(step.finish(step.lift(sent)) is sent for step in joins)


class Shifted(Sparsify):
    """A user's own step, which inherits what it is said to be."""

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Adds what the values do not tell."""
        mean = flat(gradient).mean()
        return each(lambda tensor: tensor + mean, gradient)


@pytest.mark.parametrize(
    "steps",
    [
        [Shifted(fraction=0.5)],
        [Sign(scale="mean")],
        [Clip(bound=0.3, scope="layer")],
        [Clip(bound=0.3), Sparsify(fraction=0.5)],  # scales by a norm that is not the replica's
        [SecAdam()],
        [SecureAggregation(clients=2)],
        [Clip(bound=0.3, unit="sample")],
    ],
    ids=lambda steps: str(Pipeline(steps)),
)
def test_whole_gradients_are_taken_where_values_depend_on_each_other(steps: list[Defense]) -> None:
    assert Pipeline(steps).replica.value_wise() is None


def test_a_user_s_step_that_inherits_a_kind_is_replicated_whole() -> None:
    model, defense = client(lenet), Pipeline([Shifted(fraction=0.5)])
    images, labels, observed = trials(model, defense)
    found = Matching(model, defense, "l2").distances(images, labels, stack(observed))
    replica = defense.replica.replicate([plain(model, images[1, 2], labels[1, 2])], observed[1])
    assert float(found[1, 2]) == pytest.approx(distance_of(replica, observed[1], "l2"), rel=1e-4)


@pytest.mark.parametrize("distance", [1e-4, 1e-2])
def test_small_distances_keep_their_digits(distance: float) -> None:
    model = client(lenet)
    images, labels, (observed, _) = trials(model, Pipeline())
    own = plain(model, images[0, 0], labels[0, 0])
    ratio = (distance / distance_of(own, observed, "l2")) ** 0.5
    close = {name: tensor + ratio * (observed[name] - tensor) for name, tensor in own.items()}
    found = Matching(model, Pipeline(), "l2").distances(images[:1], labels[:1], stack([close]))
    expected = distance_of(own, close, "l2")
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_in_double_precision_the_distances_are_exact() -> None:
    model, defense = client(Residual, torch.double), Pipeline([Sparsify(fraction=0.5)])
    images, labels, observed = trials(model, defense)
    found = Matching(model, defense, "l2").distances(images, labels, stack(observed))
    assert found.dtype == torch.double
    replica = defense.replica.replicate([plain(model, images[0, 1], labels[0, 1])], observed[0])
    assert float(found[0, 1]) == pytest.approx(distance_of(replica, observed[0], "l2"), rel=1e-9)


@pytest.mark.parametrize(("size", "sizes"), [(0, []), (5, [5]), (12, [12]), (32, [11, 11, 10])])
def test_parts_of_a_dimension_are_of_about_equal_size(size: int, sizes: list[int]) -> None:
    assert [len(range(size)[part]) for part in slices(size, 12)] == sizes


class Flattened(nn.Module):
    """Notes how the map is laid out that it flattens, if it can."""

    def __init__(self, flatten: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(100, CLASSES)
        self.flatten, self.seen = flatten, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        taken = self.body(images)
        flat = self.flatten(taken)
        self.seen.append(taken.is_contiguous(memory_format=torch.channels_last))
        return self.head(flat)


@pytest.mark.parametrize(
    ("flatten", "channels_last"),
    [
        (lambda taken: taken.flatten(1), True),
        (lambda taken: taken.view(len(taken), -1), False),
        # Runs in both layouts, and means another model in each.
        (lambda taken: taken.as_strided((len(taken), 100), (100, 1)), False),
    ],
    ids=["any", "contiguous", "by strides"],
)
def test_channels_are_last_where_the_model_takes_that(
    flatten: Callable[[torch.Tensor], torch.Tensor], channels_last: bool
) -> None:
    model = client(lambda: Flattened(flatten))
    images, labels, observed = trials(model, Pipeline())
    matching = Matching(model, Pipeline(), "l2")
    found = matching.distances(images, labels, stack(observed))
    assert matching._layer_wise is not None
    assert model.module.seen[-1] == channels_last
    own = plain(model, images[1, 2], labels[1, 2])
    expected = distance_of(own, observed[1], "l2")
    assert float(found[1, 2]) == pytest.approx(expected, rel=1e-4)


class Greedy(nn.Module):
    """Runs out of memory for more than a few images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.head = nn.Linear(432, CLASSES)
        self.most, self.seen = most, [0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError
        return self.head(images.flatten(1))


def many(model: ClientModel, count: int) -> tuple[torch.Tensor, torch.Tensor, Gradient]:
    images, labels, observed = trials(model, Pipeline())
    rows = [index % CANDIDATES for index in range(count)]
    return images[:, rows], labels[:, rows], stack(observed)


def test_chunks_are_halved_where_the_layers_take_too_much_memory() -> None:
    model = client(lambda: Greedy(most=5))
    expected = Matching(client(lambda: Greedy(most=99)), Pipeline()).distances(*many(model, 20))
    matching = Matching(model, Pipeline())
    found = matching.distances(*many(model, 20))
    torch.testing.assert_close(found, expected)
    seen = model.module.seen
    assert seen[-1] <= min(5, matching._layer_wise.chunk)
    assert max(seen) > 5
    before = len(seen)
    matching.distances(*many(model, 20))
    assert max(seen[before:]) <= 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_chunks_are_halved_where_gradients_take_too_much_memory(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = client(Shared)
    expected = Matching(model, Pipeline()).distances(*many(model, 6))
    matching = Matching(model, Pipeline())
    whole = matching.clients._shares

    def greedy(images: torch.Tensor, labels: torch.Tensor, drawn: Any) -> Gradient:
        if len(images) > 2:
            raise error
        return whole(images, labels, drawn)

    monkeypatch.setattr(matching.clients, "_shares", greedy)
    torch.testing.assert_close(matching.distances(*many(model, 6)), expected)
    assert matching.clients.chunk <= 2


def test_what_fits_in_no_chunk_is_told() -> None:
    model = client(Shared)
    matching = Matching(model, Pipeline())

    def full(*_: Any) -> Gradient:
        raise torch.OutOfMemoryError

    matching.clients._shares = full
    with pytest.raises(torch.OutOfMemoryError):
        matching.distances(*many(model, 2))


@pytest.mark.parametrize("make", [lenet, Shared])
def test_less_memory_gives_smaller_chunks_and_the_same(make: Callable[[], nn.Module]) -> None:
    model = client(make)
    chunks, found = [], []
    for memory in (2**24, 2**20, 1):
        matching = Matching(model, Pipeline(), memory=memory)
        found.append(matching.distances(*many(model, 7)))
        way = matching._layer_wise
        chunks.append(matching.clients.chunk if way is None else way.chunk)
    assert chunks[0] > chunks[1] >= chunks[2] == 1
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
