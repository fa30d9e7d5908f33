"""The attack on the captured gradient, and on a random one beside it."""

from __future__ import annotations

import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.attack.search import SearchResult
from ggl_audit.basics.gradient import stack
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.fidelity import mean_psnr, nearest
from ggl_audit.evidence.identification import reconstruction_ranks
from ggl_audit.experiments.attacks import (
    ANALYTIC,
    GGL,
    Advance,
    Attempt,
    captured_labels,
    recovered_exactly,
    run_attacks,
)
from ggl_audit.experiments.measurements import Measurements, Reconstructed

SEARCHES_COMPARED = 4

CAPTURED = "captured search"
"""What the searches of a capture draw their random numbers for."""


def attack_capture(setting: Setting, measured: Measurements, advance: Advance) -> None:
    """Attacks the captured gradient, and a random one of its norm, each in several searches.

    The first search of each is the one that counts; the others show whether it can be repeated.

    Raises:
        KeyboardInterrupt: interrupted; the pictures found so far are kept.
    """
    context = setting.context("captured null")
    null = null_gradient(setting.observed, setting.defense, context, setting.usual_norm)
    observed = stack([setting.observed] * SEARCHES_COMPARED + [null] * SEARCHES_COMPARED)
    labels = captured_labels(setting, 2 * SEARCHES_COMPARED)
    result, attempts = run_attacks(setting, measured.suite, observed, labels, CAPTURED, advance)
    for name, attempt in attempts.items():
        for kept, index in ((measured.captured, 0), (measured.captured_null, SEARCHES_COMPARED)):
            images = attempt.images[index].reshape(-1, *setting.model.shape)
            loss = float(attempt.losses[index])
            kept[name] = Reconstructed(images, loss, _curve(result, index))
    if not result.complete:
        raise KeyboardInterrupt
    measured.nearest = _nearest(setting, attempts)
    if ANALYTIC in attempts:
        measured.exact = recovered_exactly(setting, attempts[ANALYTIC])
    searched = attempts[GGL].images
    measured.repeated = searched[:SEARCHES_COMPARED]
    measured.repeated_losses = result.losses[:SEARCHES_COMPARED].tolist()
    measured.agreement_db = _agreement_db(measured.repeated)
    measured.null_agreement_db = _agreement_db(searched[SEARCHES_COMPARED:])
    if not setting.prior_saw_truth:
        distance = setting.distances[setting.distance]
        random = setting.random("captured reconstruction ties")
        trials = setting.captured_trials()
        for name, attempt in attempts.items():
            measured.ranks[name] = [
                None
                if one is None
                else reconstruction_ranks(attempt.images[:1], one, distance, random)[0]
                for one in trials
            ]


def _nearest(setting: Setting, attempts: dict[str, Attempt]) -> str:
    """The attack with the best first picture, by a distance that is the same for all."""
    distance, names = setting.spec.attack.distance, list(attempts)
    matching = Matching(setting.model, setting.defense, distance, setting.memory)
    images = [attempts[name].images[0].reshape(-1, *setting.model.shape) for name in names]
    labels = torch.tensor(setting.labels, device=setting.model.device)
    observed = stack([setting.observed])
    sets = torch.stack(images)[None], labels.expand(1, len(names), -1)
    losses = matching.distances(*sets, observed)[0]
    return names[int(losses.nan_to_num(nan=torch.inf).argmin())]


def _agreement_db(images: torch.Tensor) -> float:
    """The mean PSNR between searches; of sets by each picture's best partner, as order is idle."""
    pairs = torch.combinations(torch.arange(len(images))).tolist()
    found = []
    for first, second in pairs:
        own = images[first].reshape(-1, *images.shape[-3:])
        other = images[second].reshape(-1, *images.shape[-3:])
        found.append(mean_psnr(nearest(other.expand(len(own), *other.shape), own), own))
    return sum(found) / len(found)


def _curve(result: SearchResult, index: int) -> list[tuple[int, float]]:
    return list(zip(result.spent.tolist(), result.curves[index].tolist(), strict=True))
