"""Generative Gradient Leakage: many independent latent searches that share their batches.

Li et al., CVPR 2022, section 3.2. Each observed gradient is searched by one or more independent
optimizers; every step evaluates the candidates of all of them in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ggl_audit.attack.matching import LatentObjective
from ggl_audit.optimizers import Array, Optimizer


@dataclass(frozen=True)
class SearchResult:
    """What t searches found.

    Attributes:
        latents: (t, d), the best of all restarts.
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
    seeds: Sequence[Sequence[int]],
    evaluations: int,
    advance: Callable[[int], None],
) -> SearchResult:
    """Searches the latents of t observed gradients.

    The best point ever evaluated is kept, whatever an optimizer does; at the end the point that
    each optimizer recommends is evaluated too. An interrupt ends the search with what it has.

    Args:
        objective: the losses of latents, for t observed gradients.
        make_optimizer: from a seed to an optimizer.
        seeds: (t, restarts), a seed for each search.
        evaluations: candidates for each observed gradient, all its restarts together.
        advance: told after each step how many candidates it evaluated.
    """
    device = objective.labels.device
    trials, restarts = len(seeds), len(seeds[0])
    optimizers = [[make_optimizer(seed) for seed in row] for row in seeds]
    best_losses = np.full((trials, restarts), np.inf)
    best_latents: Array | None = None
    curve: list[Array] = []
    evaluated = 0

    def evaluate(latents: Array) -> Array:
        nonlocal best_latents, evaluated
        count, dimension = latents.shape[2:]
        batch = torch.as_tensor(latents, dtype=torch.float32, device=device)
        losses = objective.losses(batch.reshape(trials, restarts * count, dimension))
        grouped = losses.double().cpu().numpy().reshape(trials, restarts, count)
        # A loss that is not finite is no match; CMA-ES ranks by value and must not meet NaN.
        grouped = np.where(np.isfinite(grouped), grouped, 1e30)
        if best_latents is None:
            best_latents = np.zeros((trials, restarts, dimension))
        winner = grouped.argmin(axis=2)[..., None]
        loss = np.take_along_axis(grouped, winner, axis=2)[..., 0]
        better = loss < best_losses
        chosen = np.take_along_axis(latents, winner[..., None], axis=2)[:, :, 0]
        best_losses[better] = loss[better]
        best_latents[better] = chosen[better]
        curve.append(best_losses.min(axis=1))
        evaluated += grouped.size
        advance(grouped.size)
        return grouped

    spent = 0
    complete = True
    try:
        while True:
            candidates = np.stack([[o.ask() for o in row] for row in optimizers])
            spent += restarts * candidates.shape[2]
            losses = evaluate(candidates)
            for row, row_losses in zip(optimizers, losses, strict=True):
                for optimizer, told in zip(row, row_losses, strict=True):
                    optimizer.tell(told)
            if spent + restarts * (candidates.shape[2] + 1) > evaluations:
                break
        evaluate(np.stack([[o.recommend()[None] for o in row] for row in optimizers]))
    except KeyboardInterrupt:
        if best_latents is None:
            raise
        complete = False

    assert best_latents is not None
    winner = best_losses.argmin(axis=1)
    rows = np.arange(trials)

    def tensor(values: Array) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    return SearchResult(
        latents=tensor(best_latents[rows, winner]),
        losses=tensor(best_losses[rows, winner]),
        curves=np.stack(curve, axis=1),
        evaluations=evaluated,
        complete=complete,
    )
