"""What a capture says about each step of the declared defense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Place, Step
from ggl_audit.defenses.capabilities import HasCheck, HasHint
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.randomness import noise_norm
from ggl_audit.messages import Message, Said

HIDDEN_BY_LOCAL_STEPS = Message(
    "doubt/hidden-by-local-steps",
    "the local steps hide its trace",
    advice="The check says so for each such step; what to do is the line before.",
)
OWN_WORDS = Message(
    "check/own-words",
    "{words}",
    advice="They are of a step of your own, whose code says so in its `contradiction`.",
)
LEAVES_NO_TRACE = Message(
    "doubt/leaves-no-trace",
    "it leaves nothing that could be checked",
    advice="The check says so for each such step; what to do is the line before.",
)
HIDDEN_BY_STEP = Message(
    "doubt/hidden-by-step",
    "{step} after it hides its trace",
    advice="The check says so for each such step; what to do is the line before.",
)


@dataclass(frozen=True)
class Check:
    """What the capture says about one step of the declared defense.

    Attributes:
        step: the step, as ``name(parameters)``.
        outcome: ``agrees``, ``contradicts``, or ``hidden`` when later steps cover its trace.
        said: the measured figure beside the declared one.
    """

    step: str
    outcome: Literal["agrees", "contradicts", "hidden"]
    said: Said

    @property
    def detail(self) -> str:
        """The figures in words, as a sentence without a full stop."""
        return self.said.text


class Checks:
    """Compares captures with the steps.

    Attributes:
        factors: what the declared client multiplies and divides by.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        model = chain.model
        local = None if model is None else model.local
        self._trains = local is not None
        self.factors = Factors(
            1 if model is None else model.batch_size,
            chain.aggregation.clients,
            None if local is None else local.lr_of(0),
        )

    def verify(self, observed: Gradient) -> list[Check]:
        """Compares a capture with each step, as far as later steps leave its trace visible."""
        observed, _ = self._chain.clear.parted(observed)
        checks = []
        for index, step in enumerate(self._chain.equivalent):
            later = self._chain.equivalent[index + 1 :]

            def bound(size: int, confidence: float, later: Sequence[Step] = later) -> float:
                return noise_norm(later, size, confidence)

            if step.place is Place.SAMPLE and self._trains:
                checks.append(Check(str(step), "hidden", HIDDEN_BY_LOCAL_STEPS()))
            elif step.trace == "none" or not isinstance(step, HasCheck):
                checks.append(Check(str(step), "hidden", LEAVES_NO_TRACE()))
            elif self._chain.visible[index]:
                contradicts, figure = step.contradiction(observed, bound)
                said = figure if isinstance(figure, Said) else OWN_WORDS(words=figure)
                if contradicts and isinstance(step, HasHint):
                    said = said.followed_by(step.hint(observed, self.factors))
                checks.append(Check(str(step), "contradicts" if contradicts else "agrees", said))
            else:
                hiding = next(s for s in later if not s.leaves(step.trace))
                checks.append(Check(str(step), "hidden", HIDDEN_BY_STEP(step=hiding)))
        return checks
