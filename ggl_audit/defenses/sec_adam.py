"""SecAdam: Adam's update under secure aggregation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses.base import Aggregation, NoiseBound, Trace
from ggl_audit.messages import Message, Said

MEAN, VARIANCE = "m:", "v:"
ROUNDING = 1e-3
SIGN, SMALL_EPS = 0.99, 1e-6

RATIOS = Message(
    "contradiction/ratios",
    "values up to {largest:.4g}; the moments allow {limit:.4g}",
    advice="Correct `round`, `clients`, `beta1` and `beta2`, or capture the ratio that the server "
    "sees.",
)


class SecAdam(Aggregation):
    """Shows the server Adam's direction only: mean(m) / sqrt(mean(v)) over the clients.

    Each client keeps moments m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2 and sends, masked
    and scaled by a common secret, m / (1 - b1^t) and v / (1 - b2^t) + eps^2 (Lewis et al., SecAdam,
    ICDCS 2024). With fresh moments and one client that is the sign of the gradient. Moments that
    are sent in the clear protect nothing: ``capture.kind: moments``.
    """

    name: ClassVar[str] = "sec_adam"
    source: ClassVar[str] = "Lewis et al., ICDCS 2024"
    broken_by: ClassVar[str] = (
        "Generative Gradient Leakage, as measured in docs/defenses.md: fresh moments of one client "
        "are the sign of the gradient"
    )
    trace: ClassVar[Trace] = "values"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros", "mask"})

    round: int = Field(default=1, ge=1, description="t: 1 for fresh moments")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="weight of the earlier first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="weight of the earlier second one")
    eps: float = Field(default=1e-8, gt=0, description="its square is added to the second moment")

    def leaves(self, trace: Trace) -> bool:
        """Others' zeros are elsewhere, and so are those of earlier rounds."""
        return super().leaves(trace) and (trace == "protocol" or self.clients == self.round == 1)

    @property
    def earlier_rounds(self) -> int:
        """Whose gradients are in the moments."""
        return self.round - 1

    def lift(self, gradient: Gradient, earlier: Sequence[Gradient] = ()) -> Gradient:
        """The corrected moments; what came before is zero to who does not know it."""
        # In double precision: the smallest gradients' squares vanish in single.
        before = earlier[len(earlier) - self.earlier_rounds :]
        rounds = [each(lambda tensor: widened(tensor), g) for g in (*before, gradient)]
        first = second = each(torch.zeros_like, rounds[0])
        for g in rounds:
            first = {n: self.beta1 * first[n] + (1 - self.beta1) * g[n] for n in g}
            second = {n: self.beta2 * second[n] + (1 - self.beta2) * g[n].square() for n in g}
        correct1, correct2 = 1 - self.beta1**self.round, 1 - self.beta2**self.round
        return {
            **{MEAN + n: tensor / correct1 for n, tensor in first.items()},
            **{VARIANCE + n: tensor / correct2 + self.eps**2 for n, tensor in second.items()},
        }

    def finish(self, mean: Gradient) -> Gradient:
        """The direction."""
        names = [name.removeprefix(MEAN) for name in mean if name.startswith(MEAN)]
        return {n: (mean[MEAN + n] / mean[VARIANCE + n].sqrt()).float() for n in names}

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds a value beyond what the moments allow, or with fresh moments between the signs.

        By the Cauchy-Schwarz inequality |m| <= sqrt(v sum_i w_i^2 / u_i), w and u the weights that
        the moments give to each round; over clients it holds for the means again.
        """
        largest = float(flat(observed).abs().max())
        limit = self._limit()
        said = RATIOS(largest=largest, limit=limit)
        if largest > limit * (1 + ROUNDING):
            return True, said
        if self.round == 1 and self.clients == 1 and self.eps <= SMALL_EPS:
            # Below 1 only if the whole gradient is about as small as eps.
            return largest < SIGN, said.followed_by("; fresh moments of one client give signs")
        return False, said

    def _limit(self) -> float:
        t = self.round
        total = 0.0
        for age in range(t):
            first = (1 - self.beta1) * self.beta1**age / (1 - self.beta1**t)
            second = (1 - self.beta2) * self.beta2**age / (1 - self.beta2**t)
            total += first**2 / second if second else math.inf
        return math.sqrt(total)


def last_gradient(moment: Gradient, previous: Gradient, beta1: float) -> Gradient:
    """The gradient between two first moments that were sent in the clear, exactly.

    What is no more than the rounding of the moments is zero, as it was in a sparse gradient.

    Args:
        moment: m_t, not corrected for its start.
        previous: m_(t-1); zero for fresh moments.
        beta1: Adam's.
    """

    def between(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        change = widened(now) - beta1 * widened(before)
        rounding = 4 * torch.finfo(torch.float32).eps * (now.abs() + before.abs())
        return (torch.where(change.abs() > rounding, change, 0) / (1 - beta1)).to(now.dtype)

    return {name: between(tensor, previous[name]) for name, tensor in moment.items()}
