"""Membership: whether an image is in a release of several, the others being unknown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ggl_audit.basics.gradient import Gradient, flat, rows, take
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.identification import Trials, rank_of_truth
from ggl_audit.evidence.membership import UnknownMembers, public_images
from ggl_audit.experiments.attacks import Advance
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE
from ggl_audit.experiments.measurements import Measurements

MEMBERSHIP_TRIALS = 100


def identify_members(
    setting: Setting, trials: Trials, measured: Measurements, advance: Advance
) -> None:
    """Asks of releases of several images whether a canary is in them, the others being unknown."""
    if len(trials) == 0 or not can_identify_members(setting):
        return
    model, random, members = setting.model, setting.random("members"), setting.members
    every = np.arange(len(setting.reference))
    # The attacker's public images are no members, as far as there are enough others.
    others = random.permutation(np.setdiff1d(every, trials.candidates[:, 0].cpu().numpy()))
    pool = others if len(others) >= len(every) // 2 else random.permutation(every)
    public = pool[: min(public_images(model.size, setting.memory), len(every) // 2)]
    rest = torch.as_tensor(np.setdiff1d(every, public), device=model.device)
    matching = setting.matching()

    def contributed(chosen: torch.Tensor) -> Iterator[Gradient]:
        images, labels = setting.reference.images[chosen], setting.reference.labels[chosen]
        return map(setting.defense.replica.share_of_one, matching.each_gradient(images, labels))

    noise = setting.defense.randomness.total_noise()
    # A sum over each client's images is a mean over clients of sums.
    whole = members if not model.loss_sum else setting.defense.aggregation.clients
    unknown = UnknownMembers(
        rows(contributed(torch.as_tensor(public, device=model.device)), len(public)),
        members,
        whole,
        noise.std if noise else 0.0,
    )
    context, hits, done = setting.context("members clients"), 0, 0
    for one in trials.batches(1):
        if done and measured.clock.used(MATCHING_SHARE):
            break
        companions = rest[~torch.isin(rest, one.candidates)]
        drawn = torch.as_tensor(random.permutation(len(companions)), device=model.device)
        trial = replace(one, companions=companions[drawn[: members - 1]][None])
        release = flat(take(setting.client.send(*trial.members, context), 0))
        scores = unknown.log_likelihoods(map(flat, contributed(trial.candidates[0])), release)
        hits += rank_of_truth(-scores[None], random)[0] == 1
        done += 1
        advance(trial.candidates.numel() + 1)
    measured.membership = measure_rate(hits, done, 1 / setting.spec.evidence.candidates)


def can_identify_members(setting: Setting) -> bool:
    """Whether a release is of several images whose shares add up."""
    model = setting.model
    local, batch_size = model.local, model.batch_size
    one = batch_size == 1
    adds_up = setting.defense.replica.adds_up() and (
        one or (local is None and model.criterion.adds_up)
    )
    enough = len(setting.reference) // 2 >= setting.members + setting.spec.evidence.candidates
    return setting.members > 1 and adds_up and enough and not (model.mixes and batch_size > 1)
