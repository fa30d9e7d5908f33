"""Generative Gradient Leakage: many independent latent searches that share their batches.

Li et al., CVPR 2022, section 3.2. Each observed gradient is searched one or more times; every step
evaluates the candidates of all searches in one batch.

Where k images made a gradient, an optimizer that is told nothing but losses searches for each image
by itself, and its candidates are tried with the other images where these are believed to be
(cooperative coevolution; Potter and De Jong, Evolutionary Computation 8(1), 2000). That gives each
search d coordinates and a loss to itself, where one for all would have k x d and one loss for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ggl_audit.attack.objective import LatentObjective
from ggl_audit.basics.device import widened
from ggl_audit.optimizers import EVALUATION_COST, Array, Evaluation, Start

NO_MATCH = 1e30
"""Stands for a loss that is not finite: optimizers rank by value and must not meet NaN."""


@dataclass(frozen=True)
class SearchResult:
    """What t searches found.

    Attributes:
        latents: (t, k x d), the best of all restarts.
        losses: (t,), the loss of each.
        curves: (t, steps), the best loss so far after each step.
        spent: (steps,), candidates of each observed gradient until then.
        evaluations: candidates evaluated, all searches together.
    """

    latents: torch.Tensor
    losses: torch.Tensor
    curves: Array
    spent: NDArray[np.int64]
    evaluations: int


def search(
    objective: LatentObjective,
    start: Start,
    seeds: NDArray[np.int64],
    evaluations: int,
    advance: Callable[[int], None],
) -> SearchResult:
    """Searches the latents of t observed gradients.

    The best point ever evaluated is kept, whatever an optimizer does; at the end the point that
    each search recommends is evaluated too.

    Args:
        objective: the losses of latents, for t observed gradients.
        start: starts the searches for a part's latent.
        seeds: (t, restarts, parts), a seed for each search.
        evaluations: candidates for each part of each observed gradient, all restarts together.
        advance: told after each step how many candidates it evaluated.
    """
    trials, restarts, parts = seeds.shape
    optimizer = start(
        [int(seed) for seed in seeds.flat], evaluations // restarts, objective.labels.device
    )
    best = _Best(trials, restarts)
    curve: list[torch.Tensor] = []
    spent = [0]

    def evaluate(candidates: torch.Tensor, believed: torch.Tensor) -> Evaluation:
        """What becomes of (s, P, d) candidates, the other parts being where they are believed."""
        count = candidates.shape[1]
        cost = restarts * count * EVALUATION_COST[optimizer.wants]
        of_each = candidates.unflatten(0, (trials, restarts, parts))
        others = believed.unflatten(0, (trials, restarts, parts))
        if parts == 1 and optimizer.wants == "products":
            # Of each restart by itself, as its first candidate is what the others differ from.
            restarted = [objective.evaluate(one, "products") for one in of_each[:, :, 0].unbind(1)]
            found = _stacked(restarted)
        elif parts == 1:
            together = of_each.reshape(trials, restarts * count, -1)
            found = objective.evaluate(together, optimizer.wants)
        else:
            found = Evaluation(objective.losses_in_turn(of_each, others))
        losses = found.losses.nan_to_num(NO_MATCH, NO_MATCH, NO_MATCH)
        best.add(losses.reshape(trials, restarts, parts, count), of_each, others)
        curve.append(best.losses.amin(1))
        spent.append(spent[-1] + cost)
        advance(trials * cost)
        return Evaluation(
            losses.reshape(-1, count),
            *(
                None if table is None else table.reshape(-1, count, table.shape[-1])
                for table in (found.derivatives, found.products)
            ),
        )

    while True:
        candidates = optimizer.ask()
        each_costs = restarts * EVALUATION_COST[optimizer.wants]
        left = (evaluations - spent[-1] - each_costs) // each_costs  # the last is recommended
        if left < 1:
            break
        # A part of what was asked for, if the whole is too much, tells an optimizer nothing.
        tried = candidates[:, :left]
        told = evaluate(tried, optimizer.recommend() if parts > 1 else candidates[:, 0])
        if tried.shape != candidates.shape:
            break
        optimizer.tell(told)
    believed = optimizer.recommend()
    evaluate(believed[:, None], believed)

    winner = best.losses.argmin(1)
    rows = torch.arange(trials, device=winner.device)
    return SearchResult(
        latents=best.latents[rows, winner].flatten(1),
        losses=best.losses[rows, winner],
        curves=widened(torch.stack(curve, dim=1)).cpu().numpy(),
        spent=np.array(spent[1:]),
        evaluations=trials * spent[-1],
    )


def _stacked(restarted: list[Evaluation]) -> Evaluation:
    """The evaluation of t x r searches, from what became of each restart of t."""
    losses = torch.stack([one.losses for one in restarted], dim=1)
    products = torch.stack([one.products for one in restarted if one.products is not None], dim=1)
    return Evaluation(losses, products=products)


class _Best:
    """The best latents that were evaluated, of each restart of each trial.

    Attributes:
        losses: (t, r).
        latents: (t, r, parts, d).
    """

    def __init__(self, trials: int, restarts: int) -> None:
        self.losses = torch.full((trials, restarts), torch.inf)
        self.latents = torch.zeros(trials, restarts, 1, 1)

    def add(self, losses: torch.Tensor, candidates: torch.Tensor, others: torch.Tensor) -> None:
        """Compares with candidates (t, r, parts, P, d), of which each takes one part's place.

        Args:
            losses: (t, r, parts, P).
            candidates: for each part.
            others: (t, r, parts, d), where all parts are but for the candidate's.
        """
        parts, count = losses.shape[2:]
        self.losses = self.losses.to(losses)
        least, winner = losses.flatten(2).min(2)
        chosen = candidates.flatten(2, 3).gather(
            2, winner[:, :, None, None].expand(-1, -1, 1, candidates.shape[-1])
        )
        own = torch.arange(parts, device=losses.device) == (winner // count)[:, :, None]
        found = torch.where(own[..., None], chosen, others)
        better = least < self.losses
        self.losses = torch.where(better, least, self.losses)
        kept = self.latents.to(found).expand_as(found)
        self.latents = torch.where(better[:, :, None, None], found, kept)
