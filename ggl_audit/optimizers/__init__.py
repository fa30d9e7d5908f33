"""Gradient-free optimizers behind one ask/tell protocol, one family a file."""

from __future__ import annotations

from collections.abc import Callable

from ggl_audit.errors import SpecError, nearest
from ggl_audit.optimizers.base import Array, Optimizer
from ggl_audit.spec import AttackSpec

__all__ = ["Array", "Optimizer", "optimizer_factory"]

FAMILIES = {
    "cma": "CMA-ES with a diagonal covariance (Ros and Hansen, PPSN 2008), by pycma",
    "nevergrad:NAME": "any name of nevergrad's registry (Rapin and Teytaud, 2018)",
}


def optimizer_factory(attack: AttackSpec, dimension: int) -> Callable[[int], Optimizer]:
    """Prepares to start the declared optimizer any number of times.

    Args:
        attack: the optimizer's name, population, first step size and budget.
        dimension: of the latent space.

    Returns:
        A function from a seed to a fresh optimizer.

    Raises:
        SpecError: the name is unknown, or the optimizer refuses the population or the budget.
    """
    family, _, name = attack.optimizer.partition(":")
    budget = attack.evaluations // attack.restarts

    if attack.optimizer == "cma":
        from ggl_audit.optimizers.cma import DiagonalCma

        def make(seed: int) -> Optimizer:
            return DiagonalCma(dimension, attack.population, attack.sigma, seed)

    elif family == "nevergrad" and name:
        from ggl_audit.optimizers import nevergrad

        known = nevergrad.names()
        if name not in known:
            raise SpecError(
                ("attack", "optimizer"),
                f"nevergrad has no optimizer {name!r}",
                nearest(name, known),
            )

        def make(seed: int) -> Optimizer:
            return nevergrad.Nevergrad(
                name, dimension, attack.population, attack.sigma, budget, seed
            )

        _try_out(make, attack.optimizer)
    else:
        raise SpecError(
            ("attack", "optimizer"),
            f"there is no optimizer {attack.optimizer!r}",
            nearest(attack.optimizer, ["cma", "nevergrad:OldCMA", "nevergrad:DE"])
            + " `ggl-audit list optimizers` shows all.",
        )
    return make


def _try_out(make: Callable[[int], Optimizer], name: str) -> None:
    try:
        optimizer = make(0)
        candidates = optimizer.ask()
        optimizer.tell(candidates.sum(axis=1))
        optimizer.recommend()
    except Exception as error:
        # The registry holds hundreds of optimizers with conditions of their own.
        raise SpecError(
            ("attack", "optimizer"),
            f"{name} cannot be used here ({type(error).__name__}: {error})",
            "Another population or budget may suit it; `ggl-audit list optimizers` shows others.",
        ) from None
