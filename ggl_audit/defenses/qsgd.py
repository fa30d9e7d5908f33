"""Stochastic quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, flat, largest_magnitude
from ggl_audit.defenses.base import Context, Defense, NoiseBound, Trace
from ggl_audit.messages import Message, Said

SMALLEST_NORM = 1e-30
LEAST_PROBABILITY = 1e-12
ROUNDING = 1e-3
OFF_THE_GRID = 1e6

CORRECT_LEVELS = (
    "Correct `levels`, `norm` and `scope` (for TernGrad: nothing but three values a tensor), or "
    "capture what is sent."
)
MAGNITUDES = Message(
    "contradiction/magnitudes",
    "{name} has {count} magnitudes but zero; {levels} were declared",
    advice=CORRECT_LEVELS,
)
NO_MULTIPLES = Message(
    "contradiction/no-multiples",
    "the {count} magnitudes of {name}, from {least:.4g} to {most:.4g}, are not multiples of one, "
    "up to {levels} times it",
    advice=CORRECT_LEVELS,
)


class Qsgd(Defense):
    """Rounds each value at random to one of the two levels beside it, right on average.

    The levels are the multiples of norm / levels, of the l2 norm (Alistarh et al., NeurIPS 2017,
    section 3.1) or of the largest magnitude (section 5), over the whole gradient or for each
    tensor. Usual settings: 1 to 127 levels.
    """

    name: ClassVar[str] = "qsgd"
    source: ClassVar[str] = "Alistarh et al., NeurIPS 2017"
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros"})
    stochastic: ClassVar[bool] = True

    levels: int = Field(ge=1, le=2**12, description="levels above zero, and as many below")
    norm: Literal["l2", "max"] = Field(
        default="l2", description="the highest level: the l2 norm or the largest magnitude"
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="a norm for each tensor, or one of the whole gradient"
    )

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Draws the roundings from the client's generator."""
        sizes = self._norms(gradient)
        return {
            name: rounded_at_random(tensor, sizes[name], self.levels, context.generator)
            for name, tensor in gradient.items()
        }

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Nothing but the length: what is sent is the gradient itself on average."""
        return gradient if observed is None else lengthened(gradient, observed)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds values that are not the declared multiples of one magnitude."""
        return off_grid(
            observed if self.scope == "layer" else {"the gradient": flat(observed)},
            self.levels,
            reaches_the_highest=self.norm == "max",
        )

    def log_likelihood_alone(self, before: Gradient, observed: Gradient) -> torch.Tensor:
        """The sum of log P(value is rounded to the level that was observed), on its own grid."""
        sizes = self._norms(before)
        parts = [
            log_probability(before[name], tensor, sizes[name] / self.levels).sum()
            for name, tensor in observed.items()
        ]
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """Only of each tensor's largest magnitude, which stays as it is."""
        return self.norm == "max" and self.scope == "layer"

    def _norms(self, gradient: Gradient) -> Gradient:
        if self.norm == "l2":
            if self.scope == "global":
                return dict.fromkeys(gradient, torch.linalg.vector_norm(flat(gradient)))
            return each(lambda tensor: tensor.square().sum().sqrt(), gradient)
        largest = each(largest_magnitude, gradient)
        if self.scope == "global":
            return dict.fromkeys(gradient, torch.stack([*largest.values()]).max())
        return largest


def rounded_at_random(
    tensor: torch.Tensor, size: torch.Tensor, levels: int, generator: torch.Generator
) -> torch.Tensor:
    """Rounds to multiples of size / levels beside each value, so that the mean is the value.

    Args:
        tensor: values in [-size, size].
        size: the highest level, a scalar.
        levels: how many there are above zero.
        generator: of the roundings.
    """
    exact = (tensor / size.clamp(min=SMALLEST_NORM)).clamp(-1, 1) * levels
    below = exact.floor()
    drawn = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
    return size * (below + (drawn < exact - below).to(tensor.dtype)) / levels


def lengthened(gradient: Gradient, observed: Gradient) -> Gradient:
    """The gradient in the length that brings it nearest to the capture, or zero.

    The randomness makes the capture much longer than the gradient is, which would favour candidates
    with a short one.
    """
    along = torch.stack([(gradient[name] * tensor).sum() for name, tensor in observed.items()])
    size = torch.stack([tensor.square().sum() for tensor in gradient.values()])
    factor = (along.sum() / size.sum().clamp(min=SMALLEST_NORM)).clamp(min=0)
    return each(lambda tensor: factor * tensor, gradient)


def log_probability(tensor: torch.Tensor, seen: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The log of P(a value is rounded at random to what was seen), for each value.

    The scale is sent exactly, so what was seen lies on the grid of the true image, and on that of
    nearly no other one, which would make it impossible; here it is merely most unlikely, the more
    so the farther it lies from the grid.

    Args:
        tensor: the values.
        seen: what became of them.
        unit: the distance between the levels that the values give, a scalar.
    """
    unit = widened(unit).clamp(min=SMALLEST_NORM)
    level = widened(seen) / unit
    away = ((level - level.round()).abs() - ROUNDING).clamp(min=0)
    share = 1 - (widened(tensor) / unit - level).abs()
    # What rounding in the last bit makes impossible is not: one value would outweigh all others.
    logs: torch.Tensor = share.clamp(min=LEAST_PROBABILITY).log() - OFF_THE_GRID * away
    return logs


def off_grid(parts: Gradient, levels: int, reaches_the_highest: bool) -> tuple[bool, Said]:
    """Whether magnitudes are not multiples of one, up to ``levels`` times it; and what was found.

    Args:
        parts: tensors, each with its own grid.
        levels: the highest multiple.
        reaches_the_highest: whether the largest magnitude is the highest multiple.
    """
    most = max(parts, key=lambda name: len(_magnitudes(parts[name])))
    for name, tensor in parts.items():
        magnitudes = _magnitudes(tensor)
        if len(magnitudes) > levels:
            continue
        if len(magnitudes) and not _on_a_grid(magnitudes, levels, reaches_the_highest):
            least, largest = float(magnitudes[0]), float(magnitudes[-1])
            return True, NO_MULTIPLES(
                count=len(magnitudes), name=name, least=least, most=largest, levels=levels
            )
    count = len(_magnitudes(parts[most]))
    return count > levels, MAGNITUDES(name=most, count=count, levels=levels)


def _magnitudes(tensor: torch.Tensor) -> torch.Tensor:
    """Those of a tensor but zero, the smallest first, each once."""
    values = widened(tensor[tensor != 0].abs()).unique()
    # Other implementations round the same level differently in its last bits.
    apart = values[1:] > values[:-1] * (1 + 1e-5)
    once: torch.Tensor = values[torch.cat([torch.ones_like(values[:1]).bool(), apart])]
    return once


def _on_a_grid(magnitudes: torch.Tensor, levels: int, reaches_the_highest: bool) -> bool:
    if reaches_the_highest:
        units = magnitudes[-1:] / levels
    else:
        least = widened(torch.arange(1, levels + 1, device=magnitudes.device))
        units = magnitudes[0] / least
        units = units[magnitudes[-1] / units <= levels + 0.5]
    multiples = magnitudes / units[:, None]
    off = (multiples - multiples.round()).abs() - 1e-6 * multiples
    return bool((off.amax(1) <= ROUNDING).any())
