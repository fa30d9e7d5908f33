"""How much one sample or one client can change a release, and the privacy that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ggl_audit.defenses.base import Aggregation, DataDefense, Place, Step
from ggl_audit.defenses.capabilities import AddsNoise, BoundsNorm, BoundsSensitivity
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.randomness import Randomness

Unit = Literal["sample", "client"]


@dataclass(frozen=True)
class GaussianMechanism:
    """A release that is differentially private: bounded shares plus Gaussian noise.

    Attributes:
        bound: the l2 norm that the share of one unit in the release cannot exceed.
        std: the standard deviation of the noise on the release.
    """

    bound: float
    std: float

    @property
    def mu(self) -> float:
        """The Gaussian-DP parameter of one release (Dong, Roth and Su, JRSS B 2022)."""
        return self.bound / self.std


class Sensitivity:
    """How much one sample or one client can change a release, step by step.

    A sample's share in a batch is bounded by a clip of each sample, and stays so under a clip of
    the whole, which brings no two gradients farther apart. Local training and mixed images leave it
    without a bound.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._noise = Randomness(chain).total_noise()

    def guarantee(self, unit: Unit | None = None) -> GaussianMechanism | None:
        """The differential privacy that the steps give to one unit, or None.

        It takes noise after a bound on the unit's share; what follows the noise changes nothing
        (post-processing).

        Args:
            unit: a sample or a client; None for the better of the two, as a bound for one image.
        """
        sample: float | None = None
        client: float | None = None
        joined = False
        for step in self._chain.equivalent:
            if isinstance(step, AddsNoise):
                # Where noise cannot be added up, only the first counts.
                total = self._noise or step.law
                bounds = {"sample": [sample], "client": [client], None: [sample, client]}[unit]
                best = min((bound for bound in bounds if bound), default=None)
                gaussian = total.distribution == "gaussian"
                return GaussianMechanism(best, total.std) if gaussian and best else None
            if step.place is Place.SAMPLE:
                sample = self._of_a_sample(step)
            elif joined:
                client = _after(step, client, of_mean=True)
                sample = _after(step, sample, of_mean=True)
            else:
                client = _norm_after(step, client)
                one_image = self._chain.is_of_one_image
                sample = client if one_image else _after(step, sample, of_mean=False)
                joined = isinstance(step, Aggregation) and step.clients > 1
        return None

    def _of_a_sample(self, step: Step) -> float | None:
        """A bound on a sample's share in a client's gradient, after a step on each sample's."""
        model, steps = self._chain.model, self._chain.steps
        mixes = any(isinstance(s, DataDefense) and not s.treats_each_image_alone for s in steps)
        bound = _norm_after(step, None)
        if bound is None or mixes or (model is not None and model.local is not None):
            return None
        return bound / (1 if model is None or model.loss_sum else model.batch_size)


def _norm_after(step: Step, bound: float | None) -> float | None:
    return step.norm_bound(bound) if isinstance(step, BoundsNorm) else None


def _after(step: Step, bound: float | None, of_mean: bool) -> float | None:
    return step.sensitivity(bound, of_mean) if isinstance(step, BoundsSensitivity) else None
