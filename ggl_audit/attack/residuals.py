"""What of an observed gradient candidates leave unexplained, value by value."""

from __future__ import annotations

import functools

import torch
from torch.func import vmap

from ggl_audit.attack.matching import Matching, cosine
from ggl_audit.basics.gradient import Gradient, each, flat, norm, unstack
from ggl_audit.defenses import Drawn, relative_l2

FEWEST_VALUES = 4096
"""The least size of a compressed residual, as searches follow differences."""


class Residuals:
    """The difference between replica and capture, relative to the capture.

    By the smooth replica (``Pipeline.replica``), as this is for searches that follow
    differences. Their inner products are added up layer by layer where that is exact; elsewhere
    they are held, and those too long to be held together are compressed: with random signs that
    never change they are added up to as many values as can be, which keeps inner products on
    average (Charikar et al., ICALP 2002) and noise as it is.

    Args:
        matching: computes candidates' gradients. Its distance is ``l2``, or ``cosine`` for the
            difference of the two directions, halved.
    """

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self._defense = matching.defense
        self._by_direction = matching.distance == "cosine"
        self._measure = cosine if self._by_direction else relative_l2
        self._compared = vmap(self._compare, in_dims=(0, None))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compares n candidates with each of t observed gradients.

        Args:
            images: (t, n, k, channels, height, width) in [0, 1].
            labels: (t, n, k).
            observed: tensors with a leading dimension t.

        Returns:
            The distances (t, n), and the inner products (t, n, n) of the residuals: that of the
            first candidate, and what those of the others differ from it.
        """
        found = self._matching.residual_products(images, labels, observed)
        return self._of_whole_gradients(images, labels, observed) if found is None else found

    def _of_whole_gradients(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model = self._matching.model
        memory = self._matching.clients.memory
        room = max(FEWEST_VALUES, memory // (4 * labels.shape[1]))
        together = max(1, memory // (32 * model.size * max(1, labels.shape[2] // model.batch_size)))
        losses, products = [], []
        with torch.no_grad():
            guesses = vmap(self._defense.replica.guesses)(observed)
            for index, seen in enumerate(unstack(observed)):
                drawn = [{n: tensor[index][None] for n, tensor in one.items()} for one in guesses]
                parts = [
                    self._nearest(own, labelled, seen, drawn, room)
                    for own, labelled in zip(
                        images[index].split(together), labels[index].split(together), strict=True
                    )
                ]
                distances, residuals = (torch.cat(column) for column in zip(*parts, strict=True))
                residuals[1:] -= residuals[:1].clone()
                losses.append(distances)
                products.append(residuals @ residuals.T)
        return torch.stack(losses), torch.stack(products)

    def _nearest(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        drawn: list[Drawn],
        room: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By the best of some guesses of what was drawn: (n,) and (n, m)."""
        tried = []
        for guess in drawn:
            gradients = self._matching.of_clients(images[None], labels[None], guess)
            losses, residuals = self._compared(each(lambda tensor: tensor[0], gradients), observed)
            tried.append((losses, compressed(residuals, room)))
        losses, residuals = tried[0]
        for other_losses, others in tried[1:]:
            better = other_losses < losses
            losses = torch.where(better, other_losses, losses)
            residuals = torch.where(better[:, None], others, residuals)
        return losses, residuals

    def _compare(
        self, gradients: Gradient, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        clients = unstack(gradients)
        replica = smooth = self._defense.replica.replicate(clients, observed)
        if not self._defense.replica.is_smooth:
            smooth = self._defense.replica.smooth(clients, observed)
        length = norm(observed).clamp(min=1e-30)
        own = norm(smooth).clamp(min=1e-30) if self._by_direction else length
        left = {name: observed[name] / length - tensor / own for name, tensor in smooth.items()}
        residual = flat(left) * (0.5**0.5 if self._by_direction else 1)
        return self._measure(replica, observed), residual


def compressed(residuals: torch.Tensor, room: int) -> torch.Tensor:
    """Adds up n residuals (n, size) with random signs to (n, room), if they are longer."""
    count, size = residuals.shape
    if size <= room:
        return residuals
    padded = torch.nn.functional.pad(residuals * _signs(size).to(residuals), (0, -size % room))
    summed: torch.Tensor = padded.view(count, -1, room).sum(1)
    return summed


@functools.lru_cache(maxsize=1)
def _signs(size: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(2, (size,), generator=random, dtype=torch.int8) * 2 - 1
