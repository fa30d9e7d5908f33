"""Additive Gaussian noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from scipy.stats import norm as normal

from ggl_audit.defenses.base import FALSE_ACCUSATION, Context, Defense, Trace
from ggl_audit.gradient import Gradient, each, flat

MEDIAN = 0.6745  # of the magnitude of standard normal noise
THRESHOLDS = (0.01, 0.1, 0.3, MEDIAN, 1.0)  # in standard deviations


class Noise(Defense):
    """Adds independent Gaussian noise to each value.

    Usual settings: 0.01 to 0.1 (Sun et al. 2021; Li et al. 2022). Alone it promises nothing; after
    a clip of bound C it is the Gaussian mechanism with noise multiplier ``std / C`` (Abadi et al.,
    Deep Learning with Differential Privacy, CCS 2016).
    """

    name: ClassVar[str] = "noise"
    source: ClassVar[str] = "Abadi et al., CCS 2016; Li et al., CVPR 2022, section 4.1"
    trace: ClassVar[Trace] = "noise"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm"})  # its own norm is known

    std: float = Field(gt=0, description="standard deviation, in the gradient's own units")

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Adds fresh noise from the client's generator."""

        def noisy(tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(
                tensor.shape,
                generator=context.generator,
                device=tensor.device,
                dtype=tensor.dtype,
            )
            return tensor + self.std * noise

        return each(noisy, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing: fresh noise on a candidate would only blur the comparison."""
        return gradient

    def contradiction(self, observed: Gradient, later_noise: float) -> tuple[bool, str]:
        """Finds too many values near zero, in the whole gradient or in one tensor.

        Gaussian noise around any value puts at most P(|noise| <= t) of them within t of zero
        (Anderson 1955). The share found within t is compared with that at five thresholds, with
        Hoeffding's inequality for the chance and Bonferroni's for the number of comparisons.
        """
        parts = {"the gradient": flat(observed), **observed}
        comparisons = len(parts) * len(THRESHOLDS)
        worst, where = -math.inf, "the gradient"
        for name, tensor in parts.items():
            near = tensor.abs().double() / self.std
            slack = math.sqrt(math.log(comparisons / FALSE_ACCUSATION) / (2 * near.numel()))
            for threshold in THRESHOLDS:
                share = float((near <= threshold).double().mean())
                excess = share - (2 * normal.cdf(threshold) - 1) - slack
                if excess > worst and (excess > 0 or name == "the gradient"):
                    worst, where = excess, name
        median = float(parts[where].abs().double().median())
        detail = (
            f"half of the values of {where} are within {median:.3g} of zero; noise of standard "
            f"deviation {self.std:g} leaves half of them within {MEDIAN * self.std:.3g} at the most"
        )
        return worst > 0, detail

    def noise_std(self) -> float:
        """The declared standard deviation."""
        return self.std
