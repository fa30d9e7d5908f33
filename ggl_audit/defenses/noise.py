"""Additive Gaussian noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from scipy.stats import norm as normal

from ggl_audit.defenses.base import Context, Defense, Trace
from ggl_audit.gradient import Gradient, each, flat

FALSE_ACCUSATION = 1e-6


class Noise(Defense):
    """Adds independent Gaussian noise to each value.

    Usual settings: 0.01 to 0.1 (Sun et al. 2021; Li et al. 2022). Alone it promises nothing; after
    a clip of bound C it is the Gaussian mechanism with noise multiplier ``std / C`` (Abadi et al.,
    Deep Learning with Differential Privacy, CCS 2016).
    """

    name: ClassVar[str] = "noise"
    source: ClassVar[str] = "Abadi et al., CCS 2016; Li et al., CVPR 2022, section 4.1"
    trace: ClassVar[Trace] = "noise"
    preserves: ClassVar[frozenset[Trace]] = frozenset()

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

    def contradiction(self, observed: Gradient) -> tuple[bool, str]:
        """Finds too many values near zero.

        Gaussian noise around any value puts at most P(|noise| <= t) of them within t of zero
        (Anderson 1955). The share found within t is compared with that at five thresholds, with
        Hoeffding's inequality for the chance.
        """
        values = flat(observed).abs().double()
        thresholds = [self.std * multiple for multiple in (0.01, 0.1, 0.3, 0.6745, 1.0)]
        slack = math.sqrt(math.log(len(thresholds) / FALSE_ACCUSATION) / (2 * len(values)))
        median = float(values.median())
        detail = (
            f"half of the values are within {median:.3g} of zero; noise of standard deviation "
            f"{self.std:g} leaves half of them within {0.6745 * self.std:.3g} at the most"
        )
        too_many = any(
            float((values <= threshold).double().mean())
            > 2 * normal.cdf(threshold / self.std) - 1 + slack
            for threshold in thresholds
        )
        return too_many, detail

    def noise_std(self) -> float:
        """The declared standard deviation."""
        return self.std
