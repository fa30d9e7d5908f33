"""The attacker's side: what is made of candidates' gradients, to compare them with a capture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import DataDefense, Drawn, Place, Step
from ggl_audit.defenses.capabilities import (
    HasExactReplica,
    HasGuesses,
    HasReplica,
    HasSmoothReplica,
    is_harmless,
)
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.value_wise import ValueWise, value_wise

OfStep = Callable[[Gradient, Gradient | None], Gradient]
"""From a candidate's gradient, and the capture where it shows, to what is compared."""

Way = Callable[[Step], OfStep]
"""How steps are replicated."""


def usual(step: Step) -> OfStep:
    """The replica of a step."""
    return step.replicate if isinstance(step, HasReplica) else _unchanged


def exact(step: Step) -> OfStep:
    """The replica on a candidate that may be the very image."""
    return step.exact_replica if isinstance(step, HasExactReplica) else usual(step)


def smooth(step: Step) -> OfStep:
    """The replica, without plateaus."""
    return step.smooth if isinstance(step, HasSmoothReplica) else usual(step)


def _unchanged(gradient: Gradient, observed: Gradient | None) -> Gradient:
    return gradient


class Replica:
    """What the attacker does about the steps of a defense.

    Attributes:
        is_smooth: whether the replica has no plateaus.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.is_smooth = not any(isinstance(step, HasSmoothReplica) for step in chain.steps)
        whole = [*zip(chain.equivalent, chain.readable, strict=True)]
        self._guessed = [(s, readable) for s, readable in whole if isinstance(s, HasGuesses)]
        # Looked up once, as candidates are compared often.
        self._of_steps: dict[Way, list[OfStep]] = {
            way: [
                _unchanged if step.place is Place.SAMPLE else way(step) for step in chain.equivalent
            ]
            for way in (usual, exact, smooth)
        }

    def guesses(self, observed: Gradient) -> list[Drawn]:
        """What the attacker takes the draws for; every combination of the steps' guesses."""
        observed, _ = self._chain.clear.parted(observed)
        each_step = [s.guesses(observed if readable else None) for s, readable in self._guessed]
        guesses = []
        for combination in itertools.product(*each_step):
            whole: Drawn = {}
            for guess in combination:
                whole |= guess
            guesses.append(whole)
        return guesses

    def blind_guess(self) -> Drawn:
        """What somebody without a capture takes the draws for."""
        guess: Drawn = {}
        for step, _ in self._guessed:
            guess |= step.guesses(None)[0]
        return guess

    def replicate(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> Gradient:
        """What the attacker compares with the capture.

        Args:
            gradients: candidates for what clients have computed.
            observed: the capture.
            known: the share of all other clients (:meth:`share`).
        """
        return self.of_first(len(self._chain.equivalent), usual, gradients, observed, known)

    def smooth(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> Gradient:
        """The same, for attacks that follow derivatives: without plateaus."""
        return self.of_first(len(self._chain.equivalent), smooth, gradients, observed, known)

    def of_first(
        self,
        count: int,
        way: Way,
        gradients: Sequence[Gradient],
        observed: Gradient,
        known: Gradient | None,
    ) -> Gradient:
        """The replica of some of the steps, the first of them, in one of the ways."""
        join, aggregation, clear = self._chain.join, self._chain.aggregation, self._chain.clear
        before = min(join, count)
        parts = [clear.parted(gradient) for gradient in gradients]
        observed, _ = clear.parted(observed)
        sent = [self._through(part, observed, 0, before, way) for part, _ in parts]
        mean, shown = aggregation.share(sent), clear.mean([shown for _, shown in parts])
        if known is not None:
            mean = {name: mean[name] + known[name] for name in mean}
            shown = {name: shown[name] + known[name] for name in shown}
        replica = self._through(aggregation.finish(mean), observed, join + 1, count, way)
        return {**replica, **shown}

    def share(self, gradients: Sequence[Gradient], observed: Gradient) -> Gradient:
        """What clients whose gradients the attacker knows add to the aggregate."""
        clear = self._chain.clear
        parts = [clear.parted(gradient) for gradient in gradients]
        observed, _ = clear.parted(observed)
        sent = [self._through(part, observed, 0, self._chain.join, exact) for part, _ in parts]
        shown = clear.mean([shown for _, shown in parts])
        return {**self._chain.aggregation.share(sent), **shown}

    def value_wise(self) -> ValueWise | None:
        """The same by single values, or None where values depend on each other in another way."""
        return value_wise(self._chain, len(self._chain.equivalent), exact=False)

    def adds_up(self) -> bool:
        """Whether a release is a sum of shares of single images, up to noise."""
        before, after = self._chain.around()
        if self._chain.earlier_rounds or not self._chain.aggregation.is_mean:
            return False
        if any(step.stochastic or isinstance(step, DataDefense) for step in self._chain.steps):
            return False
        of_one = self._chain.is_of_one_image or all(map(is_harmless, before))
        return of_one and all(map(is_harmless, after))

    def share_of_one(self, gradient: Gradient) -> Gradient:
        """What one image adds to a sum over all, before noise; only if it :meth:`adds_up`."""
        before, _ = self._chain.around()
        gradient, shown = self._chain.clear.parted(gradient)
        for step in before:
            gradient = usual(step)(gradient, None)
        return {**gradient, **shown}

    def _through(
        self, gradient: Gradient, observed: Gradient, start: int, stop: int, way: Way
    ) -> Gradient:
        for place in range(start, stop):
            seen = observed if self._chain.readable[place] else None
            gradient = self._of_steps[way][place](gradient, seen)
        return gradient
