"""Generative Gradient Leakage: many independent latent searches that share their batches.

Li et al., CVPR 2022, section 3.2. Each observed gradient is searched by one or more independent
optimizers; every step evaluates the candidates of all of them in one batch.

Where k images made a gradient, each has an optimizer of its own, and its candidates are tried with
the other images where their optimizers believe them to be (cooperative coevolution; Potter and De
Jong, Evolutionary Computation 8(1), 2000). That gives each optimizer d coordinates and a loss to
itself, where one for all would have k x d and one loss for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ggl_audit.attack.matching import LatentObjective
from ggl_audit.optimizers import Array, Optimizer


@dataclass(frozen=True)
class SearchResult:
    """What t searches found.

    Attributes:
        latents: (t, k x d), the best of all restarts.
        losses: (t,), the loss of each.
        curves: (t, steps), the best loss so far after each step.
        evaluations: candidates evaluated, all searches together.
        complete: False when the search was interrupted.
    """

    latents: torch.Tensor
    losses: torch.Tensor
    curves: Array
    evaluations: int
    complete: bool


def search(
    objective: LatentObjective,
    make_optimizer: Callable[[int], Optimizer],
    seeds: NDArray[np.int64],
    evaluations: int,
    advance: Callable[[int], None],
) -> SearchResult:
    """Searches the latents of t observed gradients.

    The best point ever evaluated is kept, whatever an optimizer does; at the end the point that
    each optimizer recommends is evaluated too. An interrupt ends the search with what it has.

    Args:
        objective: the losses of latents, for t observed gradients.
        make_optimizer: from a seed to an optimizer of a part's latent.
        seeds: (t, restarts, parts), a seed for each optimizer.
        evaluations: candidates for each part of each observed gradient, all restarts together.
        advance: told after each step how many candidates it evaluated.
    """
    device = objective.labels.device
    trials, restarts, parts = seeds.shape
    optimizers = [make_optimizer(int(seed)) for seed in seeds.flat]
    best_losses = np.full((trials, restarts), np.inf)
    best_latents: Array | None = None
    curve: list[Array] = []
    evaluated = 0

    def tensor(values: Array) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    def of_each(values: list[Array]) -> Array:
        """What each optimizer gave, (trials, restarts, parts, ...)."""
        return np.stack(values).reshape(trials, restarts, parts, *values[0].shape)

    def evaluate(candidates: Array, believed: Array) -> Array:
        """The losses of candidates for each part, the other parts being where they are believed."""
        nonlocal best_latents, evaluated
        count, dimension = candidates.shape[3:]
        if parts == 1:
            losses = objective.losses(tensor(candidates).reshape(trials, -1, dimension))
        else:
            losses = objective.losses_in_turn(tensor(candidates), tensor(believed))
        grouped = losses.double().cpu().numpy().reshape(trials, restarts, parts, count)
        # A loss that is not finite is no match; CMA-ES ranks by value and must not meet NaN.
        grouped = np.where(np.isfinite(grouped), grouped, 1e30)
        if best_latents is None:
            best_latents = np.zeros_like(believed)
        for place in np.ndindex(trials, restarts):
            part, winner = np.unravel_index(grouped[place].argmin(), (parts, count))
            if grouped[place][part, winner] < best_losses[place]:
                best_losses[place] = grouped[place][part, winner]
                best_latents[place] = believed[place]
                best_latents[place][part] = candidates[place][part, winner]
        curve.append(best_losses.min(axis=1))
        evaluated += trials * restarts * count
        advance(trials * restarts * count)
        return grouped

    spent = 0
    complete = True
    try:
        while True:
            candidates = of_each([optimizer.ask() for optimizer in optimizers])
            believed = candidates[..., 0, :]  # which says nothing to an optimizer that is alone
            if parts > 1:
                believed = of_each([optimizer.recommend() for optimizer in optimizers])
            losses = evaluate(candidates, believed)
            count = candidates.shape[3]
            for optimizer, told in zip(optimizers, losses.reshape(-1, count), strict=True):
                optimizer.tell(told)
            spent += restarts * count
            if spent + restarts * (count + 1) > evaluations:
                break
        believed = of_each([optimizer.recommend() for optimizer in optimizers])
        evaluate(believed[..., None, :], believed)
    except KeyboardInterrupt:
        if best_latents is None:
            raise
        complete = False

    assert best_latents is not None
    winner = best_losses.argmin(axis=1)
    rows = np.arange(trials)
    return SearchResult(
        latents=tensor(best_latents[rows, winner]).flatten(1),
        losses=tensor(best_losses[rows, winner]),
        curves=np.stack(curve, axis=1),
        evaluations=evaluated,
        complete=complete,
    )
