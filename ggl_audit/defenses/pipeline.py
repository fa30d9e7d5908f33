"""The declared defense as a whole: its steps, in the client's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ggl_audit.defenses.base import Check, Context, Defense
from ggl_audit.gradient import Gradient


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
        for index, step in enumerate(self.steps):
            gradient = step.replicate(gradient, observed if self._is_visible(index) else None)
        return gradient

    def verify(self, observed: Gradient) -> list[Check]:
        """Compares a capture with each step, as far as later steps leave its trace visible."""
        checks = []
        for index, step in enumerate(self.steps):
            if self._is_visible(index):
                contradicts, detail = step.contradiction(observed, self._noise_after(index))
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
            if step.noise_std() and bound is not None:
                return GaussianMechanism(bound, step.noise_std())
            bound = step.norm_bound(bound)
        return None

    def noise_is_last(self) -> bool:
        """Whether nothing but noise follows noise, so that the l2 distance is its likelihood."""
        noisy = [step.noise_std() > 0 for step in self.steps]
        return all(noisy[noisy.index(True) :]) if any(noisy) else True

    def total_noise(self) -> float:
        """The standard deviation of all noise that the steps add."""
        return self._noise_after(-1)

    def _noise_after(self, index: int) -> float:
        return math.hypot(*(step.noise_std() for step in self.steps[index + 1 :]))

    def _is_visible(self, index: int) -> bool:
        trace = self.steps[index].trace
        return all(trace in later.preserves for later in self.steps[index + 1 :])

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "none"
