"""The client's own code against what it promises."""

from __future__ import annotations

from dataclasses import replace

import torch

from ggl_audit.basics.gradient import flat, norm, rows, take
from ggl_audit.case.clients import OwnClient
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.promise import (
    CANDIDATES,
    Identifier,
    cancelling,
    farthest,
    largest,
    pool_size,
    smallest,
)
from ggl_audit.experiments.attacks import Advance
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE
from ggl_audit.experiments.measurements import Measurements
from ggl_audit.inputs.images import ImageSet


def try_promise(setting: Setting, trials: int, measured: Measurements, advance: Advance) -> None:
    """Identifies worst-case images in what the client's own code sends, against its guarantee."""
    if not tests_promise(setting) or trials == 0:
        return
    assert isinstance(setting.client, OwnClient)
    model, random = setting.model, setting.random("promise")
    pool = pool_size(model.size, setting.memory)
    drawn = torch.as_tensor(random.integers(len(setting.reference), size=pool), device=model.device)
    images = setting.reference.images[drawn]
    labels = torch.as_tensor(random.integers(model.classes, size=pool), device=model.device)
    matching, context = setting.matching(), setting.context("promise clients")
    norms = torch.stack([norm(one) for one in matching.each_gradient(images, labels)])
    few = smallest(norms)
    raw = rows(matching.each_gradient(images[few], labels[few]), len(few))
    others = few[cancelling(raw, setting.client.batch_size - 1, random)]
    del raw
    companions = ImageSet(images[others], labels[others], "companions that cancel")
    client = replace(setting.client, companions=companions, always_the_same=True)
    likely = largest(norms)
    each = matching.each_gradient(images[likely], labels[likely])
    sent = (setting.defense.without_noise(one, context) for one in each)
    contributions = rows(sent, len(likely))
    best = farthest(contributions, CANDIDATES)
    chosen, identifier = likely[best], Identifier(contributions[best])
    del contributions
    hits = done = 0
    for truth in random.integers(CANDIDATES, size=trials):
        if done and measured.clock.used(MATCHING_SHARE):
            break
        one = chosen[int(truth)][None]
        release = flat(take(client.send(images[one], labels[one], context), 0))
        hits += identifier.guess(release, random) == int(truth)
        done += 1
        advance(1)
    measured.promise = measure_rate(hits, done, 1 / CANDIDATES)


def tests_promise(setting: Setting) -> bool:
    """Whether there is a promise, and a client that could break it."""
    return isinstance(setting.client, OwnClient) and setting.guarantee is not None
