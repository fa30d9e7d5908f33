"""Additive noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from scipy.special import ndtr, ndtri

from ggl_audit.basics.device import widened
from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses.base import (
    FALSE_ACCUSATION,
    Context,
    Defense,
    Effect,
    NoiseBound,
    ReplicaKind,
    Trace,
)
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.messages import Message, Said

THRESHOLDS = (0.01, 0.1, 0.3, 0.6745, 1.0)  # in standard deviations
FACTOR_TOLERANCE = 0.05
"""The relative error of a deviation told by a capture, since the gradient is in there too."""

MEDIAN_TOO_SMALL = Message(
    "contradiction/median-too-small",
    "half of the values of {name} are within {median:.3g} of zero; noise of standard deviation "
    "{std:g} leaves half of them within {limit:.3g} at the most",
    advice="Look for noise that is left out, weaker, or divided by the batch size, and for a "
    "capture before it.",
)


class Noise(Defense):
    """Adds independent noise to each value.

    Usual settings: 0.01 to 0.1 (Sun et al. 2021; Li et al. 2022). Alone it promises nothing; after
    a clip of bound C Gaussian noise is the Gaussian mechanism with noise multiplier ``std / C``
    (Abadi et al., Deep Learning with Differential Privacy, CCS 2016). Laplace noise would need a
    bound on the l1 norm (Dwork et al., TCC 2006), which no step here gives.
    """

    name: ClassVar[str] = "noise"
    source: ClassVar[str] = "Abadi et al., CCS 2016; Li et al., CVPR 2022, section 4.1"
    broken_by: ClassVar[str] = "alone by candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "noise"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm"})  # its own norm is known
    effect: ClassVar[Effect] = "exact"
    replica_kind: ClassVar[ReplicaKind] = "identity"

    std: float = Field(gt=0, description="standard deviation, in the gradient's own units")
    distribution: Distribution = Field(default="gaussian", description="gaussian or laplace")

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Adds fresh noise from the client's generator."""

        def noisy(tensor: torch.Tensor) -> torch.Tensor:
            draw = torch.randn if self.distribution == "gaussian" else torch.rand
            drawn = draw(
                tensor.shape,
                generator=context.generator,
                device=tensor.device,
                dtype=tensor.dtype,
            )
            if self.distribution == "laplace":
                centred = drawn - 0.5
                most = 1 - torch.finfo(drawn.dtype).eps
                magnitude = -torch.log1p(-(2 * centred.abs()).clamp(max=most))
                drawn = torch.sign(centred) * magnitude / math.sqrt(2)
            return tensor + self.std * drawn

        return each(noisy, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing: fresh noise on a candidate would only blur the comparison."""
        return gradient

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds too many values near zero, in the whole gradient or in one tensor.

        Symmetric unimodal noise around any value puts at most P(|noise| <= t) of them within t of
        zero (Anderson 1955). The share found within t is compared with that at five thresholds,
        with Hoeffding's inequality for the chance and Bonferroni's for the number of comparisons.
        """
        parts = {"the gradient": flat(observed), **observed}
        comparisons = len(parts) * len(THRESHOLDS)
        worst, where = -math.inf, "the gradient"
        for name, tensor in parts.items():
            near = widened(tensor.abs()) / self.std
            slack = math.sqrt(math.log(comparisons / FALSE_ACCUSATION) / (2 * near.numel()))
            for threshold in THRESHOLDS:
                share = float(widened(near <= threshold).mean())
                excess = share - self._share_within(threshold) - slack
                if excess > worst and (excess > 0 or name == "the gradient"):
                    worst, where = excess, name
        median, half = float(widened(parts[where].abs()).median()), self._half
        limit = half * self.std
        said = MEDIAN_TOO_SMALL(name=where, median=median, std=self.std, limit=limit)
        return worst > 0, said

    def hint(self, observed: Gradient, factors: Factors) -> str:
        """The deviation that the median of the capture is that of, where the factor is known."""
        factor = float(widened(flat(observed).abs()).median()) / (self._half * self.std)
        name = factors.name(factor, FACTOR_TOLERANCE)
        fits = f"{factor:.2g} of the declared noise{name}: std {factor * self.std:.2g} would fit"
        return f"; {fits}, or noise before the division" if name else ""

    @property
    def law(self) -> NoiseLaw:
        """The distribution of the noise."""
        return NoiseLaw(self.std, self.distribution)

    @property
    def _half(self) -> float:
        """Within what of zero half of it is, in standard deviations."""
        return ndtri(0.75) if self.distribution == "gaussian" else math.log(2) / math.sqrt(2)

    def _share_within(self, threshold: float) -> float:
        if self.distribution == "gaussian":
            return float(2 * ndtr(threshold) - 1)
        return 1 - math.exp(-threshold * math.sqrt(2))
