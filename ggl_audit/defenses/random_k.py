"""Random-k sparsification."""

from __future__ import annotations

from typing import ClassVar

import torch

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.defenses.base import Context, Trace
from ggl_audit.defenses.noise_law import NoiseLaw
from ggl_audit.defenses.sparsify import Sparsify


class RandomK(Sparsify):
    """Sets values to zero that are chosen at random, whatever they are; the others are not scaled.

    Usual settings: 75 to 99 % removed (Konecny et al., Federated Learning: Strategies for Improving
    Communication Efficiency, 2016, section 2, random mask; Stich et al., NeurIPS 2018).
    """

    name: ClassVar[str] = "random_k"
    source: ClassVar[str] = "Konecny et al., 2016; Stich et al., NeurIPS 2018"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm", "zeros"})
    random_if_hidden: ClassVar[bool] = True
    broken_by: ClassVar[str] = "candidate matching, as measured in docs/defenses.md"

    def compressed(self, gradient: Gradient, context: Context) -> Gradient:
        """Keeps values at random, drawn from the client's generator."""

        def at_random(values: torch.Tensor, count: int) -> torch.Tensor:
            order = torch.randperm(len(values), generator=context.generator, device=values.device)
            return order[:count]

        return self._restricted(gradient, at_random)

    def foreseen(self, gradient: Gradient) -> Gradient:
        """The mean over all masks."""
        return each(lambda tensor: (1 - self.fraction) * tensor, gradient)

    def exact_replica(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """The replica, as chance chose what is kept."""
        return self.replicate(gradient, observed)

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """Kept values by their density; removed ones say nothing, as chance chose them."""
        parts = []
        for name, tensor in observed.items():
            density = noise.log_densities(widened(tensor - before[name]))
            parts.append(torch.where(tensor != 0, density, torch.zeros_like(density)).sum())
        return torch.stack(parts).sum()
