"""The attacks on canaries, each beside its null control, and without the defense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ggl_audit.basics.gradient import Gradient, concatenate, stack, unstack
from ggl_audit.case.clients import DeclaredClient
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.bounds import ReconstructionRate, measure_rate, paired_p_value
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.fidelity import mean_psnr, nearest
from ggl_audit.evidence.grade import floor_is_settled
from ggl_audit.evidence.identification import Trials, reconstruction_ranks
from ggl_audit.experiments.attacks import GGL, Advance, run_attacks, run_search
from ggl_audit.experiments.candidate_matching import undefended
from ggl_audit.experiments.likeness import place_capture
from ggl_audit.experiments.measurements import Measurements

CANARIES_BETWEEN_LOOKS = 5

LAST_SHARE = 0.25
"""More time than canaries took that the next ones, and what follows them, may take."""


def reconstruct(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Makes each attack on canaries and on a null control of each, and places the capture.

    Raises:
        KeyboardInterrupt: interrupted.
    """
    planned, chance = len(canaries), 1 / setting.spec.evidence.candidates
    if planned == 0:
        return
    distances = setting.distances
    context, random = setting.context("canary clients"), setting.random("reconstruction ties")
    names = measured.suite.names
    hits = {name: {distance: _Pairs() for distance in distances} for name in names}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    losses: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    gradients: list[Gradient] = []
    done = 0
    stop_early, clock = setting.spec.evidence.stop_early, measured.clock
    together = CANARIES_BETWEEN_LOOKS if stop_early or clock.is_limited else planned
    for part in canaries.batches(together):
        if done and not clock.reaches((1 + LAST_SHARE) * measured.seconds_each * len(part)):
            planned = done  # the clock does not look at what comes out
            break
        began = clock.seconds
        sent = setting.client.send(*part.members, context)
        labels = torch.cat([setting.labels_seen(sent, part.members[1])] * 2)
        nulls = [
            null_gradient(one, setting.defense, context, setting.usual_norm)
            for one in unstack(sent)
        ]
        observed = concatenate([sent, stack(nulls)])
        purpose = f"canary search {len(gradients)}"
        result, attempts = run_attacks(setting, measured.suite, observed, labels, purpose, advance)
        if not result.complete:
            raise KeyboardInterrupt
        matching = setting.matching()
        searched = attempts[GGL].images
        agreements.append(matching.agreement(searched, labels, observed).unflatten(0, (2, -1)))
        gradients.append(sent)
        losses.append(result.losses.unflatten(0, (2, -1)))
        for name, attempt in attempts.items():
            found, null_found = attempt.images.unflatten(0, (2, -1))
            pictures[name].append(torch.stack([found, null_found]))
            for distance, measure in distances.items():
                hits[name][distance].add(
                    reconstruction_ranks(found, part, measure, random),
                    reconstruction_ranks(null_found, part, measure, random),
                )
        done += len(part)
        measured.seconds_each = (clock.seconds - began) / len(part)
        counted = [hits[name][setting.distance] for name in names]
        if stop_early and all(
            floor_is_settled(*own.apart, done, planned, chance, len(names)) for own in counted
        ):
            break

    done_canaries = canaries.first(done)
    for name in names:
        found, null_found = torch.cat(pictures[name], dim=1)
        measured.floors[name] = {}
        for distance, own in hits[name].items():
            beyond, only_null = own.apart
            p_value = paired_p_value(beyond, only_null + planned - done, len(names))
            measured.floors[name][distance] = _rate(
                beyond, found, done_canaries, planned, p_value, len(names)
            )
        null = sum(hits[name][setting.distance].null)
        measured.nulls[name] = _rate(null, null_found, done_canaries, planned)
    canary_losses, null_losses = torch.cat(losses, dim=1).tolist()
    if not setting.defense.steps:
        controls = done_canaries.first(setting.spec.evidence.control_trials)
        if len(controls):
            found = torch.cat(pictures[GGL], dim=1)[0, : len(controls)]
            right = sum(hits[GGL][setting.distance].found[: len(controls)])
            controls_planned = min(planned, setting.spec.evidence.control_trials)
            measured.undefended = _rate(right, found, controls, controls_planned)
    agreement, sent = torch.cat(agreements, dim=1), concatenate(gradients)
    others = zip(setting.others, measured.others, strict=True)
    for of, about in ((setting, measured), *others):
        about.canary_losses = canary_losses
        about.seconds_each = measured.seconds_each
        about.null_losses = [*null_losses, about.captured_null[GGL].loss]
        about.likeness = place_capture(of, about, agreement, sent, advance)


def reconstruct_undefended(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Attacks canaries without the defense: can it work at all with this prior and model?

    Raises:
        KeyboardInterrupt: interrupted.
    """
    if len(canaries) == 0 or not setting.defense.steps:
        return
    without = undefended(setting)
    client = DeclaredClient(setting.matching(without), without)
    gradients = client.send(*canaries.members, setting.context("undefended clients"))
    labels = setting.labels_seen(gradients, canaries.members[1])
    result, images = run_search(setting, without, gradients, labels, "undefended search", advance)
    if not result.complete:
        raise KeyboardInterrupt
    distance = setting.distances[setting.distance]
    ranks = reconstruction_ranks(images, canaries, distance, setting.random("undefended ties"))
    measured.undefended = _rate(ranks.count(1), images, canaries, len(canaries))


@dataclass
class _Pairs:
    """Of each canary, whether the attack identified it, and whether its null control did."""

    found: list[bool] = field(default_factory=list)
    null: list[bool] = field(default_factory=list)

    def add(self, ranks: list[int], null_ranks: list[int]) -> None:
        self.found += [rank == 1 for rank in ranks]
        self.null += [rank == 1 for rank in null_ranks]

    @property
    def apart(self) -> tuple[int, int]:
        """How many only the attack identified, and how many only its null control."""
        pairs = list(zip(self.found, self.null, strict=True))
        return pairs.count((True, False)), pairs.count((False, True))


def _rate(
    hits: int,
    pictures: torch.Tensor,
    canaries: Trials,
    planned: int,
    null_p_value: float | None = None,
    attacks: int = 1,
) -> ReconstructionRate:
    chance = 1 / canaries.candidates.shape[1]
    rate = measure_rate(hits, len(canaries), chance, planned, attacks)
    psnr = mean_psnr(nearest(pictures, canaries.canaries), canaries.canaries)
    return ReconstructionRate(**dict(rate), psnr_db=psnr, null_p_value=null_p_value)
