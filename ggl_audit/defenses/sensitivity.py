"""How much one sample or one client can change a release, and the privacy that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ggl_audit.defenses.aggregation import Aggregation, SecureAggregation
from ggl_audit.defenses.base import Defense
from ggl_audit.defenses.clip import Clip, is_per_sample
from ggl_audit.defenses.encryption import Encryption
from ggl_audit.defenses.noise import Noise
from ggl_audit.inputs.model import ClientModel

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


def gaussian_mechanism(
    steps: Sequence[Defense], noise: Noise | None, model: ClientModel | None, unit: Unit | None
) -> GaussianMechanism | None:
    """The mechanism that steps are for one unit, or None where they are none.

    It takes noise after a bound on the unit's share; what follows the noise changes nothing
    (post-processing). A sample's share in a batch is bounded by a clip of each sample, and stays so
    under a clip of the whole, which brings no two gradients farther apart. Local training and mixed
    images leave it without a bound.

    Args:
        steps: in the client's order.
        noise: all noise of the steps as one; None where it cannot be added up, and only the first
            counts.
        model: the client's, which says what a batch is; None for one image.
        unit: a sample or a client; None for the better of the two, as a bound for one image.
    """
    one_image = model is None or model.batch_size == 1
    divisor = 1 if model is None or model.loss_sum else model.batch_size
    trains = model is not None and model.local is not None
    mixes = any(step.changes_images and not step.treats_each_image_alone for step in steps)
    sample: float | None = None
    client: float | None = None
    joined = False
    for step in steps:
        if isinstance(step, Noise):
            total = noise or step
            bounds = {"sample": [sample], "client": [client], None: [sample, client]}[unit]
            best = min((bound for bound in bounds if bound), default=None)
            gaussian = total.distribution == "gaussian"
            return GaussianMechanism(best, total.std) if gaussian and best else None
        if is_per_sample(step):
            bound = None if trains or mixes else step.norm_bound(None)
            sample = None if bound is None else bound / divisor
        elif joined:
            client, sample = _share_after(step, client), _share_after(step, sample)
        else:
            client = step.norm_bound(client)
            if one_image:
                sample = client
            elif isinstance(step, SecureAggregation):
                sample = step.norm_bound(sample)
            elif not isinstance(step, Clip | Encryption):
                sample = None
            joined = isinstance(step, Aggregation) and step.clients > 1
    return None


def _share_after(step: Defense, share: float | None) -> float | None:
    """A bound on what one unit changes in a mean over several, after a step on the mean.

    A clip brings no two means farther apart, and none from another than twice its bound.
    """
    if isinstance(step, Encryption):
        return share
    if isinstance(step, Clip) and step.scope == "global":
        return min(2 * step.bound, math.inf if share is None else share)
    return None
