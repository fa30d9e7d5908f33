"""Which attacks are made, and what all of them make of the same gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ggl_audit.attacks.attack import Advance, Attack, Attempt
from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.attacks.registry import known_attacks
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.case import Case


@dataclass(frozen=True)
class Suite:
    """The attacks that are made on a case.

    Attributes:
        attacks: in order, the latent search first.
        left_out: the others, and why they are not made.
    """

    attacks: Sequence[Attack]
    left_out: Sequence[tuple[type[Attack], str]]

    @property
    def names(self) -> list[str]:
        """The attacks that are made."""
        return [attack.name for attack in self.attacks]

    def searched(self) -> int:
        """How many candidates they evaluate for each gradient, without derivatives."""
        return sum(one.evaluations() for one in self.attacks if not one.by_derivatives)

    def descended(self) -> int:
        """How many candidates they evaluate for each gradient, with derivatives."""
        return sum(one.evaluations() for one in self.attacks if one.by_derivatives)

    def run(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        advance: Advance,
    ) -> dict[str, Attempt]:
        """Makes all attacks on t observed gradients, each on its own.

        Args:
            observed: tensors with a leading dimension t.
            labels: (t, k), what the attacker takes the labels for.
            randoms: t streams.
            advance: told of the candidates that are evaluated.
        """
        attempts: dict[str, Attempt] = {}
        for attack in self.attacks:
            attempts[attack.name] = attack.attack(observed, labels, randoms, attempts, advance)
        return attempts


def choose_attacks(case: Case) -> Suite:
    """All that the spec asks for and the model and the defense allow."""
    made: list[Attack] = []
    left_out: list[tuple[type[Attack], str]] = []
    alone = case.spec.attack.method == GenerativeGradientLeakage.name
    for name, kind in known_attacks().items():
        attack = kind(case)
        only = alone and name != GenerativeGradientLeakage.name
        reason = "attack.method is ggl" if only else attack.why_not()
        if reason:
            left_out.append((kind, reason))
        else:
            made.append(attack)
    return Suite(made, left_out)
