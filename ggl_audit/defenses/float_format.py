"""Rounding to a floating-point format of fewer bits."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, largest_magnitude
from ggl_audit.defenses.base import Context, Defense, NoiseBound, ReplicaKind, Trace
from ggl_audit.defenses.capabilities import ByValues
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.messages import Message, Said

SMALLEST_SCALE = 1e-30
ROUNDING = 1e-5

FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}

OFF_FORMAT = Message(
    "contradiction/off-format",
    "{count} of {total} values of {name} are not of {format}",
    advice="Correct `format` and `scale`, or capture after the rounding.",
)


class FloatFormat(Defense):
    """Rounds each value to the nearest one of a format; what is too large becomes its largest.

    Usual settings: float16 or bfloat16 as they are, the 8-bit formats after each tensor was scaled
    to the format's range (Micikevicius et al., FP8 Formats for Deep Learning, 2022, section 3).
    """

    name: ClassVar[str] = "float_format"
    source: ClassVar[str] = "Micikevicius et al., FP8 Formats for Deep Learning, 2022"
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "values"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros"})
    replica_kind: ClassVar[ReplicaKind] = "values"
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    format: Literal["float16", "bfloat16", "float8_e4m3", "float8_e5m2"] = Field(
        description="float16, bfloat16, float8_e4m3 or float8_e5m2"
    )
    scale: Literal["none", "tensor"] = Field(
        default="none",
        description="none, or each tensor's largest magnitude to the largest of the format",
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Casts to the format and back."""
        return each(self._rounded, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, with the candidate's own scale."""
        return each(self._rounded, gradient)

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Leaves the rounding away."""
        return gradient

    def by_values(self, readable: bool) -> ByValues | None:
        """Rounds each value by itself, if none is scaled by others."""
        if self.scale == "tensor":
            return None
        return ByValues(
            readings=lambda observed: each(lambda tensor: tensor.new_ones(()), observed),
            on_values=lambda values, _: self._rounded(values),
        )

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds values that the format does not have."""
        counts = {}
        for name, tensor in observed.items():
            off = (self._rounded(tensor) - tensor).abs() > ROUNDING * tensor.abs()
            counts[name] = int(off.sum())
        where = max(counts, key=lambda name: counts[name] / observed[name].numel())
        count, total = counts[where], observed[where].numel()
        return count > 0, OFF_FORMAT(count=count, total=total, name=where, format=self.format)

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """The sum of log P(value plus noise is rounded to what was observed).

        The largest magnitude of a scaled tensor was not rounded; for it, it is the density.
        """
        parts = []
        for name, tensor in observed.items():
            seen, mean = widened(tensor), widened(before[name])
            low, high = self._cell(seen)
            likelihood = noise.log_probability(low - mean, high - mean)
            if self.scale == "tensor":
                density = noise.log_densities(seen - mean)
                likelihood = torch.where(seen.abs() < seen.abs().max(), likelihood, density)
            parts.append(likelihood.sum())
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """Its largest magnitude is kept if scaled; else all may be too small for the format."""
        return self.scale == "tensor" or self.format == "bfloat16"

    @property
    def _most(self) -> float:
        return torch.finfo(FORMATS[self.format]).max

    def _unit(self, tensor: torch.Tensor) -> torch.Tensor:
        """What 1 in the format stands for; a scalar."""
        if self.scale == "none":
            return torch.ones_like(tensor).max()
        return largest_magnitude(tensor).clamp(min=SMALLEST_SCALE) / self._most

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        # In double precision, where the scale of a format as wide as float32 does not underflow.
        exact = widened(tensor)
        unit = self._unit(exact)
        cast = (exact / unit).clamp(-self._most, self._most).to(FORMATS[self.format])
        return (cast.to(exact.dtype) * unit).to(tensor.dtype)

    def _cell(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest value that are rounded to each one that was seen."""
        details, unit = torch.finfo(FORMATS[self.format]), self._unit(seen)
        # The scale was rounded in its last bits; the values of the format are not.
        magnitude = (seen.abs() / unit).to(FORMATS[self.format]).to(seen.dtype)
        _, exponent = magnitude.clamp(min=details.smallest_normal).frexp()
        binade = (exponent - 1).to(seen.dtype).exp2()
        spacing = details.eps * binade
        # Below a power of two the values lie closer together.
        closer = (magnitude == binade) & (binade > details.smallest_normal)
        inner = magnitude - torch.where(closer, spacing / 4, spacing / 2)
        outer = magnitude + spacing / 2
        if self.scale == "none":
            outer = torch.where(magnitude >= self._most, torch.inf, outer)
        negative = seen < 0
        low, high = torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)
        return low * unit, high * unit
