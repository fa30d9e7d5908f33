from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, multivariate_normal
from torch import nn

from ggl_audit.attack.labels import infer_several, scale_of_one, usual_head
from ggl_audit.attack.matching import Matching
from ggl_audit.attack.objective import LatentObjective, pictures
from ggl_audit.attack.search import search
from ggl_audit.basics.gradient import Gradient, each, flat, stack, take
from ggl_audit.case.loading import load_client
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Clip, Context, Defense, Pipeline, Sign, Sparsify
from ggl_audit.evidence.assignment import assign
from ggl_audit.evidence.fidelity import candidate_distances, mean_psnr
from ggl_audit.evidence.identification import draw_trials, match, rank_of_truth
from ggl_audit.evidence.membership import UnknownMembers
from ggl_audit.inputs.images import ImageSet, digits, fingerprints
from ggl_audit.inputs.model import ClientModel, Head
from ggl_audit.optimizers import start_optimizer
from ggl_audit.priors.loading import bundled_folder, load_trained
from ggl_audit.spec import AttackSpec, RegularizerSpec, Spec
from tests.conftest import contexts

CPU = torch.device("cpu")
Cohort = tuple[Pipeline, ClientModel]
Steps = list[dict[str, Any]]

TOGETHER = {"name": "secure_aggregation"}
NOISE = {"name": "noise", "std": 0.01}
CLIENT_SIDE: dict[str, tuple[Steps, list[Defense]]] = {
    "nothing": ([], []),
    "clip": ([{"name": "clip", "bound": 0.5}], [Clip(bound=0.5)]),
    "clip of layers": (
        [{"name": "clip", "bound": 0.2, "scope": "layer"}],
        [Clip(bound=0.2, scope="layer")],
    ),
    "sparsify": ([{"name": "sparsify", "fraction": 0.9}], [Sparsify(fraction=0.9)]),
    "sign": ([{"name": "sign"}], [Sign()]),
    "clip, then sparsify": (
        [{"name": "clip", "bound": 0.5}, {"name": "sparsify", "fraction": 0.8}],
        [Clip(bound=0.5), Sparsify(fraction=0.8)],
    ),
}


def context(seed: int = 0) -> Context:
    return Context(torch.Generator().manual_seed(seed))


@pytest.fixture
def cohort(sample: Callable[..., Spec]) -> Callable[..., Cohort]:
    def build(batch_size: int, defense: Steps, **keys: Any) -> Cohort:
        spec = sample(
            "undefended",
            capture__batch_size=batch_size,
            evidence__truth=None,
            defense=defense,
            **keys,
        )
        return load_client(spec, CPU)

    return build


def backward(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    model.module.zero_grad()
    logits = model.module((images - model.mean) / model.std)
    F.cross_entropy(logits, labels).backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def mean_of_clients(
    model: ClientModel, images: torch.Tensor, labels: torch.Tensor, steps: list[Defense]
) -> torch.Tensor:
    """What a cohort sends in a plain loop, without noise: (n x B, ...) images of n clients."""
    sent = []
    for own, own_labels in zip(
        images.split(model.batch_size), labels.split(model.batch_size), strict=True
    ):
        gradient = backward(model, own, own_labels)
        for step in steps:
            gradient = step.apply(gradient, context())
        sent.append(flat(gradient))
    return torch.stack(sent).mean(0)


def distance(replica: torch.Tensor, observed: torch.Tensor) -> float:
    a, b = replica.double(), observed.double()
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("noisy", [False, True], ids=["without noise", "noise of the server"])
@pytest.mark.parametrize("known", [False, True], ids=["all unknown", "others known"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("name", CLIENT_SIDE)
def test_distances_of_sets_are_those_of_a_plain_loop(
    cohort: Callable[..., Cohort], name: str, chunk: int | None, known: bool, noisy: bool
) -> None:
    """Three clients with two images each; the last two clients may be known."""
    declared, steps = CLIENT_SIDE[name]
    tail = [{**TOGETHER, "clients": 3}, *([NOISE] if noisy else [])]
    defense, model = cohort(2, [*declared, *tail])
    data = digits("private")
    random = torch.Generator().manual_seed(2)
    true = torch.randint(len(data), (2, 6), generator=random)
    others = true[:, None].expand(-1, 3, -1).clone()
    changed = slice(0, 2) if known else slice(0, 6)
    others[:, 1:, changed] = torch.randint(
        len(data), others[:, 1:, changed].shape, generator=random
    )

    matching = Matching(model, defense)
    client = DeclaredClient(matching.clients, defense)
    observed = client.send(data.images[true], data.labels[true], contexts(len(true)))
    if chunk is not None:
        matching.clients.chunk = chunk
    if known:
        rest = data.images[true[:, 2:]], data.labels[true[:, 2:]]
        own = others[:, :, :2]
        found = matching.distances(data.images[own], data.labels[own], observed, rest)
    else:
        found = matching.distances(data.images[others], data.labels[others], observed)
    assert found.shape == (2, 3)
    for t, n in itertools.product(range(2), range(3)):
        one = others[t, n]
        plain = mean_of_clients(model, data.images[one], data.labels[one], steps)
        expected = distance(plain, flat(take(observed, t)))
        # The sign of a value that is zero up to rounding may fall either way.
        tolerance = 1e-2 if name == "sign" else 1e-3
        assert float(found[t, n]) == pytest.approx(expected, rel=tolerance, abs=1e-4)
    if not noisy:
        assert float(found[:, 0].max()) < 1e-4
        assert float(found[:, 1:].min()) > 1e-2


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", CLIENT_SIDE)
def test_distances_in_turn_are_those_of_the_whole_sets(
    cohort: Callable[..., Cohort], name: str, clients: int, chunk: int | None, loss: str
) -> None:
    tail = [{**TOGETHER, "clients": clients}] if clients > 1 else []
    defense, model = cohort(2, [*CLIENT_SIDE[name][0], *tail], model__loss__reduction=loss)
    matching = Matching(model, defense, "l2")
    data, random, members = digits("private"), torch.Generator().manual_seed(3), 2 * clients
    true, given = torch.randint(len(data), (2, 2, members), generator=random)
    tried = torch.randint(len(data), (2, members, 3), generator=random)
    labels = data.labels[true]
    observed = DeclaredClient(matching.clients, defense).send(
        data.images[true], labels, contexts(len(labels))
    )
    assert matching.clients.adds_up
    whole = given[:, None, None].expand(-1, members, 3, -1).clone()
    for place in range(members):
        whole[:, place, :, place] = tried[:, place]
    expected = matching.distances(
        data.images[whole.flatten(1, 2)],
        labels[:, None].expand(-1, 3 * members, -1),
        observed,
    )
    if chunk is not None:
        matching.clients.chunk = chunk
    found = matching.distances_in_turn(data.images[tried], labels, data.images[given], observed)
    assert found.shape == (2, members, 3)
    # The sign of a value that is zero up to rounding may fall either way.
    tolerance = 1e-2 if name == "sign" else 1e-4
    torch.testing.assert_close(found.flatten(1), expected, rtol=tolerance, atol=1e-6)


class Normalized(nn.Module):
    """Batch statistics, of each pixel or of all of them."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.normalize = nn.BatchNorm1d(256) if flat else nn.BatchNorm2d(1)
        self.head = nn.Linear(256, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        normalized = self.normalize(images.flatten(1) if self.flat else images)
        output: torch.Tensor = self.head(normalized.flatten(1))
        return output


NORMALIZED = {
    "model__factory": f"{__file__}:Normalized",
    "model__weights": None,
    "model__mode": "train",
}


@pytest.mark.parametrize(
    ("keys", "adds_up"),
    [
        ({}, True),
        ({"model__loss__reduction": "sum"}, True),
        ({"defense": [{"name": "clip", "bound": 0.1, "unit": "sample"}]}, True),
        ({"defense": [{"name": "ats", "policies": ["rotate 2"]}]}, True),
        ({"defense": [{"name": "mixup"}]}, False),
        ({"capture__kind": "update", "capture__local": {"lr": 0.1, "epochs": 2}}, False),
        ({"capture__kind": "update", "capture__local": {"lr": 0.1}}, True),
        (NORMALIZED, False),
        ({**NORMALIZED, "model__kwargs": {"flat": True}}, False),
    ],
)
def test_which_gradients_add_up(
    cohort: Callable[..., Cohort], keys: dict[str, Any], adds_up: bool
) -> None:
    keys = {"defense": [], **keys}
    defense, model = cohort(4, **keys)
    assert ClientGradients(model, defense).adds_up is adds_up


def test_the_losses_in_turn_are_those_of_the_whole_sets(cohort: Callable[..., Cohort]) -> None:
    defense, model = cohort(3, [])
    data, random = digits("private"), torch.Generator().manual_seed(0)
    observed = ClientGradients(model, defense).gradients(
        data.images[None, :3], data.labels[None, :3]
    )
    prior = load_trained(bundled_folder() / "digits")
    objective = LatentObjective(
        Matching(model, defense, "l2"),
        prior,
        observed,
        data.labels[None, :3],
        RegularizerSpec(name="norm"),
    )
    assert (objective.parts(together=False), objective.parts(together=True)) == (3, 1)
    given = torch.randn(1, 2, 3, prior.size, generator=random)
    tried = torch.randn(1, 2, 3, 4, prior.size, generator=random)
    found = objective.losses_in_turn(tried, given)
    assert found.shape == (1, 2, 3, 4)
    for place, part, count in itertools.product(range(2), range(3), range(4)):
        whole = given[0, place].clone()
        whole[part] = tried[0, place, part, count]
        expected = objective.losses(whole.reshape(1, 1, -1))
        assert float(found[0, place, part, count]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_search_for_each_image_finds_more_than_one_for_all(
    cohort: Callable[..., Cohort], batch_size: int
) -> None:
    """At equal evaluations, by the mean PSNR after assignment."""
    defense, model = cohort(batch_size, [])
    data, prior = digits("private"), load_trained(bundled_folder() / "digits")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: 3 * batch_size].view(3, batch_size)
    labels = data.labels[chosen]
    observed = ClientGradients(model, defense).gradients(data.images[chosen], labels)
    psnr = {}
    for apart in (True, False):
        matching = Matching(model, defense, "l2")
        matching.clients.adds_up = apart
        objective = LatentObjective(matching, prior, observed, labels, RegularizerSpec())
        parts = objective.parts(together=False)
        start = start_optimizer(AttackSpec(optimizer="cma"), prior.size * batch_size // parts)
        seeds = np.arange(3 * parts).reshape(3, 1, parts)
        result = search(objective, start, seeds, 250, lambda _: None)
        assert result.evaluations == 3 * 250
        found = pictures(prior, result.latents, labels)
        pixels = candidate_distances(model, None)["pixels"]
        psnr[apart] = np.mean(
            [
                mean_psnr(own, truths[assign(own, truths, pixels)])
                for own, truths in zip(found, data.images[chosen], strict=True)
            ]
        )
    assert psnr[True] > psnr[False] + 1


@pytest.mark.parametrize("batch_size", [2, 4])
def test_the_order_of_a_batch_does_not_matter(
    cohort: Callable[..., Cohort], batch_size: int
) -> None:
    defense, model = cohort(batch_size, [])
    data = digits("private")
    images, labels = data.images[:batch_size], data.labels[:batch_size]
    observed = stack([backward(model, images, labels)])
    found = Matching(model, defense).distances(
        images.flip(0)[None, None], labels.flip(0)[None, None], observed
    )
    assert float(found) < 1e-6


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("name", CLIENT_SIDE)
def test_matching_with_companions_always_finds_the_canary_without_noise(
    cohort: Callable[..., Cohort], name: str, clients: int, batch_size: int
) -> None:
    tail = [{**TOGETHER, "clients": clients}] if clients > 1 else []
    defense, model = cohort(batch_size, [*CLIENT_SIDE[name][0], *tail])
    random = np.random.default_rng(0)
    members = clients * batch_size
    trials = draw_trials(digits("reference"), 8, 16, random, companions=members - 1)
    matching = Matching(model, defense)
    observed = DeclaredClient(matching.clients, defense).send(
        *trials.members, contexts(len(trials))
    )
    assert match(matching, trials, observed, random.random(len(trials))) == [1] * 8


def test_matching_gives_chance_for_releases_of_others(cohort: Callable[..., Cohort]) -> None:
    """Of random images, which are no candidates: the truth ranks first by lot only."""
    defense, model = cohort(1, [{**TOGETHER, "clients": 3}])
    random = np.random.default_rng(0)
    trials = draw_trials(digits("reference"), 200, 8, random, companions=2)
    matching = Matching(model, defense)
    images, labels = trials.members
    others = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    observed = DeclaredClient(matching.clients, defense).send(others, labels, contexts(len(labels)))
    hits = match(matching, trials, observed, random.random(len(trials))).count(1)
    assert binom.ppf(1e-4, 200, 1 / 8) <= hits <= binom.ppf(1 - 1e-4, 200, 1 / 8)


def batches_with_duplicates(batch_size: int) -> torch.Tensor:
    """Indices (20, B): a third of the batches of at most two classes, a third of one image."""
    data = digits("private")
    random = torch.Generator().manual_seed(batch_size)
    chosen = torch.randint(len(data), (20, batch_size), generator=random)
    few = torch.nonzero(data.labels < 2).flatten()
    chosen[:6] = few[torch.randint(len(few), (6, batch_size), generator=random)]
    chosen[6:12] = chosen[6:12, :1]
    return chosen


@pytest.mark.parametrize(
    "batch_size",
    [*range(2, 9), 16],
)
def test_the_labels_of_an_undefended_batch_are_inferred_exactly(
    cohort: Callable[..., Cohort], batch_size: int
) -> None:
    """Of a model at random weights; duplicates and more images than classes included."""
    defense, model = cohort(batch_size, [])
    data = digits("private")
    chosen = batches_with_duplicates(batch_size)
    observed = ClientGradients(model, defense).gradients(data.images[chosen], data.labels[chosen])
    usual = usual_head(model, digits("reference"))
    scale = scale_of_one(model, defense, batch_size)
    found = infer_several(observed, model, usual, batch_size, scale)
    assert found.tolist() == data.labels[chosen].sort(1).values.tolist()


def finer(data: ImageSet, classes: int) -> ImageSet:
    """Odd or even; or each digit in ten, by how much of it is on the right."""
    if classes == 2:
        return replace(data, labels=data.labels % 2)
    weight = (data.images * torch.linspace(-1, 1, 16)).sum((1, 2, 3))
    labels = 10 * data.labels
    for label in range(10):
        members = torch.nonzero(data.labels == label).flatten()
        labels[members] += weight[members].argsort().argsort() * 10 // len(members)
    return replace(data, labels=labels)


@pytest.mark.parametrize(
    ("steps", "whole_head"),
    [([], True), ([], False), ([NOISE], True)],
    ids=["undefended", "by the errors alone", "noise"],
)
@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
@pytest.mark.parametrize("classes", [2, 100])
def test_the_labels_of_few_and_of_many_classes_are_inferred_exactly(
    cohort: Callable[..., Cohort],
    monkeypatch: pytest.MonkeyPatch,
    classes: int,
    batch_size: int,
    steps: Steps,
    whole_head: bool,
) -> None:
    """With 2 classes there are more images than classes, and the counts are only in the scale."""
    if not whole_head:
        monkeypatch.setattr("ggl_audit.attack.labels.LARGEST_TABLE", 1)
    defense, model = cohort(
        batch_size, steps, model__weights=None, model__kwargs={"classes": classes}
    )
    data, public = finer(digits("private"), classes), finer(digits("reference"), classes)
    random = torch.Generator().manual_seed(batch_size)
    chosen = torch.randint(len(data), (20, batch_size), generator=random)
    sent = DeclaredClient(ClientGradients(model, defense), defense).send(
        data.images[chosen], data.labels[chosen], contexts(len(chosen))
    )
    scale = scale_of_one(model, defense, batch_size)
    found = infer_several(sent, model, usual_head(model, public), batch_size, scale)
    assert found.tolist() == data.labels[chosen].sort(1).values.tolist()


@pytest.mark.parametrize("batch_size", [2, 4])
def test_the_labels_of_a_sparsified_batch_are_read_off_what_is_left(
    cohort: Callable[..., Cohort], batch_size: int
) -> None:
    """Of the ten values of the bias one is left."""
    defense, model = cohort(batch_size, CLIENT_SIDE["sparsify"][0])
    data = digits("private")
    chosen = batches_with_duplicates(batch_size)
    sent = DeclaredClient(ClientGradients(model, defense), defense).send(
        data.images[chosen], data.labels[chosen], contexts(len(chosen))
    )
    scale = scale_of_one(model, defense, batch_size)
    usual = usual_head(model, digits("reference"))
    found = infer_several(sent, model, usual, batch_size, scale)
    assert found.tolist() == data.labels[chosen].sort(1).values.tolist()


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("loss", [{"reduction": "mean"}, {"reduction": "sum", "scale": 0.5}])
def test_the_scale_of_one_image_is_that_of_its_error_in_the_bias(
    cohort: Callable[..., Cohort], loss: dict[str, Any], clients: int
) -> None:
    tail = [{**TOGETHER, "clients": clients}] if clients > 1 else []
    loss = {"name": "cross_entropy", **loss}
    defense, model = cohort(2, tail, model__loss=loss)
    data = digits("private")
    images, labels = data.images[: 2 * clients], data.labels[: 2 * clients]
    client = DeclaredClient(ClientGradients(model, defense), defense)
    sent = client.send(images[None], labels[None], contexts(1))
    with torch.no_grad():
        logits = model.module((images - model.mean) / model.std)
        errors = logits.softmax(1) - F.one_hot(labels, 10)
    scale = scale_of_one(model, defense, 2 * clients)
    assert scale is not None
    torch.testing.assert_close(sent["7.bias"][0], scale * errors.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "known"),
    [
        ([], True),
        ([NOISE], True),
        ([{"name": "sparsify", "fraction": 0.5}, NOISE], True),
        ([{"name": "clip", "bound": 1.0}], False),
        ([{"name": "clip", "bound": 1.0, "unit": "sample"}], False),
        ([{"name": "sign"}], False),
        ([{"name": "quantize", "bits": 4}], False),
        ([{"name": "sec_adam", "clients": 2}], False),
    ],
)
def test_a_step_that_changes_magnitudes_hides_the_scale(
    cohort: Callable[..., Cohort], steps: Steps, known: bool
) -> None:
    defense, model = cohort(2, steps)
    assert (scale_of_one(model, defense, 2) is not None) is known


def test_a_class_without_public_images_is_taken_for_all_of_them(
    cohort: Callable[..., Cohort],
) -> None:
    _, model = cohort(1, [])
    public = digits("reference")
    few = public.without(frozenset(fingerprints(public.images[public.labels == 3])))
    usual = usual_head(model, replace(few, images=few.images[:200], labels=few.labels[:200]))
    with torch.no_grad():
        taken = model.module[:-1]((few.images[:200] - model.mean) / model.std).double()
        given = model.module((few.images[:200] - model.mean) / model.std).softmax(1).double()
    torch.testing.assert_close(usual.representations[3], taken.mean(0))
    torch.testing.assert_close(usual.predictions[3], given.mean(0))
    own = few.labels[:200] == 5
    torch.testing.assert_close(usual.representations[5], taken[own].mean(0))
    torch.testing.assert_close(usual.predictions[5], given[own].mean(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_inferred_labels_do_not_see_the_scale(
    cohort: Callable[..., Cohort], scale: float, bias: bool
) -> None:
    defense, model = cohort(6, [])
    data = digits("private")
    chosen = batches_with_duplicates(6)
    observed = ClientGradients(model, defense).gradients(data.images[chosen], data.labels[chosen])
    observed = each(lambda tensor: scale * tensor, observed)
    assert model.head is not None
    if not bias:
        model = replace(model, head=Head(model.head.module, model.head.weight, None))
    found = infer_several(observed, model, usual_head(model, digits("reference")), 6)
    assert found.tolist() == data.labels[chosen].sort(1).values.tolist()


def test_the_labels_of_a_cohort_are_those_of_one_large_batch(
    cohort: Callable[..., Cohort],
) -> None:
    defense, model = cohort(2, [{**TOGETHER, "clients": 3}])
    data = digits("private")
    chosen = batches_with_duplicates(6)
    matching = Matching(model, defense)
    observed = DeclaredClient(matching.clients, defense).send(
        data.images[chosen], data.labels[chosen], contexts(len(chosen))
    )
    usual = usual_head(model, digits("reference"))
    found = infer_several(observed, model, usual, 6, scale_of_one(model, defense, 6))
    assert found.tolist() == data.labels[chosen].sort(1).values.tolist()


def correlated(count: int, size: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / math.sqrt(size)
    return torch.randn(count, size, generator=random) @ shape + 1.0


def dense_log_likelihoods(
    public: torch.Tensor,
    members: int,
    divisor: int,
    noise: float,
    candidates: torch.Tensor,
    release: torch.Tensor,
) -> np.ndarray:
    """By SciPy's density, with the covariance of one half of the public contributions.

    Outside of what they span it is the variance that the other half has there.
    """
    public, mean = public.double().numpy(), public.double().mean(0).numpy()
    half = (len(public) + 1) // 2
    spanning, held_out = public[:half] - mean, public[half:] - mean
    onto = np.linalg.pinv(spanning) @ spanning
    outside = np.mean((held_out - held_out @ onto) ** 2)
    spread = (members - 1) / divisor**2
    covariance = spread * spanning.T @ spanning / (half - 1)
    covariance += (noise**2 + spread * outside) * np.eye(public.shape[1])
    others = (members - 1) / divisor * mean
    return np.array(
        [
            multivariate_normal.logpdf(release.numpy(), others + one.numpy() / divisor, covariance)
            for one in candidates.double()
        ]
    )


@pytest.mark.parametrize(
    ("size", "noise"),
    [
        (60, 0.0),
        (60, 0.3),
        (12, 0.2),
        pytest.param(
            12,
            0.0,
        ),
    ],
)
@pytest.mark.parametrize(("members", "divisor"), [(2, 2), (8, 8), (8, 1)])
def test_the_likelihood_of_unknown_members_is_scipys(
    size: int, noise: float, members: int, divisor: int
) -> None:
    """Differences between candidates, as a constant is left out."""
    public = correlated(40, size, 0)
    candidates, release = correlated(6, size, 1), correlated(1, size, 2)[0].double()
    release = release * members / divisor
    unknown = UnknownMembers(public, members, divisor, noise)
    found = unknown.log_likelihoods(candidates, release).numpy()
    expected = dense_log_likelihoods(public, members, divisor, noise, candidates, release)
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_members_are_identified_about_as_often_as_by_the_true_likelihood(noise: float) -> None:
    """Contributions are Gaussian with a covariance that only the better statistic is told."""
    size, members, candidates, trials = 16, 8, 8, 400
    shape = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / math.sqrt(size)
    covariance = (shape.T @ shape).double().numpy()
    unknown = UnknownMembers(correlated(256, size, 0), members, members, noise)
    random = torch.Generator().manual_seed(3)
    precision = np.linalg.inv(covariance * (members - 1) / members**2 + noise**2 * np.eye(size))
    hits = best = 0
    lot = np.random.default_rng(0)
    for trial in range(trials):
        tried = correlated(candidates, size, 1000 + trial)
        others = correlated(members - 1, size, 100_000 + trial)
        release = (tried[0] + others.sum(0)) / members
        release = release + noise * torch.randn(size, generator=random)
        hits += rank_of_truth(-unknown.log_likelihoods(tried, release)[None], lot.random(1))[0] == 1
        rest = (release - tried / members - (members - 1) / members).double().numpy()
        score = np.einsum("ni,ij,nj->n", rest, precision, rest)
        best += int(score.argmin() == 0)
    assert best > 2 * trials / candidates
    assert abs(hits - best) < 0.08 * trials


def test_members_are_found_by_chance_where_none_of_the_candidates_is_one() -> None:
    size, members, candidates, trials = 40, 4, 8, 400
    unknown = UnknownMembers(correlated(256, size, 0), members, members, 0.05)
    lot, hits = np.random.default_rng(0), 0
    for trial in range(trials):
        tried = correlated(candidates, size, 1000 + trial)
        release = correlated(members, size, 100_000 + trial).mean(0)
        hits += rank_of_truth(-unknown.log_likelihoods(tried, release)[None], lot.random(1))[0] == 1
    chance = 1 / candidates
    assert binom.ppf(1e-4, trials, chance) <= hits <= binom.ppf(1 - 1e-4, trials, chance)
