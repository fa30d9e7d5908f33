"""Additive noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from scipy.special import chdtri, ndtr, ndtri

from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses.base import (
    FALSE_ACCUSATION,
    Context,
    Defense,
    Distribution,
    NoiseBound,
    ReplicaKind,
    Trace,
)

THRESHOLDS = (0.01, 0.1, 0.3, 0.6745, 1.0)  # in standard deviations
MOST_CERTAIN = -1e-12
FACTOR_TOLERANCE = 0.05
"""Of a deviation that the median of a capture tells, since the gradient is in there too."""


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

    def replica_kind(self, readable: bool) -> ReplicaKind:
        """Nothing is changed."""
        return "identity"

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        """Finds too many values near zero, in the whole gradient or in one tensor.

        Symmetric unimodal noise around any value puts at most P(|noise| <= t) of them within t of
        zero (Anderson 1955). The share found within t is compared with that at five thresholds,
        with Hoeffding's inequality for the chance and Bonferroni's for the number of comparisons.
        """
        parts = {"the gradient": flat(observed), **observed}
        comparisons = len(parts) * len(THRESHOLDS)
        worst, where = -math.inf, "the gradient"
        for name, tensor in parts.items():
            near = tensor.abs().double() / self.std
            slack = math.sqrt(math.log(comparisons / FALSE_ACCUSATION) / (2 * near.numel()))
            for threshold in THRESHOLDS:
                share = float((near <= threshold).double().mean())
                excess = share - self._share_within(threshold) - slack
                if excess > worst and (excess > 0 or name == "the gradient"):
                    worst, where = excess, name
        median, half = float(parts[where].abs().double().median()), self._half
        detail = (
            f"half of the values of {where} are within {median:.3g} of zero; noise of standard "
            f"deviation {self.std:g} leaves half of them within {half * self.std:.3g} at the most"
        )
        return worst > 0, detail

    def hint(self, observed: Gradient, factors: Factors) -> str:
        """The deviation that the median of the capture is that of, where the factor is known."""
        factor = float(flat(observed).abs().double().median()) / (self._half * self.std)
        name = factors.name(factor, FACTOR_TOLERANCE)
        fits = f"{factor:.2g} of the declared noise{name}: std {factor * self.std:.2g} would fit"
        return f"; {fits}, or noise before the division" if name else ""

    def norm_bound_of(self, size: int, confidence: float) -> float:
        """A bound on the norm of this noise on ``size`` values, kept with the given confidence.

        Gaussian: the chi-squared quantile. Laplace: no value is beyond m but with a probability of
        half of what is missed, and Bernstein's inequality for the squares below m^2.
        """
        if self.distribution == "gaussian":
            return self.std * math.sqrt(chdtri(size, 1 - confidence))
        missed = (1 - confidence) / 2
        largest = math.log(size / missed) ** 2  # of a square, in squared scales b = std / sqrt(2)
        tail = math.log(1 / missed)
        squares = 2 * size + math.sqrt(2 * 24 * size * tail) + largest * tail / 3
        return self.std * math.sqrt(squares / 2)

    def log_cdf(self, value: torch.Tensor) -> torch.Tensor:
        """The log of P(noise <= value), for each value."""
        if self.distribution == "gaussian":
            # Of erfc, since log_ndtr and erfcx have no batching rule. Below -5 by the tail's
            # asymptotic series (Abramowitz and Stegun, 26.2.12), exact to 1e-6 there.
            scaled = value / self.std
            near = scaled.clamp(min=-5)
            body = torch.where(
                near > 0,
                torch.log1p(-torch.erfc(near / math.sqrt(2)) / 2),
                torch.log(torch.erfc(-near / math.sqrt(2)) / 2),
            )
            far = scaled.clamp(max=-5)
            inverse = far.square().reciprocal()
            series = 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse * (1 - 7 * inverse)))
            tail = -far.square() / 2 - torch.log(-far * math.sqrt(2 * math.pi)) + torch.log(series)
            return torch.where(scaled < -5, tail, body)
        scaled = value * math.sqrt(2) / self.std
        below = math.log(0.5) + scaled.clamp(max=0)
        above = torch.log1p(-0.5 * torch.exp(-scaled.clamp(min=0)))
        return torch.where(scaled < 0, below, above)

    def log_probability(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The log of P(low <= noise <= high), for each pair with low < high."""
        # In the tail where the distribution function is small, so that nothing cancels.
        flip = low > 0
        low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
        most = self.log_cdf(high)
        share = (self.log_cdf(low) - most).clamp(max=MOST_CERTAIN)
        return most + torch.log(-torch.expm1(share))

    def log_densities(self, value: torch.Tensor) -> torch.Tensor:
        """The log density of the noise at each value."""
        scaled = value / self.std
        if self.distribution == "gaussian":
            return -scaled.square() / 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return -math.sqrt(2) * scaled.abs() - math.log(self.std * math.sqrt(2))

    def log_density(self, noise: Gradient) -> torch.Tensor:
        """The log density of all of the noise, a scalar."""
        return torch.stack([self.log_densities(t).sum() for t in noise.values()]).sum()

    @property
    def _half(self) -> float:
        """Within what of zero half of it is, in standard deviations."""
        return ndtri(0.75) if self.distribution == "gaussian" else math.log(2) / math.sqrt(2)

    def _share_within(self, threshold: float) -> float:
        if self.distribution == "gaussian":
            return float(2 * ndtr(threshold) - 1)
        return 1 - math.exp(-threshold * math.sqrt(2))
