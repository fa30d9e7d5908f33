"""The classifiers that tell a value of an image: against plain loops, closed forms, simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.classifiers import (
    FEWEST_IMAGES,
    LinearClassifier,
    Parts,
    Projection,
    best_of,
    divide,
    guess,
    mixture_scores,
    nearest_scores,
    spreads,
)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def divided(counts: list[int], most: int, seed: int = 0) -> Parts | None:
    values = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return divide(values, most, random(seed))


@pytest.mark.parametrize(
    ("counts", "most"), [([8, 8], 200), ([30, 500], 60), ([50] * 10, 200), ([9] * 60, 100)]
)
def test_public_images_are_divided_and_canaries_are_of_each_value_alike(
    counts: list[int], most: int
) -> None:
    parts = divided(counts, most)
    assert parts is not None
    values = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    own = [parts.learned, parts.chosen_on, parts.canaries]
    everything = torch.cat(own).tolist()
    assert len(everything) == len(set(everything))
    for part in own[:2]:
        assert set(values[part].tolist()) == set(parts.values)
    assert len(parts.values) == min(32, len(counts))
    assert parts.chance == 1 / len(parts.values)
    assert len(parts.canaries) <= most
    for start in range(0, len(parts.canaries) - len(parts.values) + 1, len(parts.values)):
        in_turn = values[parts.canaries[start : start + len(parts.values)]].tolist()
        assert sorted(in_turn) == parts.values


def test_values_of_few_images_are_left_out_and_one_value_is_no_question() -> None:
    parts = divided([20, FEWEST_IMAGES - 1, 20], 10)
    assert parts is not None
    assert parts.values == [0, 2]
    assert divided([20, FEWEST_IMAGES - 1], 10) is None
    assert divided([100], 10) is None


def test_a_guess_that_takes_no_notice_of_a_release_is_right_by_chance() -> None:
    """However many trials there are: each value is as likely to be the first of its round."""
    values = torch.repeat_interleave(torch.arange(4), 20)
    hits = [
        int((values[parts.canaries[:6]] == 1).sum())
        for parts in (divided([20] * 4, 40, seed) for seed in range(2000))
        if parts is not None
    ]
    assert abs(np.mean(hits) / 6 - 1 / 4) < 4 * 0.5 / math.sqrt(6 * 2000)


def test_features_of_a_large_gradient_are_sums_with_signs_and_keep_the_noise_as_it_is() -> None:
    project = Projection(1003, 100)
    assert project.size == 100
    values = torch.randn(4000, 1003, generator=torch.Generator().manual_seed(0))
    features = project(values)
    assert torch.equal(features[:, -50:], values[:, -50:].double())
    signs = project._signs
    for place in (0, 2, 3, 49):
        own = list(range(place, 953, 50))
        by_hand = sum(signs[i] * values[:, i].double() for i in own) / math.sqrt(len(own))
        assert torch.allclose(features[:, place], by_hand, atol=1e-6)
    covariance = features.T @ features / len(features)
    assert float((covariance - torch.eye(100)).abs().max()) < 6 / math.sqrt(4000)
    assert torch.equal(Projection(1003, 100)(values), features)
    few = Projection(30, 100)
    assert torch.equal(few(values[:, :30]), values[:, :30].double())


def samples(seed: int, count: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.arange(count) % 3
    means = torch.randn(3, size, generator=torch.Generator().manual_seed(9)).double()
    return means[numbers] + torch.randn(count, size, generator=draw).double(), numbers


def test_the_linear_classifier_is_fishers_discriminant() -> None:
    features, numbers = samples(0, 60)
    noise, ridge = 0.7, 0.1
    means = [features[numbers == k].mean(0).numpy() for k in range(3)]
    within = sum(
        np.outer(row.numpy() - means[k], row.numpy() - means[k])
        for row, k in zip(features, numbers.tolist(), strict=True)
    ) / (60 - 3)
    # The variance of a gradient's length within a value, on average over the images.
    products = np.mean(
        [
            np.sum((f.numpy() - means[k]) ** 2)
            for f, k in zip(features, numbers.tolist(), strict=True)
        ]
    )
    covariance = within + (noise**2 + ridge * products / (60 - 3)) * np.eye(12)
    tried, _ = samples(1, 20)
    inverse = np.linalg.inv(covariance)
    by_hand = [[t @ inverse @ m - m @ inverse @ m / 2 for m in means] for t in tried.numpy()]
    scores = LinearClassifier(features, numbers, noise, ridge).scores(tried)
    assert np.allclose(scores.numpy(), by_hand)


def test_the_mixture_averages_likelihoods_and_the_nearest_is_the_nearest() -> None:
    likelihoods = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    numbers = torch.tensor([0, 1, 0, 1, 1, 1])
    for row, scores in zip(likelihoods, mixture_scores(likelihoods, numbers), strict=True):
        for value in (0, 1):
            own = [math.exp(float(row[i])) for i in range(6) if numbers[i] == value]
            assert float(scores[value]) == pytest.approx(math.log(sum(own) / len(own)))
    nearest = nearest_scores(-likelihoods, numbers)
    assert torch.equal(nearest[:, 0], likelihoods[:, [0, 2]].amax(1))


@pytest.mark.parametrize("classifier", ["linear", "mixture"])
def test_two_gaussian_classes_are_told_as_often_as_is_possible(classifier: str) -> None:
    """Means 2 apart in noise of 1, whose directions are learned from 100 images in 300 values."""
    draw = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(300, generator=draw), dim=0)
    clean = torch.stack([direction, -direction]).double()
    numbers, tried = torch.arange(100) % 2, torch.arange(4000) % 2
    learned = clean[numbers] + 0.02 * torch.randn(100, 300, generator=draw)
    sent = clean[tried] + torch.randn(4000, 300, generator=draw)
    if classifier == "linear":
        scores = LinearClassifier(learned, numbers, 1.0, 0.1).scores(sent)
    else:
        scores = mixture_scores(-torch.cdist(sent, learned).square() / 2, numbers)
    hits = sum(g == t for g, t in zip(guess(scores, [0.5] * 4000), tried.tolist(), strict=True))
    possible = norm.cdf(1)
    assert binom.ppf(1e-4, 4000, 0.98 * possible) <= hits <= binom.ppf(1 - 1e-4, 4000, possible)


def test_ties_are_broken_by_lot_and_what_is_no_number_is_no_guess() -> None:
    level = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    assert guess(level, [0.2, 0.8]) == [0, 1]
    assert guess(torch.tensor([[math.nan, -3.0], [-math.inf, -5.0]]), [0.1, 0.1]) == [1, 1]
    assert best_of({"a": [True, False], "b": [True, True], "c": [True, True]}) == "b"


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.8, 0.78), (0.9, 0.2)])
def test_the_interval_of_the_larger_of_two_holds_what_both_can_do(
    rates: tuple[float, float],
) -> None:
    """By simulation: the classifier that was chosen, and label inference, on the same canaries.

    Beyond either end is one in 40 at most; a right interval fails here once in 10,000.
    """
    draw, runs, trials = random(), 4000, 100
    above = below = 0
    for _ in range(runs):
        # As alike as they can be, or independent: the payment holds for both.
        shared = draw.random(trials)
        hits = [int((shared < rates[0]).sum()), int((draw.random(trials) < rates[1]).sum())]
        best = measure_rate(max(hits), trials, 0.1, attacks=2)
        above += max(rates) > best.upper
        below += max(rates) < best.lower
    most = binom.ppf(1 - 1e-4, runs, 0.025)
    assert above <= most
    assert below <= most


@pytest.mark.parametrize("seed", range(3))
def test_spreads_tell_noise_that_is_a_little_larger_for_one_value(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.arange(400) % 2
    std = torch.where(numbers == 1, 1.015, 0.985)[:, None]
    noise = torch.randn(400, 5000, generator=draw) * std
    sizes = spreads({"weight": noise[:, :4990].unflatten(1, (10, -1)), "bias": noise[:, 4990:]})
    assert sizes.shape == (400, 6)
    torch.testing.assert_close(sizes[:, 4], noise.double().square().mean(1).sqrt().log())
    scaled = (sizes - sizes.mean(0)) / sizes.std(0)
    classifier = LinearClassifier(scaled[:200], numbers[:200], 0.0, 1e-3)
    right = classifier.scores(scaled[200:]).argmax(1) == numbers[200:]
    assert int(right.sum()) > 160
    straight = LinearClassifier(noise[:200].double(), numbers[:200], 0.0, 0.1)
    assert int((straight.scores(noise[200:].double()).argmax(1) == numbers[200:]).sum()) < 130
