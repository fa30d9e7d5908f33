"""Optimizers behind one ask/tell protocol, one family a file."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import torch

from ggl_audit.errors import SpecError, raised
from ggl_audit.messages import Message
from ggl_audit.optimizers.base import (
    DERIVATIVE_COST,
    EVALUATION_COST,
    Array,
    Evaluation,
    Optimizer,
    Principal,
    Start,
    Wants,
)
from ggl_audit.optimizers.family import Family, Task
from ggl_audit.optimizers.registry import KEY, families, find_family, register
from ggl_audit.optimizers.side_by_side import Search, quiet
from ggl_audit.spec import AttackSpec

__all__ = [
    "DERIVATIVE_COST",
    "EVALUATION_COST",
    "Array",
    "Evaluation",
    "Family",
    "Optimizer",
    "Search",
    "Start",
    "Task",
    "Wants",
    "families",
    "find_family",
    "register",
    "start_optimizer",
    "wants_more",
]

NOT_INSTALLED = Message(
    "spec/not-installed",
    "{optimizer} needs {library}, which is not installed",
    "Run `pip install '{package}'`, or use the optimizer 'cma'.",
    advice="Run the `pip install` that the message names, or choose another of `ggl-audit list "
    "optimizers`.",
)
NO_SUBSPACE = Message(
    "spec/no-subspace",
    "subspace is for optimizer: {takers}",
    advice="Leave `attack.subspace` out, as other optimizers search all of the latent space.",
)
CANNOT_BE_USED = Message(
    "spec/cannot-be-used",
    "{optimizer} cannot be used here ({error})",
    "Another population or budget may suit it; `ggl-audit list optimizers` shows others.",
    advice="Give another `attack.population` or `attack.evaluations`, or the optimizer `cma`.",
)


def wants_more(optimizer: str) -> bool:
    """Whether an optimizer wants to be told more than losses."""
    return find_family(optimizer).learns_from != "losses"


def start_optimizer(
    attack: AttackSpec, dimension: int, principal: Principal | None = None
) -> Start:
    """Prepares to start the declared optimizer any number of times.

    Args:
        attack: the optimizer's name, population, first step size and subspace.
        dimension: of the latent space, d.
        principal: from k to (k, d) orthonormal directions along which the generator's pictures
            change most; called when a search starts whose subspace is declared as principal.

    Returns:
        What starts it for any number of searches.

    Raises:
        SpecError: the name is unknown, what it needs is not installed, or the optimizer refuses the
            population, the budget or a subspace.
    """
    family = find_family(attack.optimizer)
    for library in family.libraries:
        if importlib.util.find_spec(library) is None:
            raise SpecError(
                KEY,
                NOT_INSTALLED(
                    optimizer=attack.optimizer, library=library, package=family.install or library
                ),
            )
    if attack.subspace is not None and not family.takes_subspace:
        takers = [name for name, other in families().items() if other.takes_subspace]
        raise SpecError(("attack", "subspace"), NO_SUBSPACE(takers=" or ".join(takers)))

    def start(seeds: Sequence[int], evaluations: int, device: torch.device) -> Optimizer:
        with quiet():
            for library in family.libraries:
                importlib.import_module(library)
        return family.start(Task(attack, dimension, seeds, evaluations, device, principal))

    if family.tried_first and not attack.subspace:
        _try_out(start, attack)
    return start


def _try_out(start: Start, attack: AttackSpec) -> None:
    try:
        optimizer = start([0], attack.evaluations // attack.restarts, torch.device("cpu"))
        candidates, wants = optimizer.ask(), optimizer.wants
        optimizer.tell(
            Evaluation(
                losses=candidates.sum(2),
                derivatives=torch.ones_like(candidates) if wants == "derivatives" else None,
                products=candidates @ candidates.mT if wants == "products" else None,
            )
        )
        optimizer.recommend()
    except Exception as error:
        # Libraries have conditions of their own, nevergrad for each of hundreds of optimizers.
        raise SpecError(
            KEY, CANNOT_BE_USED(optimizer=attack.optimizer, error=raised(error))
        ) from None
