"""The declared steps in their order, and what of each can be read off what is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ggl_audit.defenses.base import Aggregation, Place, Step, Trace
from ggl_audit.defenses.capabilities import AddsNoise, rounds_remembered
from ggl_audit.defenses.in_the_clear import InTheClear
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.secure_aggregation import SecureAggregation
from ggl_audit.inputs.model import ClientModel

ALONE = SecureAggregation(clients=1)
"""A cohort of one, where none is declared."""


class Chain:
    """Steps of a defense, one after the other; none is no defense.

    Attributes:
        steps: as declared.
        model: that they are for; None for any, with one image.
        is_of_one_image: whether a client's gradient is of one image.
        equivalent: the steps that an attacker takes them for: Gaussian noise of each client is
            Gaussian noise on their mean.
        aggregation: the step that joins the cohort.
        join: its place among the equivalent steps; their number where none is declared.
        visible: of each equivalent step, whether later ones leave its trace.
        readable: of each, whether they leave what its replica reads.
        clear: what they leave alone.
    """

    def __init__(self, steps: Sequence[Step] = (), model: ClientModel | None = None) -> None:
        self.steps = tuple(steps)
        self.model = model
        self.is_of_one_image = model is None or model.batch_size == 1
        self.equivalent = _noise_after_mean(self.steps)
        joins = [i for i, step in enumerate(self.equivalent) if isinstance(step, Aggregation)]
        self.join = joins[0] if joins else len(self.equivalent)
        self.aggregation = next((s for s in self.steps if isinstance(s, Aggregation)), ALONE)
        places = [*enumerate(self.equivalent)]
        self.visible = tuple(self._survives(step.trace, place) for place, step in places)
        self.readable = tuple(self._survives(step.reads, place) for place, step in places)
        self.clear = InTheClear(self.steps, model, self.aggregation.clients)

    def around(self) -> tuple[list[Step], list[Step]]:
        """The steps of each client and those on the aggregate, as declared."""
        whole = [step for step in self.steps if step.place is not Place.SAMPLE]
        join = next((i for i, s in enumerate(whole) if isinstance(s, Aggregation)), len(whole))
        return whole[:join], whole[join + 1 :]

    @property
    def earlier_rounds(self) -> int:
        """How many gradients of earlier rounds a client has to remember."""
        return max(map(rounds_remembered, self.steps), default=0)

    def acts_on_a_gradient(self) -> bool:
        """Whether it can be applied to a gradient that has been computed without it."""
        return self.earlier_rounds == 0 and all(
            step.acts_on_a_gradient and step.place is not Place.SAMPLE for step in self.steps
        )

    def _survives(self, trace: Trace, place: int) -> bool:
        later = self.equivalent[place + 1 :]
        return trace != "none" and all(step.leaves(trace) for step in later)

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "none"


def _noise_after_mean(steps: Sequence[Step]) -> tuple[Step, ...]:
    moved = list(steps)
    for place, join in enumerate(steps):
        if not isinstance(join, Aggregation) or not join.is_mean:
            continue
        before = place
        while before and isinstance(noise := moved[before - 1], AddsNoise):
            if noise.law.distribution != "gaussian":
                break
            mean = Noise(std=noise.law.std / math.sqrt(join.clients))
            moved[before - 1 : before + 1] = [join, mean]
            before -= 1
    return tuple(moved)
