"""The noise of the client's own code against the declared one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ggl_audit.basics.gradient import Gradient, concatenate
from ggl_audit.case.clients import OwnClient
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.noise_residuals import MOST_KEPT, grain_of, kept_values, residuals_of
from ggl_audit.evidence.noise_tests import NoiseTest, find_violations
from ggl_audit.experiments.attacks import Advance
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE
from ggl_audit.experiments.measurements import Measurements

RELEASES, FEWEST_RELEASES = 64, 8
MOST_VALUES = 2**23
"""Of all releases together; of larger models there are fewer."""


def try_noise(setting: Setting, measured: Measurements, advance: Advance) -> None:
    """Takes the declared shares out of what the client's own code sends, and tests what is left.

    The images are public. Each is sent twice, so that noise that depends on the image repeats, and
    what is wrong with the share itself is told from the noise.
    """
    planned = planned_releases(setting)
    if planned == 0:
        return
    assert isinstance(setting.client, OwnClient)
    step, grains = setting.client.step, [torch.finfo(torch.float32).eps]

    def noted(*args: Any) -> Any:
        sent = step(*args)
        if isinstance(sent, dict):
            grains.append(grain_of([t for t in sent.values() if isinstance(t, torch.Tensor)]))
        return sent

    # With the same companions all releases of an image differ by noise alone.
    client = replace(setting.client, step=noted, always_the_same=True)
    noise = setting.defense.randomness.total_noise()
    assert noise is not None
    matching = setting.matching()
    several = setting.members > 1
    shape = (planned // 2, setting.members) if several else (planned // 2,)
    drawn = setting.random("noise").integers(len(setting.reference), size=shape)
    once = torch.as_tensor(drawn, device=setting.model.device)
    context = setting.context("noise clients")
    releases: list[Gradient] = []
    shares: list[Gradient] = []
    for one in torch.cat([once, once]).split(1):
        if len(releases) >= FEWEST_RELEASES and measured.clock.used(MATCHING_SHARE):
            break
        images, labels = setting.reference.images[one], setting.reference.labels[one]
        sent = client.send(images, labels, context)
        noisy, _ = setting.defense.clear.parted(sent)
        share, _ = setting.defense.clear.parted(matching.replicas(images, labels, sent))
        releases.append(kept_values(noisy))
        shares.append(kept_values(share))
        advance(1)
    scaled = not several and client.averaged
    residuals = residuals_of(
        concatenate(releases),
        noise,
        concatenate(shares),
        factor=client.batch_size if scaled else 1,
        images=client.batch_size,
        grain=max(grains),
        shapes={name: tensor.shape for name, tensor in _noisy(setting).items()},
        paired=len(releases) == planned,
    )
    if residuals is None:
        return
    measured.noise = NoiseTest(
        releases=len(releases),
        values=residuals.count,
        rounding=max(grains),
        violations=find_violations(residuals),
    )


def planned_releases(setting: Setting) -> int:
    """How many releases are made to test the noise."""
    if why_no_noise_test(setting) or setting.spec.evidence.matching_trials == 0:
        return 0
    size = sum(min(tensor.numel(), MOST_KEPT) for tensor in _noisy(setting).values())
    return max(FEWEST_RELEASES, min(RELEASES, MOST_VALUES // size // 2 * 2))


def _noisy(setting: Setting) -> Gradient:
    """What of the capture the declared steps are over."""
    return setting.defense.clear.parted(setting.observed)[0]


def why_no_noise_test(setting: Setting) -> str:
    """Why the noise of the client's own code cannot be tested; empty where it can."""
    if not isinstance(setting.client, OwnClient):
        return "the client's own code was not given (client.step)"
    if setting.defense.randomness.total_noise() is None:
        return "no noise is declared, or noise of several kinds"
    if not setting.defense.randomness.leaves_only_noise():
        return "the noise is not the last step, or beside it something else is random"
    return ""
