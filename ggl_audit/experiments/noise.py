"""The noise of the client's own code against the declared one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ggl_audit.attacks.attack import Advance
from ggl_audit.basics.gradient import Gradient, concatenate
from ggl_audit.case.case import Case
from ggl_audit.evidence.noise_residuals import MOST_KEPT, grain_of, kept_values, residuals_of
from ggl_audit.evidence.noise_tests import NoiseTest, find_violations
from ggl_audit.experiments.candidate_matching import MATCHING_SHARE, NO_TRIALS
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result

RELEASES, FEWEST_RELEASES = 64, 8
MOST_VALUES = 2**23
"""The values of all releases together; of larger models there are fewer releases."""


class NoiseTested(Result):
    """What the noise of the client's own code is like; None where rounding hides it."""

    test: NoiseTest | None


class Noise(Experiment[NoiseTested]):
    """The noise in releases of the client's own code, all of which are one trial."""

    name = "noise"
    stage = "the test of the noise"
    result = NoiseTested
    share = MATCHING_SHARE

    def plan(self) -> Plan | NotMeasured:
        """One trial of so many releases, where their noise can be told."""
        reason = why_no_noise_test(self.case)
        if not reason and self.case.spec.evidence.matching_trials == 0:
            reason = NO_TRIALS
        if reason:
            return NotMeasured(reason=reason)
        return Plan(trials=1, matched=planned_releases(self.case))

    def run(self, trials: range, advance: Advance) -> Iterator[NoiseTested]:
        """Takes the declared shares out of what is sent, and tests what is left."""
        for _ in trials:
            yield NoiseTested(test=try_noise(self.case, planned_releases(self.case), advance))


def try_noise(case: Case, planned: int, advance: Advance) -> NoiseTest | None:
    """Takes the declared shares out of what the client's own code sends, and tests what is left.

    The images are public. Each is sent twice, so that noise that depends on the image repeats, and
    what is wrong with the share itself is told from the noise.

    Args:
        case: what was handed in.
        planned: how many releases.
        advance: told of them.

    Returns:
        None where rounding hides the noise.
    """
    own = case.client.own_code
    assert own is not None
    step, grains = own.step, [torch.finfo(torch.float32).eps]

    def noted(*args: Any) -> Any:
        sent = step(*args)
        if isinstance(sent, dict):
            grains.append(grain_of([t for t in sent.values() if isinstance(t, torch.Tensor)]))
        return sent

    # With the same companions all releases of an image differ by noise alone.
    client = replace(own, step=noted, always_the_same=True)
    noise = case.defense.randomness.total_noise()
    assert noise is not None
    matching = case.matching()
    shape = (planned // 2, case.members)
    drawn = case.random("noise").integers(len(case.reference), size=shape)
    once = torch.as_tensor(drawn, device=case.model.device)
    # As a client goes on: one stream for all releases.
    (context,) = case.contexts("noise clients", [0])
    releases: list[Gradient] = []
    shares: list[Gradient] = []
    for one in torch.cat([once, once]).split(1):
        images, labels = case.reference.images[one], case.reference.labels[one]
        sent = client.send(images, labels, [context])
        noisy, _ = case.defense.clear.parted(sent)
        share, _ = case.defense.clear.parted(matching.replicas(images, labels, sent))
        releases.append(kept_values(noisy))
        shares.append(kept_values(share))
        advance(1)
    scaled = case.members == 1 and client.averaged
    residuals = residuals_of(
        concatenate(releases),
        noise,
        concatenate(shares),
        factor=client.batch_size if scaled else 1,
        images=client.batch_size,
        grain=max(grains),
        shapes={name: tensor.shape for name, tensor in _noisy(case).items()},
        paired=len(releases) == planned,
    )
    if residuals is None:
        return None
    return NoiseTest(
        releases=len(releases),
        values=residuals.count,
        rounding=max(grains),
        violations=find_violations(residuals),
    )


def planned_releases(case: Case) -> int:
    """How many releases are made to test the noise."""
    size = sum(min(tensor.numel(), MOST_KEPT) for tensor in _noisy(case).values())
    return max(FEWEST_RELEASES, min(RELEASES, MOST_VALUES // size // 2 * 2))


def _noisy(case: Case) -> Gradient:
    """What of the capture the declared steps are over."""
    return case.defense.clear.parted(case.audited.observed)[0]


def why_no_noise_test(case: Case) -> str:
    """Why the noise of the client's own code cannot be tested; empty where it can."""
    if case.client.own_code is None:
        return "the client's own code was not given (client.step)"
    if case.defense.randomness.total_noise() is None:
        return "no noise is declared, or noise of several kinds"
    if not case.defense.randomness.leaves_only_noise():
        return "the noise is not the last step, or beside it something else is random"
    return ""
