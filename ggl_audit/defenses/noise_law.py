"""The distribution of noise that is added to each value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import chdtri

from ggl_audit.basics.gradient import Gradient

Distribution = Literal["gaussian", "laplace"]

MOST_CERTAIN = -1e-12


@dataclass(frozen=True)
class NoiseLaw:
    """Independent noise of mean zero, the same on each value.

    Attributes:
        std: standard deviation, in the gradient's own units.
        distribution: ``gaussian`` or ``laplace``.
    """

    std: float
    distribution: Distribution = "gaussian"

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
