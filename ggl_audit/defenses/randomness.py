"""What of a release is random: the noise of all steps, and what else the capture does not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ggl_audit.defenses.base import Step
from ggl_audit.defenses.capabilities import AddsNoise, is_harmless
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.noise_law import NoiseLaw


class Randomness:
    """The noise of a defense, and its other draws.

    Attributes:
        first: the place of the first noise among the equivalent steps; their number without any.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        steps = chain.equivalent
        self._noises = [step.law for step in steps if isinstance(step, AddsNoise)]
        noisy = (i for i, step in enumerate(steps) if isinstance(step, AddsNoise))
        self.first = next(noisy, len(steps))
        self._total = self._added_up()

    def total_noise(self) -> NoiseLaw | None:
        """The noise of all steps in one; None without noise, in a gap of it, or of two kinds."""
        return self._total

    def is_random(self) -> bool:
        """Whether anything is random that the capture does not tell."""
        drawn = bool(self._noises) or any(step.stochastic for step in self._chain.steps)
        return drawn or bool(self._chain.earlier_rounds) or self.hides_draws()

    def leaves_only_noise(self) -> bool:
        """Whether the replica of the right images leaves the declared noise, or nothing."""
        if self._chain.earlier_rounds or self.hides_draws():
            return False
        return self.ends_in_noise() and not any(step.stochastic for step in self._chain.steps)

    def hides_draws(self) -> bool:
        """Whether something was drawn that the capture would tell but for later steps."""
        steps = zip(self._chain.equivalent, self._chain.readable, strict=True)
        return any(step.random_if_hidden and not readable for step, readable in steps)

    def ends_in_noise(self) -> bool:
        """Whether nothing is done after the noise, where there is any."""
        return all(map(is_harmless, self._chain.equivalent[self.first :]))

    def _added_up(self) -> NoiseLaw | None:
        laws = self._noises
        if len(laws) == 1:
            return laws[0]
        in_turn = self._chain.equivalent[self.first : self.first + len(laws)]
        without_gap = all(isinstance(step, AddsNoise) for step in in_turn)
        if laws and without_gap and all(law.distribution == "gaussian" for law in laws):
            return NoiseLaw(math.hypot(*(law.std for law in laws)))
        return None


def noise_norm(steps: Sequence[Step], size: int, confidence: float) -> float:
    """A bound on the norm of the noise that steps add to ``size`` values, kept with confidence."""
    noises = [step.law for step in steps if isinstance(step, AddsNoise)]
    if not noises:
        return 0.0
    missed = (1 - confidence) / len(noises)
    return sum(noise.norm_bound_of(size, 1 - missed) for noise in noises)
