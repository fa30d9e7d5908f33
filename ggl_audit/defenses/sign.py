"""One-bit quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, flat, largest_magnitude
from ggl_audit.defenses.base import Context, NoiseBound, ReplicaKind, Trace
from ggl_audit.defenses.capabilities import ByValues
from ggl_audit.defenses.error_feedback import ErrorFeedback
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.errors import ReasonError
from ggl_audit.messages import Message, Said

ROUNDING, TINY = 1e-5, 1e-30

WIDTH = 0.3
"""A smooth sign's, in root mean squares of the tensor; 0.1, 1 and 3 lead a search less far."""

FEEDBACK_NEEDS_SCALE = Message(
    "defense/feedback-needs-scale",
    "error_feedback needs scale: mean or scale: layer_mean, as a magnitude of 1 would leave out "
    "more than the gradient holds",
    advice="Give `sign` one of these scales, or no error feedback.",
)

SIGN_MAGNITUDES = Message(
    "contradiction/sign-magnitudes",
    "the values of {name} that are not zero have magnitudes from {least:.4g} to {most:.4g}",
    advice="Correct `scale`, or capture after the sign is taken.",
)
ALL_ZERO_SIGNS = Message("check/all-zero-signs", "all values are zero", advice="Nothing.")


class Sign(ErrorFeedback):
    """Sends the sign of each value: -1, 0 or 1, times a step that is common to all.

    signSGD (Bernstein et al., ICML 2018). Or times the mean magnitude of the gradient, or of each
    tensor, which error feedback needs (Karimireddy et al., ICML 2019, algorithm 1).
    """

    name: ClassVar[str] = "sign"
    source: ClassVar[str] = "Bernstein et al., ICML 2018"
    broken_by: ClassVar[str] = "Learning to Invert, Wu et al., UAI 2023"
    trace: ClassVar[Trace] = "levels"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros", "mask"})
    replica_kind: ClassVar[ReplicaKind] = "values"
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    scale: Literal["none", "mean", "layer_mean"] = Field(
        default="none",
        description="magnitude that is sent: 1, or the mean one of the gradient or of each tensor",
    )

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.error_feedback and self.scale == "none":
            raise ReasonError(FEEDBACK_NEEDS_SCALE())
        return self

    def compressed(self, gradient: Gradient, context: Context) -> Gradient:
        """Takes the sign, scaled; the sign of zero is zero."""
        return self._signs(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same; with the step that the capture shows, where the candidate does not tell it."""
        if observed is None or self._tells_its_step:
            return self._signs(gradient)
        steps = self._steps(observed)
        return {name: steps[name] * torch.sign(tensor) for name, tensor in gradient.items()}

    def by_values(self, readable: bool) -> ByValues | None:
        """The sign, in the length of the step that the capture shows."""
        if not readable or self._tells_its_step:
            return None
        return ByValues(self._steps, lambda values, steps: values.sign_().mul_(steps))

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Has a hyperbolic tangent for the sign."""
        steps = each(torch.abs, self.replicate(gradient, observed))
        return {
            name: steps[name] * torch.tanh(tensor / (WIDTH * tensor.square().mean().sqrt() + TINY))
            for name, tensor in gradient.items()
        }

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds two values of different magnitude."""
        parts = observed if self.scale == "layer_mean" else {"the gradient": flat(observed)}
        spans = {}
        for name, tensor in parts.items():
            magnitudes = tensor[tensor != 0].abs()
            if len(magnitudes):
                spans[name] = float(magnitudes.min()), float(magnitudes.max())
        if not spans:
            return False, ALL_ZERO_SIGNS()
        where = max(spans, key=lambda name: spans[name][1] / spans[name][0])
        least, most = spans[where]
        said = SIGN_MAGNITUDES(name=where, least=least, most=most)
        return most > least * (1 + ROUNDING), said

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """The sum of log P(sign of value plus noise); zeros say nothing of the noise.

        Nor does the scale, which so many values make nearly the same for all candidates.
        """
        parts = []
        for name, tensor in observed.items():
            agreement = before[name] * torch.sign(tensor)
            said = noise.log_cdf(widened(agreement))
            parts.append(torch.where(tensor == 0, torch.zeros_like(said), said).sum())
        return torch.stack(parts).sum()

    def norm_bound(self, before: float | None) -> float | None:
        """The one before, if scaled: sqrt(n) times the mean magnitude is at most the norm."""
        return None if self.scale == "none" else super().norm_bound(before)

    @property
    def _tells_its_step(self) -> bool:
        """Whether the candidate's own magnitudes give the step."""
        return self.scale != "none" and not self.error_feedback

    def _steps(self, observed: Gradient) -> Gradient:
        """The largest magnitude, of each tensor or of all."""
        steps = each(largest_magnitude, observed)
        if self.scale != "layer_mean":
            steps = dict.fromkeys(observed, torch.stack([*steps.values()]).max())
        return steps

    def _signs(self, gradient: Gradient) -> Gradient:
        if self.scale == "none":
            return each(torch.sign, gradient)
        if self.scale == "mean":
            mean = flat(gradient).abs().mean()
            return each(lambda tensor: mean * torch.sign(tensor), gradient)
        return each(lambda tensor: tensor.abs().mean() * torch.sign(tensor), gradient)
