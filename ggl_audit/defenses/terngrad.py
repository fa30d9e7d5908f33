"""Stochastic ternary quantization."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ggl_audit.basics.gradient import Gradient, each, largest_magnitude
from ggl_audit.defenses.base import Context, Defense, NoiseBound, Trace
from ggl_audit.defenses.qsgd import lengthened, log_probability, off_grid, rounded_at_random
from ggl_audit.messages import Said


class TernGrad(Defense):
    """Sends -1, 0 or 1 times the tensor's largest magnitude, at random and right on average.

    Usual setting: values are first clipped to 2.5 standard deviations of their tensor, which loses
    the right average (Wen et al., TernGrad, NeurIPS 2017).
    """

    name: ClassVar[str] = "terngrad"
    source: ClassVar[str] = "Wen et al., NeurIPS 2017"
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros"})
    stochastic: ClassVar[bool] = True

    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest magnitude, in standard deviations of the tensor; none by default",
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Draws the roundings from the client's generator."""

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            return rounded_at_random(tensor, largest_magnitude(tensor), 1, context.generator)

        return each(rounded, self._clipped(gradient))

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Clips, and fits the length: what is sent is the clipped gradient on average."""
        clipped = self._clipped(gradient)
        return clipped if observed is None else lengthened(clipped, observed)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds a tensor with two values of different magnitude."""
        return off_grid(observed, 1, reaches_the_highest=True)

    def log_likelihood_alone(self, before: Gradient, observed: Gradient) -> torch.Tensor:
        """The sum of log P(value is rounded to what was observed); a scalar."""
        clipped = self._clipped(before)
        parts = [
            log_probability(clipped[name], tensor, largest_magnitude(clipped[name])).sum()
            for name, tensor in observed.items()
        ]
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """Its largest magnitude, unless a clip sets tensors to zero that do not deviate."""
        return self.clip is None

    def _clipped(self, gradient: Gradient) -> Gradient:
        if self.clip is None:
            return gradient
        times = self.clip

        def clipped(tensor: torch.Tensor) -> torch.Tensor:
            most = times * tensor.std(correction=0)
            return torch.minimum(torch.maximum(tensor, -most), most)

        return each(clipped, gradient)
