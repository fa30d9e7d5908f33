from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ggl_audit.attack.labels import scale_of_one
from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, take
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.defenses import Context, build_pipeline
from ggl_audit.evidence.assignment import assign, assign_labels
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.fidelity import candidate_distances
from ggl_audit.evidence.identification import captured_trial, match, reconstruction_ranks
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel, Head
from ggl_audit.spec import DefenseSpec


def squared(candidates: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    errors: torch.Tensor = (candidates - pictures[:, None]).square().flatten(2).mean(2)
    return errors


def cheapest_by_brute_force(costs: np.ndarray) -> float:
    """Over all permutations."""
    count = len(costs)
    return min(
        sum(costs[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(count))
    )


@given(count=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_assignment_is_the_cheapest_of_all_permutations(count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    pictures, truths = torch.rand(2, count, 1, 2, 2, generator=random)
    places = assign(pictures, truths, squared)
    assert sorted(places) == list(range(count))
    costs = np.array([[float((p - t).square().mean()) for t in truths] for p in pictures])
    paid = sum(costs[row, column] for row, column in enumerate(places))
    assert paid == pytest.approx(cheapest_by_brute_force(costs), rel=1e-6)


def test_the_nearest_image_is_not_taken_twice() -> None:
    """Both pictures are nearest to the first image; together they are cheaper apart."""
    truths = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    pictures = torch.tensor([0.4, 0.1]).view(2, 1, 1, 1)
    assert assign(pictures, truths, squared) == [1, 0]


def test_the_order_of_shuffled_pictures_is_found_by_every_distance(model: ClientModel) -> None:
    truths = digits("private").images[:8]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    pictures = (truths[order] + 0.02).clamp(0, 1)
    for distance in candidate_distances(model, None).values():
        assert assign(pictures, truths, distance) == order.tolist()


def test_a_distance_that_is_not_finite_is_the_farthest() -> None:
    table = torch.tensor([[float("nan"), 5.0], [1.0, float("inf")]])
    assert assign(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), lambda *_: table) == [1, 0]


def batch(
    model: ClientModel, steps: list[dict[str, object]], size: int, seed: int = 0
) -> tuple[Matching, torch.Tensor, torch.Tensor, Gradient]:
    """A release of one client with its images, labels and gradient."""
    defense = build_pipeline([DefenseSpec.model_validate(step) for step in steps])
    matching = Matching(replace(model, batch_size=size), defense)
    data = digits("private")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:size]
    images, labels = data.images[chosen], data.labels[chosen]
    context = Context(torch.Generator().manual_seed(seed))
    sent = DeclaredClient(matching.clients, defense).send(images[None], labels[None], [context])
    return matching, images, labels, take(sent, 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "step",
    [
        {"name": "noise", "std": 0.001},
        {"name": "clip", "bound": 0.5},
        {"name": "sparsify", "fraction": 0.5},
    ],
    ids=lambda step: str(step["name"]),
)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_labels_are_assigned_to_their_images(
    model: ClientModel, size: int, step: dict[str, object], bias: bool
) -> None:
    for seed in range(5):
        matching, images, labels, sent = batch(model, [step], size, seed)
        tried = matching.model
        if not bias:
            assert model.head is not None
            tried = replace(tried, head=Head(model.head.module, model.head.weight, None))
        scale = scale_of_one(tried, matching.defense, size)
        found = assign_labels(sent, tried, images, sorted(labels.tolist()), scale)
        assert found == labels.tolist()


STEPS = {
    "nothing": [],
    "clip": [{"name": "clip", "bound": 0.3}],
    "sparsify": [{"name": "sparsify", "fraction": 0.9}],
    "clip, noise": [{"name": "clip", "bound": 0.3}, {"name": "noise", "std": 0.02}],
}


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("name", STEPS)
def test_the_right_images_agree_and_others_contradict(
    model: ClientModel, name: str, size: int
) -> None:
    """One wrong image, all of them in another order of labels, or one of two clients' batches."""
    matching, images, labels, sent = batch(model, STEPS[name], size)
    others, defense = digits("reference").images, matching.defense

    def outcome(images: torch.Tensor, labels: torch.Tensor) -> str:
        return check_truth(matching, defense, sent, images, others, labels).outcome

    assert outcome(images, labels) == "agrees"
    assert outcome(images.flip(0), labels.flip(0)) == "agrees"
    if "noise" in name:
        quiet = {n: tensor * 0.9 for n, tensor in sent.items()}
        assert check_truth(matching, defense, quiet, images, others, labels).outcome != "agrees"
        return
    wrong = images.clone()
    wrong[-1] = digits("private").images[100]
    assert outcome(wrong, labels) == "contradicts"
    assert outcome(images, labels.roll(1)) == "contradicts"


def test_a_captured_image_of_a_batch_is_ranked_among_its_class(model: ClientModel) -> None:
    """By matching with all others known, also those of its own client; by the nearest picture."""
    matching, images, labels, sent = batch(model, [], 4)
    observed = {name: tensor[None] for name, tensor in sent.items()}
    random = np.random.default_rng(0)
    pictures = images.flip(0)[None]
    for place in range(4):
        trial = captured_trial(images, labels.tolist(), place, 4, digits("reference"), 16, random)
        assert trial is not None
        assert trial.images.shape == (1, 16, 1, 16, 16)
        assert torch.equal(trial.canaries[0], images[place])
        assert sorted(trial.members[1][0].tolist()) == sorted(labels.tolist())
        assert match(matching, trial, observed, random.random(1)) == [1]
        assert reconstruction_ranks(pictures, trial, squared, random.random(1)) == [1]


def test_the_companions_of_a_captured_image_are_its_own_clients_first(
    model: ClientModel,
) -> None:
    data = digits("private")
    images, labels = data.images[:6], data.labels[:6].tolist()
    trial = captured_trial(images, labels, 3, 2, digits("reference"), 8, np.random.default_rng(0))
    assert trial is not None
    order = [3, 2, 0, 1, 4, 5]
    assert torch.equal(trial.members[0][0], images[order])
    assert trial.members[1][0].tolist() == [labels[i] for i in order]
