"""Generative Gradient Leakage: the search of a prior's latents (Li et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from ggl_audit.attack.objective import LatentObjective, pictures
from ggl_audit.attack.search import search
from ggl_audit.attacks.attack import Advance, Attack, Attempt
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.case import Case
from ggl_audit.defenses import Pipeline
from ggl_audit.optimizers import find_family, start_optimizer, wants_more
from ggl_audit.priors.directions import principal_directions
from ggl_audit.spec import AttackSpec


class GenerativeGradientLeakage(Attack):
    """The latent search, as the spec declares it."""

    name = "ggl"
    source = "the prior's latents (Generative Gradient Leakage; Li et al., CVPR 2022)"
    turn = 0

    def evaluations(self) -> int:
        """The declared budget, as far as it is whole steps."""
        declared = self.case.spec.attack
        step = declared.restarts * find_family(declared.optimizer).evaluation_cost()
        return step * (declared.evaluations // step)

    def attack(
        self,
        observed: Gradient,
        labels: torch.Tensor,
        randoms: Sequence[np.random.Generator],
        before: Mapping[str, Attempt],
        advance: Advance,
    ) -> Attempt:
        """Searches the latents under the replica of the declared defense."""
        return search_latents(self.case, self.case.defense, observed, labels, randoms, advance)


def search_latents(
    case: Case,
    defense: Pipeline,
    observed: Gradient,
    labels: torch.Tensor,
    randoms: Sequence[np.random.Generator],
    advance: Advance,
    evaluations: int | None = None,
) -> Attempt:
    """Searches the latents of t observed gradients, each on its own, as the spec declares.

    Args:
        case: what was handed in.
        defense: to replicate; not the declared one in the undefended control.
        observed: tensors with a leading dimension t.
        labels: (t, k), what the attacker takes the labels for.
        randoms: t streams.
        advance: told of the candidates that are evaluated.
        evaluations: for each gradient, if not as declared.
    """
    declared = searched_by(case)
    matching = case.matching(defense, declared.distance)
    objective = LatentObjective(matching, case.prior, observed, labels, declared.regularizer)
    parts = objective.parts(together=wants_more(declared.optimizer))
    seeds = np.stack([one.integers(2**32, size=(declared.restarts, parts)) for one in randoms])
    principal = partial(principal_directions, case.prior, case.audited.labels[0])
    size = case.prior.size * objective.members // parts
    start = start_optimizer(declared, size, principal if size == case.prior.size else None)
    found = search(objective, start, seeds, evaluations or declared.evaluations, advance)
    spent = found.spent.tolist()
    return Attempt(
        pictures(case.prior, found.latents, labels),
        found.losses,
        found.latents,
        [list(zip(spent, curve, strict=True)) for curve in found.curves.tolist()],
    )


def searched_by(case: Case) -> AttackSpec:
    """The declared search, but by what stands in for an optimizer that has too few evaluations."""
    declared, members = case.spec.attack, case.members
    apart = members > 1 and case.clients.adds_up
    size, evaluations = case.prior.size * members, declared.evaluations // declared.restarts
    other = find_family(declared.optimizer).stand_in(size, evaluations, apart)
    return declared.model_copy(update={"optimizer": other}) if other else declared
