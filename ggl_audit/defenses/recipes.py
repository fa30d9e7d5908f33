"""Differential privacy, as it is usually put together from a clip and noise."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ggl_audit.defenses.base import Declared, Step
from ggl_audit.defenses.clip import Clip
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.secure_aggregation import SecureAggregation


class Recipe(Declared):
    """A defense that is a sequence of other defenses."""


class DPSGD(Recipe):
    """Clips each sample's gradient and adds Gaussian noise to their sum (or mean) over the batch.

    Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1. The noise of the
    sum has standard deviation ``noise_multiplier * bound``. Give ``guarantee`` for the epsilon.
    """

    name: ClassVar[str] = "dp_sgd"
    source: ClassVar[str] = "Abadi et al., CCS 2016, algorithm 1"
    divides_by_batch: ClassVar[bool] = True
    promise: ClassVar[str] = "differential privacy for each sample"
    broken_by: ClassVar[str] = "nothing; noise multipliers far below 1 promise very little"

    bound: float = Field(gt=0, description="largest l2 norm of one sample's gradient")
    noise_multiplier: float = Field(gt=0, description="deviation of the sum's noise over bound")

    def as_steps(self, units: int) -> list[Step]:
        """A clip of each sample, then noise."""
        std = self.noise_multiplier * self.bound / units
        return [Clip(bound=self.bound, unit="sample"), Noise(std=std)]


class DPFedAvg(Recipe):
    """Clips what each client sends, averages it over a cohort, and adds Gaussian noise.

    Client-level differential privacy (McMahan et al., Learning Differentially Private Recurrent
    Language Models, ICLR 2018, algorithm 1 with fixed-size cohorts).
    """

    name: ClassVar[str] = "dp_fedavg"
    source: ClassVar[str] = "McMahan et al., ICLR 2018, algorithm 1"
    promise: ClassVar[str] = "differential privacy for each client"
    broken_by: ClassVar[str] = "nothing; noise multipliers far below 1 promise very little"

    bound: float = Field(gt=0, description="largest l2 norm of what one client sends")
    noise_multiplier: float = Field(gt=0, description="deviation of the sum's noise over bound")
    clients: int = Field(default=1, ge=1, description="in the cohort")

    def as_steps(self, units: int) -> list[Step]:
        """A clip of each client's share, the mean, then noise."""
        std = self.noise_multiplier * self.bound / self.clients
        joined = [SecureAggregation(clients=self.clients)] if self.clients > 1 else []
        return [Clip(bound=self.bound), *joined, Noise(std=std)]
