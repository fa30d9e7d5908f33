"""Membership: whether an image is in a release of several, the others being unknown."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ggl_audit.attacks.attack import Advance
from ggl_audit.basics.gradient import Gradient, flat, rows, take
from ggl_audit.case.case import Case
from ggl_audit.evidence.identification import rank_of_truth
from ggl_audit.evidence.membership import UnknownMembers, public_images
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE, NO_TRIALS
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result

MEMBERSHIP_TRIALS = 100


def shares_add_up(case: Case) -> bool:
    """Whether a release is a sum of what single images add to it, and of noise."""
    model = case.model
    alone = model.batch_size == 1
    by_itself = alone or (model.local is None and model.criterion.adds_up is True)
    return case.defense.replica.adds_up() and by_itself and (alone or not model.mixes)


def divisor(case: Case) -> int:
    """What the sum over the images of a release is divided by."""
    # A sum over each client's images is a mean over clients of sums.
    return case.defense.aggregation.clients if case.model.loss_sum else case.members


class Identified(Result):
    """Whether a canary was identified."""

    hit: bool


class Membership(Experiment[Identified]):
    """How often a canary is identified in releases of several images, the others being unknown."""

    name = "membership"
    stage = "membership"
    result = Identified
    share = MATCHING_SHARE

    def plan(self) -> Plan | NotMeasured:
        """Trials where a release is of several images whose shares add up."""
        case = self.case
        if case.members == 1:
            return NotMeasured(reason="a release is made of one image")
        if not self._can_be_told():
            return NotMeasured(
                reason="what single images contribute does not add up under this defense, or the "
                "reference set is too small to tell what the others contribute"
            )
        trials = min(len(case.trials), MEMBERSHIP_TRIALS)
        if trials == 0 or case.spec.evidence.matching_trials == 0:
            return NotMeasured(reason=NO_TRIALS)
        return Plan(trials=trials, matched=trials * (case.spec.evidence.candidates + 1))

    def _can_be_told(self) -> bool:
        case = self.case
        enough = len(case.reference) // 2 >= case.members + case.spec.evidence.candidates
        return shares_add_up(case) and enough

    @functools.cached_property
    def _public(self) -> np.ndarray:
        """The attacker's public images, which are no canaries as far as there are enough others."""
        case, random = self.case, self.case.random("members")
        every = np.arange(len(case.reference))
        canaries = case.trials.candidates[:MEMBERSHIP_TRIALS, 0].cpu().numpy()
        others = random.permutation(np.setdiff1d(every, canaries))
        pool = others if len(others) >= len(every) // 2 else random.permutation(every)
        return pool[: min(public_images(case.clients.room()), len(every) // 2)]

    @functools.cached_property
    def _unknown(self) -> UnknownMembers:
        """The share of all images but one, as public images have it."""
        case = self.case
        noise = case.defense.randomness.total_noise()
        public = torch.as_tensor(self._public, device=case.model.device)
        contributions = rows(self._contributed(public), len(public))
        std = noise.std if noise else 0.0
        return UnknownMembers(contributions, case.members, divisor(case), std)

    def _contributed(self, chosen: torch.Tensor) -> Iterator[Gradient]:
        reference = self.case.reference
        images, labels = reference.images[chosen], reference.labels[chosen]
        gradients = self.case.clients.each_gradient(images, labels)
        return map(self.case.defense.replica.share_of_one, gradients)

    def run(self, trials: range, advance: Advance) -> Iterator[Identified]:
        """Asks of a release by its likelihood with each candidate in it."""
        case = self.case
        every = np.arange(len(case.reference))
        rest = torch.as_tensor(np.setdiff1d(every, self._public), device=case.model.device)
        contexts = case.contexts("members clients", trials)
        for trial, context in zip(trials, contexts, strict=True):
            one = case.trials.part(slice(trial, trial + 1))
            companions = rest[~torch.isin(rest, one.candidates)]
            random = case.random("companions of members", trial)
            drawn = torch.as_tensor(random.permutation(len(companions)), device=rest.device)
            one = replace(one, companions=companions[drawn[: case.members - 1]][None])
            release = flat(take(case.client.send(*one.members, [context]), 0))
            tried = map(flat, self._contributed(one.candidates[0]))
            scores = self._unknown.log_likelihoods(tried, release)
            rank = rank_of_truth(-scores[None], case.lots("members ties", [trial]))[0]
            advance(one.candidates.numel() + 1)
            yield Identified(hit=rank == 1)
