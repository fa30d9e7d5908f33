"""The declared defense as a whole: its steps, in the client's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ggl_audit.defenses.base import Check, Context, Defense
from ggl_audit.defenses.noise import Noise
from ggl_audit.gradient import Gradient, norm


@dataclass(frozen=True)
class GaussianMechanism:
    """A release that is differentially private: a bounded gradient plus Gaussian noise.

    Attributes:
        bound: the l2 norm that the gradient cannot exceed before the noise.
        std: the standard deviation of the noise.
    """

    bound: float
    std: float

    @property
    def mu(self) -> float:
        """The Gaussian-DP parameter of one release (Dong, Roth and Su, JRSS B 2022)."""
        return self.bound / self.std


class Pipeline:
    """Steps of a defense, applied one after the other; none is no defense."""

    def __init__(self, steps: Sequence[Defense] = ()) -> None:
        self.steps = tuple(steps)

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """What the client sends."""
        for step in self.steps:
            gradient = step.apply(gradient, context)
        return gradient

    def replicate(self, gradient: Gradient, observed: Gradient) -> Gradient:
        """What the attacker compares with the capture, for one candidate's gradient."""
        return self._replicate(gradient, observed, len(self.steps))

    def mismatch(self, gradient: Gradient, observed: Gradient) -> torch.Tensor:
        """How badly a candidate's gradient explains the capture: the statistic of the ceiling.

        With noise it falls with the likelihood of the capture, wherever :meth:`has_likelihood`, so
        that with equal prior odds no other statistic identifies more often (Neyman and Pearson).
        Without noise it is the squared l2 distance between replica and capture, relative to the
        capture: zero for the true image, whose support and signs agree.

        Args:
            gradient: of a candidate, undefended.
            observed: the capture.

        Returns:
            A scalar, to be compared between candidates for the same capture only.
        """
        first, noise = self._noise()
        if noise is None or not self.has_likelihood():
            return relative_l2(self.replicate(gradient, observed), observed)
        before = self._replicate(gradient, observed, first)
        last = self.steps[-1]
        if not isinstance(last, Noise):
            return -last.log_likelihood(before, noise, observed)
        if noise.distribution == "gaussian":
            return relative_l2(before, observed)
        return -noise.log_density({name: observed[name] - before[name] for name in observed})

    def has_likelihood(self) -> bool:
        """Whether the likelihood of a capture is known, or none is needed as nothing is random."""
        first, noise = self._noise()
        if first == len(self.steps):
            return True
        after = [step for step in self.steps[first:] if not isinstance(step, Noise)]
        if noise is None or len(after) > 1:
            return False
        if not after:
            return True
        return after[0] is self.steps[-1] and noise.distribution in after[0].likelihood_after

    def without_noise(self, gradient: Gradient, context: Context) -> Gradient:
        """What the steps before the noise make of a gradient."""
        first, _ = self._noise()
        return Pipeline(self.steps[:first]).apply(gradient, context)

    def verify(self, observed: Gradient) -> list[Check]:
        """Compares a capture with each step, as far as later steps leave its trace visible."""
        checks = []
        for index, step in enumerate(self.steps):
            if self._is_visible(index):
                later = self.steps[index + 1 :]

                def bound(size: int, confidence: float, later: Sequence[Defense] = later) -> float:
                    return noise_norm(later, size, confidence)

                contradicts, detail = step.contradiction(observed, bound)
                checks.append(Check(str(step), "contradicts" if contradicts else "agrees", detail))
            else:
                hiding = next(s for s in self.steps[index + 1 :] if step.trace not in s.preserves)
                checks.append(Check(str(step), "hidden", f"{hiding} after it hides its trace"))
        return checks

    def guarantee(self) -> GaussianMechanism | None:
        """The differential privacy that the steps give to one image, or None.

        It needs noise after a bound on the whole gradient's norm; what follows the noise changes
        nothing (post-processing).
        """
        bound: float | None = None
        for step in self.steps:
            if isinstance(step, Noise):
                noise = self.total_noise() or step  # the first alone, if others stand apart
                gaussian = noise.distribution == "gaussian"
                return GaussianMechanism(bound, noise.std) if gaussian and bound else None
            bound = step.norm_bound(bound)
        return None

    def adds_noise(self) -> bool:
        """Whether any step is random."""
        return any(isinstance(step, Noise) for step in self.steps)

    def empties_tensors(self) -> bool:
        """Whether a step may leave nothing of a tensor for one image and something for another."""
        return not all(step.keeps_every_tensor for step in self.steps)

    def noise_is_last(self) -> bool:
        """Whether nothing but noise follows noise; also where there is none."""
        first, _ = self._noise()
        return all(isinstance(step, Noise) for step in self.steps[first:])

    def total_noise(self) -> Noise | None:
        """The noise of all steps together; None where there is none, or it is of several kinds."""
        return self._noise()[1]

    def _noise(self) -> tuple[int, Noise | None]:
        """Where the first noise is, and all of it as one, if without a gap and of one kind."""
        noises = [step for step in self.steps if isinstance(step, Noise)]
        first = next((i for i, s in enumerate(self.steps) if isinstance(s, Noise)), len(self.steps))
        together = self.steps[first : first + len(noises)] == tuple(noises)
        if len(noises) == 1:
            return first, noises[0]
        if together and noises and all(noise.distribution == "gaussian" for noise in noises):
            return first, Noise(std=math.hypot(*(noise.std for noise in noises)))
        return first, None

    def _replicate(self, gradient: Gradient, observed: Gradient, count: int) -> Gradient:
        for index, step in enumerate(self.steps[:count]):
            gradient = step.replicate(gradient, observed if self._is_visible(index) else None)
        return gradient

    def _is_visible(self, index: int) -> bool:
        trace = self.steps[index].trace
        return all(trace in later.preserves for later in self.steps[index + 1 :])

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "none"


def relative_l2(replica: Gradient, observed: Gradient) -> torch.Tensor:
    """Squared l2 distance over the squared norm of the observed gradient, a scalar."""
    difference = {name: replica[name] - observed[name] for name in observed}
    return norm(difference).square() / norm(observed).square().clamp(min=1e-30)


def noise_norm(steps: Sequence[Defense], size: int, confidence: float) -> float:
    """A bound on the norm of the noise that steps add to ``size`` values, kept with confidence."""
    noises = [step for step in steps if isinstance(step, Noise)]
    if not noises:
        return 0.0
    missed = (1 - confidence) / len(noises)
    return sum(noise.norm_bound_of(size, 1 - missed) for noise in noises)
