"""The client's own code against what it promises."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ggl_audit.attacks.attack import Advance
from ggl_audit.basics.gradient import flat, norm, rows, take
from ggl_audit.client.clients import OwnClient
from ggl_audit.evidence.promise import (
    CANDIDATES,
    cancelling,
    farthest,
    largest,
    pool_size,
    scores_of,
    smallest,
)
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE, NO_TRIALS
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.inputs.images import ImageSet


class Scored(Result):
    """How well each of the worst-case candidates explains a release.

    Attributes:
        truth: the candidate that it was made with.
        scores: see :func:`ggl_audit.evidence.promise.scores_of`.
        lot: breaks ties.
    """

    truth: int
    scores: list[float]
    lot: float


class _WorstCase(NamedTuple):
    """Whom the promise is hardest to keep for.

    Attributes:
        images: (8, channels, height, width), the candidates.
        labels: (8,).
        contributions: (8, size), what each adds to a release under the declaration.
        client: whose companions cancel each other.
    """

    images: torch.Tensor
    labels: torch.Tensor
    contributions: torch.Tensor
    client: OwnClient


class Promise(Experiment[Scored]):
    """How often worst-case images are identified in what the client's own code sends."""

    name = "promise"
    stage = "the test of the promise"
    result = Scored
    share = MATCHING_SHARE

    def plan(self) -> Plan | NotMeasured:
        """As many trials as the ceiling, where the client may break a promise."""
        if self.case.guarantee is None:
            return NotMeasured(reason="no guarantee is declared")
        if self.case.client.own_code is None:
            return NotMeasured(
                reason="the client's own code was not given (client.step), and this tool's own "
                "defense cannot break the promise"
            )
        trials = self.case.spec.evidence.matching_trials
        return Plan(trials=trials, matched=trials) if trials else NotMeasured(reason=NO_TRIALS)

    @functools.cached_property
    def _worst_case(self) -> _WorstCase:
        case, model, random = self.case, self.case.model, self.case.random("promise")
        own = case.client.own_code
        assert own is not None
        pool, device = pool_size(case.clients.room(copies=2)), case.model.device
        drawn = torch.as_tensor(random.integers(len(case.reference), size=pool), device=device)
        images = case.reference.images[drawn]
        labels = torch.as_tensor(random.integers(model.classes, size=pool), device=device)
        clients = case.clients
        norms = torch.stack([norm(one) for one in clients.each_gradient(images, labels)])
        few = smallest(norms)
        raw = rows(clients.each_gradient(images[few], labels[few]), len(few))
        others = few[cancelling(raw, own.batch_size - 1, random)]
        del raw
        companions = ImageSet(images[others], labels[others], "companions that cancel")
        client = replace(own, companions=companions, always_the_same=True)
        likely = largest(norms)
        (context,) = case.contexts("promise contributions", [0])
        gradients = clients.each_gradient(images[likely], labels[likely])
        sent = (case.defense.without_noise(one, context) for one in gradients)
        contributions = rows(sent, len(likely))
        best = farthest(contributions, CANDIDATES)
        chosen = likely[best]
        return _WorstCase(images[chosen], labels[chosen], contributions[best], client)

    def run(self, trials: range, advance: Advance) -> Iterator[Scored]:
        """Sends a candidate of the worst case, and scores all of them."""
        worst = self._worst_case
        contexts = self.case.contexts("promise clients", trials)
        for trial, context in zip(trials, contexts, strict=True):
            random = self.case.random("promise truths", trial)
            truth = int(random.integers(CANDIDATES))
            chosen = worst.images[None, truth, None], worst.labels[None, truth, None]
            sent = worst.client.send(*chosen, [context])
            scores = scores_of(worst.contributions, flat(take(sent, 0)))
            advance(1)
            yield Scored(truth=truth, scores=scores, lot=float(random.random()))
