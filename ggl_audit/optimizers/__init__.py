"""Optimizers behind one ask/tell protocol, one family a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ggl_audit.errors import SpecError, nearest
from ggl_audit.optimizers.base import (
    DERIVATIVE_COST,
    Array,
    Evaluation,
    Optimizer,
    Start,
    Wants,
)
from ggl_audit.optimizers.side_by_side import Search, SideBySide
from ggl_audit.optimizers.subspace import Principal, make_subspace
from ggl_audit.spec import AttackSpec, SubspaceSpec

__all__ = [
    "DERIVATIVE_COST",
    "FAMILIES",
    "Array",
    "Evaluation",
    "Optimizer",
    "Start",
    "Wants",
    "start_optimizer",
    "wants_more",
]


@dataclass(frozen=True)
class Family:
    """What can be declared as ``attack.optimizer``."""

    source: str
    good_for: str


FAMILIES = {
    "gauss_newton": Family(
        "Levenberg-Marquardt by differences (Brown and Dennis, 1971), started by cma",
        "most audits, the default: looks at every value of the gradient, not at a loss alone",
    ),
    "cma": Family(
        "CMA-ES with a diagonal covariance (Ros and Hansen, PPSN 2008)",
        "the cheapest for an evaluation: any loss, any device, all searches at once",
    ),
    "pycma:full": Family(
        "CMA-ES (Hansen, arXiv 1604.00772), by pycma",
        "coordinates that depend on each other, up to some hundred of them",
    ),
    "pycma:diagonal": Family(
        "as cma, by pycma, in double precision",
        "checking cma",
    ),
    "pycma:vkd": Family(
        "VkD-CMA (Akimoto and Hansen, GECCO 2016), by pycma",
        "many coordinates of which a few combinations matter, and 10,000 evaluations or more",
    ),
    "nevergrad:NAME": Family(
        "any name of nevergrad's registry (Rapin and Teytaud, 2018)",
        "comparing with what others used",
    ),
    "bayesian": Family(
        "Gaussian process and lower confidence bound, by scikit-optimize",
        "100 to 500 evaluations, each dearer than a second, in about 12 directions",
    ),
    "turbo": Family(
        "TuRBO-1 (Eriksson et al., NeurIPS 2019) on BoTorch; needs ggl-audit[turbo]",
        "100 to 500 evaluations in a subspace; in a whole latent space cma finds more",
    ),
    "adam": Family(
        "Adam (Kingma and Ba, ICLR 2015) from `population` latents",
        "losses with derivatives: no sign, quantization or other steps in the defense",
    ),
    "random": Family(
        "draws from the prior",
        "the floor: what an optimizer must beat to have learned from the losses",
    ),
}

KEY = ("attack", "optimizer")

WANTS_MORE = ("gauss_newton", "adam")


def wants_more(optimizer: str) -> bool:
    """Whether an optimizer wants to be told more than losses."""
    return optimizer in WANTS_MORE


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
            population or the budget.
    """
    _refuse_unknown(attack.optimizer)
    if attack.optimizer == "turbo" and importlib.util.find_spec("botorch") is None:
        raise SpecError(
            KEY,
            "turbo needs BoTorch, which is not installed",
            "Run `pip install 'ggl-audit[turbo]'`, or use the optimizer 'cma'.",
        )

    def start(seeds: Sequence[int], evaluations: int, device: torch.device) -> Optimizer:
        if attack.optimizer == "cma":
            from ggl_audit.optimizers.cma import DiagonalCma

            return DiagonalCma(dimension, attack.population, attack.sigma, seeds, device)
        if attack.optimizer == "gauss_newton":
            from ggl_audit.optimizers.gauss_newton import GaussNewton

            return GaussNewton(
                dimension, attack.population, attack.sigma, seeds, evaluations, device
            )
        if attack.optimizer == "adam":
            from ggl_audit.optimizers.adam import Adam

            steps = evaluations // DERIVATIVE_COST
            return Adam(dimension, attack.population, steps, seeds, device)
        if attack.optimizer == "random":
            from ggl_audit.optimizers.random import RandomSearch

            return RandomSearch(dimension, attack.population, seeds, device)
        one = partial(_start_one, attack, dimension, evaluations, principal)
        return SideBySide(one, seeds, device)

    if attack.optimizer.startswith(("nevergrad:", "pycma:", "turbo")) and not attack.subspace:
        _try_out(start, attack)
    return start


def _start_one(
    attack: AttackSpec, dimension: int, evaluations: int, principal: Principal | None, seed: int
) -> Search:
    """Starts one search of an optimizer that knows only one."""
    family, _, name = attack.optimizer.partition(":")
    population, sigma = attack.population, attack.sigma
    if family == "pycma":
        from ggl_audit.optimizers.pycma import Pycma

        return Pycma(name, dimension, population, sigma, seed)
    if family == "nevergrad":
        from ggl_audit.optimizers.nevergrad import Nevergrad

        return Nevergrad(name, dimension, population, sigma, evaluations, seed)
    if family == "bayesian":
        from ggl_audit.optimizers.bayesian import Bayesian

        declared = attack.subspace or SubspaceSpec()
        return Bayesian(make_subspace(declared, dimension, seed, principal), population, seed)
    from ggl_audit.optimizers.turbo import Turbo

    subspace = make_subspace(attack.subspace, dimension, seed, principal)
    return Turbo(subspace, population, evaluations, seed)


def _refuse_unknown(optimizer: str) -> None:
    family, _, name = optimizer.partition(":")
    if family == "nevergrad" and name:
        from ggl_audit.optimizers.nevergrad import names

        known = names()
        if name not in known:
            raise SpecError(KEY, f"nevergrad has no optimizer {name!r}", nearest(name, known))
    elif optimizer not in FAMILIES:
        examples = [*FAMILIES, "nevergrad:OldCMA", "nevergrad:DE"]
        raise SpecError(
            KEY,
            f"there is no optimizer {optimizer!r}",
            nearest(optimizer, examples) + " `ggl-audit list optimizers` shows all.",
        )


def _try_out(start: Start, attack: AttackSpec) -> None:
    try:
        optimizer = start([0], attack.evaluations // attack.restarts, torch.device("cpu"))
        optimizer.tell(Evaluation(optimizer.ask().sum(2)))
        optimizer.recommend()
    except Exception as error:
        # Libraries have conditions of their own, nevergrad for each of hundreds of optimizers.
        raise SpecError(
            KEY,
            f"{attack.optimizer} cannot be used here ({type(error).__name__}: {error})",
            "Another population or budget may suit it; `ggl-audit list optimizers` shows others.",
        ) from None
