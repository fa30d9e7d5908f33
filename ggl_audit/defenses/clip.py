"""Norm clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr

from ggl_audit.basics.device import widened
from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient, each, flat, norm
from ggl_audit.defenses.base import (
    FALSE_ACCUSATION,
    Context,
    Defense,
    Effect,
    NoiseBound,
    Place,
    ReplicaKind,
    Trace,
)
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.errors import ReasonError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said

ROUNDING = 1e-4
FACTOR_TOLERANCE = 1e-3
"""The relative error of a norm that was clipped to another bound."""

SAMPLES_ARE_MIXED = Message(
    "defense/samples-are-mixed",
    "clips each sample, but the model mixes the samples, as batch norm in train mode does",
    advice="Use a model without batch norm, as Opacus asks for too, or declare `mode: eval` if "
    "the client trains so.",
)

NORM = Message(
    "contradiction/norm",
    "the norm of {name} is {norm:.4g}; the bound is {bound:g}{with_noise}",
    advice="Look for a clip that is left out, at another bound, or of each tensor in place of the "
    "whole; a batch whose samples are clipped is a `unit: sample`, and its sum "
    "`model.loss.reduction: sum`.",
)


class Clip(Defense):
    """Scales the gradient down to a bound on its l2 norm, and leaves it alone below the bound.

    Usual settings: a norm of 1 to 4, over the whole gradient or for each tensor (Abadi et al.,
    CCS 2016; Li et al., CVPR 2022, section 4.1).
    """

    name: ClassVar[str] = "clip"
    source: ClassVar[str] = "Abadi et al., CCS 2016"
    promise: ClassVar[str] = "with Gaussian noise after it: differential privacy"
    broken_by: ClassVar[str] = "alone by candidate matching, as measured in docs/defenses.md"
    trace: ClassVar[Trace] = "norm"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"zeros", "mask", "levels", "span"})
    effect: ClassVar[Effect] = "exact"
    replica_kind: ClassVar[ReplicaKind] = "scaling"
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian"})

    bound: float = Field(gt=0, description="largest l2 norm")
    scope: Literal["global", "layer"] = Field(
        default="global", description="over the whole gradient, or for each tensor"
    )
    unit: Literal["client", "sample"] = Field(
        default="client", description="what a client sends, or each sample's share in it"
    )
    over: Literal["parameters", "everything"] | None = Field(
        default=None,
        description="where running statistics are sent: whether it, and each other step, is over "
        "the parameters alone, or over every array that is sent, as Flower's is; both are tried "
        "unless declared",
    )
    _shares: int = PrivateAttr(default=1)  # whose shares are summed

    def bind(self, model: ClientModel) -> Clip:
        """For the sum or the mean over the model's batch; with one image the units are one."""
        if self.unit == "client":
            return self
        if model.batch_size == 1 and model.local is None:
            return self.model_copy(update={"unit": "client"})
        if model.mixes:
            raise ReasonError(SAMPLES_ARE_MIXED())
        bound = self.model_copy()
        bound._shares = model.batch_size if model.loss_sum else 1
        return bound

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Scales by min(1, bound / norm)."""
        return self._clipped(gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The same, with the declared bound."""
        return self._clipped(gradient)

    @property
    def place(self) -> Place:
        """On each sample's gradient, if declared so."""
        return Place.SAMPLE if self.unit == "sample" else Place.GRADIENT

    def by_factor(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """min(1, bound / norm), if it is over the whole gradient."""
        return self._factor if self.scope == "global" else None

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds a norm above the bound, or above what bound and later noise can reach together."""
        parts = {"the gradient": flat(observed)} if self.scope == "global" else observed
        confidence = 1 - FALSE_ACCUSATION / len(parts)

        def most(tensor: torch.Tensor) -> float:
            return self._shares * self.bound * (1 + ROUNDING) + later_noise(
                tensor.numel(), confidence
            )

        where = max(parts, key=lambda name: float(parts[name].norm()) / most(parts[name]))
        largest, allowed = float(parts[where].norm()), most(parts[where])
        bound = self._shares * self.bound
        noise = later_noise(1, confidence)
        with_noise = f", with the noise after it at most {allowed:.4g}" if noise else ""
        said = NORM(name=where, norm=largest, bound=bound, with_noise=with_noise)
        return largest > allowed, said

    def hint(self, observed: Gradient, factors: Factors) -> str:
        """The bound that the norm is at, where the factor is known."""
        if self.scope == "layer":
            return ""
        factor = float(norm(observed)) / (self._shares * self.bound)
        name = factors.name(factor, FACTOR_TOLERANCE)
        return f"; {factor:.3g} times the bound{name}" if name else ""

    def leaves(self, trace: Trace) -> bool:
        """Levels of the whole gradient are no longer so after tensors were scaled apart."""
        return super().leaves(trace) and not (trace == "levels" and self.scope == "layer")

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """The density of the direction, as a clip hides the scale; of all where none was.

        The density of a Gaussian vector's direction integrates over its unknown length r,
        proportional to the integral of r^(d-1) exp(-|r u - g|^2 / 2 s^2) dr (Mardia and Jupp,
        Directional Statistics, 2000, section 9.3.2), here by Laplace's method around the best r.
        That r is above the bound is left out; it matters only for norms close to the bound.
        """
        if self.scope == "global":
            return self._direction(flat(before), flat(observed), noise.std)
        parts = [
            self._direction(before[name].flatten(), observed[name].flatten(), noise.std)
            for name in observed
        ]
        return torch.stack(parts).sum()

    def _direction(self, mean: torch.Tensor, observed: torch.Tensor, std: float) -> torch.Tensor:
        mean, observed = widened(mean), widened(observed)
        length = observed.square().sum().sqrt().clamp(min=1e-300)
        dimensions = observed.numel() - 1
        along = (mean * observed).sum() / length
        best = (along + (along.square() + 4 * dimensions * std**2).sqrt()) / 2
        best = best.clamp(min=1e-300)
        direction = (
            -(best.square() - 2 * best * along + mean.square().sum()) / (2 * std**2)
            + dimensions * best.log()
            - (1 / std**2 + dimensions / best.square()).log() / 2
        )
        whole = -(observed - mean).square().sum() / (2 * std**2)
        return torch.where(length < self.bound * (1 - ROUNDING), whole, direction)

    def norm_bound(self, before: float | None) -> float | None:
        """The bound, when it is over the whole gradient."""
        if self.scope == "layer":
            return before
        return self.bound if before is None else min(before, self.bound)

    def sensitivity(self, before: float | None, of_mean: bool) -> float | None:
        """What it was: a clip brings no two gradients farther apart.

        Nor any two means; and none of these from another than twice its bound.
        """
        if not of_mean:
            return before
        if self.scope == "layer":
            return None
        return min(2 * self.bound, math.inf if before is None else before)

    def _factor(self, length: torch.Tensor) -> torch.Tensor:
        return (self.bound / length.clamp(min=1e-30)).clamp(max=1)

    def _clipped(self, gradient: Gradient) -> Gradient:
        if self.scope == "global":
            factor = self._factor(norm(gradient))
            return each(lambda tensor: tensor * factor, gradient)
        return each(lambda tensor: tensor * self._factor(tensor.square().sum().sqrt()), gradient)
