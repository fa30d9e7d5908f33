"""The experiments of an audit: matching, reconstruction with its null control, and undefended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ggl_audit.attack.labels import infer_labels
from ggl_audit.attack.matching import LatentObjective, Matching
from ggl_audit.attack.search import SearchResult, search
from ggl_audit.defenses import Pipeline
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, measure_rate, paired_p_value
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.fidelity import mean_psnr
from ggl_audit.evidence.identification import (
    Trials,
    defended_gradients,
    match,
    reconstruction_ranks,
)
from ggl_audit.gradient import Gradient, concatenate, stack, take
from ggl_audit.setting import Setting

CANARIES_TOGETHER = 25
MATCHING_CONTROL_TRIALS = 50
STEPS_TO_PREDICT = 3

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Reconstructed:
    """A picture that a search found.

    Attributes:
        image: (channels, height, width) in [0, 1].
        loss: the loss of its latent.
        curve: (evaluations, best loss so far) after each step.
    """

    image: torch.Tensor
    loss: float
    curve: list[tuple[int, float]]


@dataclass
class Measurements:
    """What has been measured so far; None is not measured.

    Attributes:
        stage: the experiment that is running, None when all are done.
        evaluations: gradients of candidates so far.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred.
        matching_control: canaries identified by candidate matching without the defense.
        captured: what the attack made of the captured gradient.
        captured_null: what it made of a random gradient of the same norm.
        rank: of the truth, by its distance to the picture.
        matching_rank: of the truth, by the matching distance of the candidates.
        candidates: how many the truth was ranked among.
        floor: canaries that the attack identified and the null control did not.
        null: canaries that the null control identified.
        undefended: canaries that the attack identified without the defense.
    """

    stage: str | None = "preparation"
    evaluations: int = 0
    ceiling: Rate | None = None
    label: Rate | None = None
    matching_control: Rate | None = None
    captured: Reconstructed | None = None
    captured_null: Reconstructed | None = None
    rank: int | None = None
    matching_rank: int | None = None
    candidates: int | None = None
    floor: ReconstructionRate | None = None
    null: ReconstructionRate | None = None
    undefended: ReconstructionRate | None = None


def planned_evaluations(setting: Setting) -> int:
    """The number of candidates that an audit evaluates, known before it starts."""
    attack, evidence = setting.spec.attack, setting.spec.evidence
    rounds = (attack.evaluations // attack.restarts - 1) // attack.population
    each = attack.restarts * (rounds * attack.population + 1)
    trials = setting.trials()
    canaries = len(trials.first(evidence.reconstruction_trials))
    searches = 2 * (1 + canaries)
    if setting.defense.steps:
        searches += min(evidence.control_trials, canaries)
    matched = min(evidence.matching_trials, len(trials))
    if setting.defense.steps:
        matched += min(matched, MATCHING_CONTROL_TRIALS)
    return matched * (evidence.candidates + 1) + searches * each


def match_candidates(
    setting: Setting, trials: Trials, measured: Measurements, advance: Advance
) -> None:
    """Measures the ceiling, how often the label is recovered, and matching without the defense."""
    captured = setting.captured_trial()
    if captured is not None:
        matching = Matching(setting.model, setting.defense)
        random = setting.random("captured ties")
        measured.matching_rank = match(matching, captured, stack([setting.observed]), random)[0]
        measured.candidates = captured.candidates.shape[1]
    if len(trials) == 0:
        return
    hits, labels_right = _match(setting, setting.defense, trials, "matching", advance)
    chance = 1 / setting.spec.evidence.candidates
    measured.ceiling = measure_rate(hits, len(trials), chance)
    if setting.model.head is not None:
        measured.label = measure_rate(labels_right, len(trials), 1 / setting.model.classes)
    if setting.defense.steps:
        control = trials.first(MATCHING_CONTROL_TRIALS)
        hits, _ = _match(setting, Pipeline(), control, "matching control", advance)
        measured.matching_control = measure_rate(hits, len(control), chance)
    else:
        measured.matching_control = measured.ceiling


def reconstruct(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Attacks the captured gradient, the canaries, and a null control of each, in one batch.

    Raises:
        KeyboardInterrupt: interrupted; the pictures found so far are kept.
    """
    client = setting.client("canary clients")
    observed = stack([setting.observed])
    labels = torch.tensor([setting.label], device=setting.model.device)
    if len(canaries):
        matching = Matching(setting.model, setting.defense)
        defended = defended_gradients(matching, canaries, setting.defense, client)
        observed = concatenate([observed, defended])
        labels = torch.cat([labels, setting.labels_seen(defended, canaries.labels)])
    count = len(labels)
    nulls = [null_gradient(take(observed, i), setting.defense, client) for i in range(count)]
    everything = concatenate([observed, stack(nulls)])
    budget = setting.spec.attack.evaluations
    result, images = _search(
        setting, setting.defense, everything, labels.repeat(2), budget, advance
    )

    measured.captured = _reconstructed(result, images, 0, setting)
    measured.captured_null = _reconstructed(result, images, count, setting)
    if not result.complete:
        raise KeyboardInterrupt
    captured = setting.captured_trial()
    random = setting.random("reconstruction ties")
    if captured is not None:
        measured.rank = reconstruction_ranks(images[:1], captured, random)[0]
    if len(canaries):
        pictures, null_pictures = images[1:count], images[count + 1 :]
        hits = _identified(pictures, canaries, random)
        null_hits = _identified(null_pictures, canaries, random)
        beyond = [hit and not null_hit for hit, null_hit in zip(hits, null_hits, strict=True)]
        only_null = sum(null_hits) - (sum(hits) - sum(beyond))
        p_value = paired_p_value(sum(beyond), only_null)
        measured.floor = _rate(beyond, pictures, canaries, p_value)
        measured.null = _rate(null_hits, null_pictures, canaries)
        if not setting.defense.steps:
            controls = setting.spec.evidence.control_trials
            measured.undefended = _rate(
                hits[:controls], pictures[:controls], canaries.first(controls)
            )


def reconstruct_undefended(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Attacks canaries without the defense: can it work at all with this prior and model?

    Raises:
        KeyboardInterrupt: interrupted.
    """
    if len(canaries) == 0 or not setting.defense.steps:
        return
    gradients = Matching(setting.model, Pipeline()).gradients(canaries.canaries, canaries.labels)
    labels = setting.labels_seen(gradients, canaries.labels)
    budget = setting.spec.attack.evaluations
    result, images = _search(setting, Pipeline(), gradients, labels, budget, advance)
    if not result.complete:
        raise KeyboardInterrupt
    hits = _identified(images, canaries, setting.random("undefended ties"))
    measured.undefended = _rate(hits, images, canaries)


def _match(
    setting: Setting, defense: Pipeline, trials: Trials, purpose: str, advance: Advance
) -> tuple[int, int]:
    """Counts the canaries that matching identifies, and those whose label is inferred."""
    matching = Matching(setting.model, defense)
    client, random = setting.client(f"{purpose} clients"), setting.random(f"{purpose} ties")
    head = setting.model.head
    hits = labels_right = 0
    for part in trials.batches(CANARIES_TOGETHER):
        observed = defended_gradients(matching, part, defense, client)
        hits += match(matching, part, observed, random).count(1)
        if head is not None:
            labels_right += int((infer_labels(observed, head) == part.labels).sum())
        advance(part.candidates.numel() + len(part))
    return hits, labels_right


def _search(
    setting: Setting,
    defense: Pipeline,
    observed: Gradient,
    labels: torch.Tensor,
    evaluations: int,
    advance: Advance,
) -> tuple[SearchResult, torch.Tensor]:
    attack = setting.spec.attack
    matching = Matching(setting.model, defense, attack.distance)
    objective = LatentObjective(matching, setting.prior, observed, labels, attack.regularizer)
    random = setting.random("search")
    seeds = random.integers(2**32, size=(len(labels), attack.restarts)).tolist()
    result = search(objective, setting.make_optimizer, seeds, evaluations, advance)
    return result, setting.prior.decode(result.latents, labels)


def _reconstructed(
    result: SearchResult, images: torch.Tensor, index: int, setting: Setting
) -> Reconstructed:
    attack = setting.spec.attack
    step = attack.restarts * attack.population
    spent = result.evaluations // len(images)
    curve = [
        (min(step * (i + 1), spent), float(loss)) for i, loss in enumerate(result.curves[index])
    ]
    return Reconstructed(images[index], float(result.losses[index]), curve)


def _identified(
    pictures: torch.Tensor, canaries: Trials, random: np.random.Generator
) -> list[bool]:
    return [rank == 1 for rank in reconstruction_ranks(pictures, canaries, random)]


def _rate(
    hits: list[bool],
    pictures: torch.Tensor,
    canaries: Trials,
    null_p_value: float | None = None,
) -> ReconstructionRate | None:
    if not hits:
        return None
    rate = measure_rate(sum(hits), len(hits), 1 / canaries.candidates.shape[1])
    psnr = mean_psnr(pictures, canaries.canaries)
    return ReconstructionRate(**dict(rate), psnr_db=psnr, null_p_value=null_p_value)


def predict_seconds(setting: Setting) -> float:
    """Predicts how long an audit takes, from a few steps of its largest batch."""
    count = 2 * (1 + setting.spec.evidence.reconstruction_trials)
    observed = stack([setting.observed] * count)
    labels = torch.full((count,), setting.label, device=setting.model.device)
    attack = setting.spec.attack
    short = attack.restarts * (STEPS_TO_PREDICT * attack.population + 1)
    timed = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        result, _ = _search(setting, setting.defense, observed, labels, short, lambda _: None)
        timed.append((time.perf_counter() - started) / result.evaluations)
    return timed[-1] * planned_evaluations(setting)
