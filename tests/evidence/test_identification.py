from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import flat, norm
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Context, Noise, Pipeline, Sign
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.identification import (
    captured_trial,
    draw_trials,
    match,
    rank_of_truth,
    reconstruction_ranks,
)
from ggl_audit.inputs.images import ImageSet, digits
from ggl_audit.inputs.model import ClientModel
from tests.conftest import contexts


def by_pixels(candidates: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    distances: torch.Tensor = (candidates - pictures[:, None]).abs().flatten(2).sum(2)
    return distances


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_candidates_are_others_of_the_class_and_the_canary_comes_first() -> None:
    reference = digits("reference")
    trials = draw_trials(reference, 200, 32, random())
    assert trials.candidates.shape == (200, 32)
    for row, label in zip(trials.candidates, trials.labels, strict=True):
        assert len(set(row.tolist())) == 32
        assert bool((reference.labels[row] == label).all())
    canaries = trials.candidates[:, 0].tolist()
    assert len(set(canaries)) == 200


def test_no_image_is_a_canary_twice() -> None:
    trials = draw_trials(digits("reference"), 1200, 32, random())
    assert len(trials) == 500
    assert len(set(trials.candidates[:, 0].tolist())) == 500


def test_too_few_images_of_a_class_are_an_error() -> None:
    with pytest.raises(SpecError, match=r"no class .* has more than 50 images"):
        draw_trials(digits("reference"), 10, 51, random())


def test_the_rank_counts_the_nearer_and_breaks_ties_by_lot() -> None:
    distances = torch.tensor([[0.5, 0.1, 0.9, 0.2], [0.1, 0.5, 0.6, 0.7]])
    assert rank_of_truth(distances, random().random(2)) == [3, 1]
    level = torch.ones(8000, 4)
    counts = np.bincount(rank_of_truth(level, random().random(len(level))), minlength=5)[1:]
    assert counts.min() > 1800
    broken = torch.tensor([[float("nan"), 1.0, 2.0]])
    assert rank_of_truth(broken, [0.5]) == [3]


def test_a_reconstruction_is_identified_by_its_pixels() -> None:
    trials = draw_trials(digits("reference"), 50, 32, random())
    exact = reconstruction_ranks(trials.canaries[:, None], trials, by_pixels, random().random(50))
    assert exact == [1] * 50
    blurred = torch.nn.functional.avg_pool2d(trials.canaries, 3, 1, 1)
    ranks = reconstruction_ranks(blurred[:, None], trials, by_pixels, random().random(50))
    assert ranks.count(1) >= 45


def test_a_prior_that_draws_a_typical_image_earns_nothing() -> None:
    """A fixed picture of each class is first among N exactly as often as by guessing."""
    reference = digits("reference")
    means = torch.stack([reference.images[reference.labels == k].mean(0) for k in range(10)])
    hits = []
    for seed in range(8):
        trials = draw_trials(reference, 500, 32, np.random.default_rng(seed))
        ranks = reconstruction_ranks(
            means[trials.labels][:, None], trials, by_pixels, random().random(len(trials))
        )
        hits.append(ranks.count(1))
    assert binomtest(sum(hits), 4000, 1 / 32).pvalue > 0.001


@pytest.mark.parametrize("std", [0.0005, 100.0])
def test_matching_finds_all_without_noise_and_guesses_in_strong_noise(
    model: ClientModel, std: float
) -> None:
    defense = Pipeline([Noise(std=std)])
    trials = draw_trials(digits("reference"), 150, 32, random())
    matching = Matching(model, defense)
    client = DeclaredClient(matching.clients, defense)
    observed = client.send(*trials.members, contexts(len(trials)))
    hits = match(matching, trials, observed, random().random(len(trials))).count(1)
    if std < 1:
        assert hits == 150
    else:
        assert binomtest(hits, 150, 1 / 32).pvalue > 0.001


def test_the_captured_image_stands_among_its_class() -> None:
    reference = digits("reference")
    truth = digits("private").images[0]
    trial = captured_trial(truth[None], [4], 0, 1, reference, 32, random())
    assert trial is not None
    assert trial.images.shape == (1, 32, 1, 16, 16)
    assert torch.equal(trial.canaries[0], truth)
    few = ImageSet(reference.images[:60], reference.labels[:60], "few")
    assert captured_trial(truth[None], [4], 0, 1, few, 32, random()) is None


def test_a_gradient_that_is_not_finite_is_an_error_and_no_tie(model: ClientModel) -> None:
    broken = dataclasses.replace(model, mean=torch.full_like(model.mean, torch.nan))
    trials = draw_trials(digits("reference"), 3, 32, random())
    client = DeclaredClient(ClientGradients(broken, Pipeline()), Pipeline())
    with pytest.raises(AuditError, match="NaN or infinite"):
        client.send(*trials.members, contexts(len(trials)))


@pytest.mark.parametrize("steps", [[], [Noise(std=0.1)], [Sign()]], ids=str)
def test_the_null_gradient_has_the_norm_and_nothing_else(
    model: ClientModel, steps: list[object]
) -> None:
    context = Context(torch.Generator().manual_seed(1))
    image = digits("private").images[:1]
    defense = Pipeline(steps)
    gradients = ClientGradients(model, defense).gradients(image, torch.tensor([0]))
    observed = defense.apply({n: g[0] for n, g in gradients.items()}, context)
    null = null_gradient(observed, defense, context, 1.0)
    assert float(norm(null)) == pytest.approx(float(norm(observed)), rel=1e-4)
    a, b = flat(null), flat(observed)
    assert abs(float(a @ b / (a.norm() * b.norm()))) < 5 / len(a) ** 0.5
