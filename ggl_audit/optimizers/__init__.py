"""Optimizers behind one ask/tell protocol, one family a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ggl_audit.errors import SpecError, nearest
from ggl_audit.optimizers.base import Array, Evaluation, Optimizer, Start, State, Wants
from ggl_audit.spec import AttackSpec

__all__ = [
    "WANTS",
    "Array",
    "Evaluation",
    "Optimizer",
    "Start",
    "State",
    "Wants",
    "start_optimizer",
]

FAMILIES = {
    "cma": "CMA-ES with a diagonal covariance (Ros and Hansen, PPSN 2008), all searches at once",
}


WANTS: dict[str, Wants] = {"gauss_newton": "products", "adam": "derivatives"}
"""What other optimizers than those that are told losses want."""


def start_optimizer(attack: AttackSpec, dimension: int) -> Start:
    """Prepares to start the declared optimizer any number of times.

    Args:
        attack: the optimizer's name, population and first step size.
        dimension: of the latent space.

    Returns:
        What starts it for any number of searches.

    Raises:
        SpecError: the name is unknown, or the optimizer refuses the population or the budget.
    """
    if attack.optimizer == "cma":
        from ggl_audit.optimizers.cma import DiagonalCma

        def start(seeds: Sequence[int], evaluations: int, device: torch.device) -> Optimizer:
            return DiagonalCma(dimension, attack.population, attack.sigma, seeds, device)

    elif attack.optimizer == "gauss_newton":
        from ggl_audit.optimizers.gauss_newton import GaussNewton

        def start(seeds: Sequence[int], evaluations: int, device: torch.device) -> Optimizer:
            return GaussNewton(
                dimension, attack.population, attack.sigma, seeds, evaluations, device
            )

    else:
        raise SpecError(
            ("attack", "optimizer"),
            f"there is no optimizer {attack.optimizer!r}",
            nearest(attack.optimizer, ["cma", "nevergrad:OldCMA", "nevergrad:DE"])
            + " `ggl-audit list optimizers` shows all.",
        )
    return start
