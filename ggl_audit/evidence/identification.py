"""Identification among N same-class candidates: the floor and the ceiling.

In a trial a canary is drawn from the reference set together with N - 1 others of its class. As the
canary is one of N images drawn alike, whoever has no information about it ranks it first with a
probability of exactly 1/N, however typical an image the prior draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.errors import SpecError
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.images import ImageSet

Distances = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Trials:
    """Canaries and the candidates that each is to be found among.

    Attributes:
        candidates: (t, N), indices into the reference set; column 0 is the canary.
        labels: (t,), the canaries' classes.
        reference: the set that the indices point into.
    """

    candidates: torch.Tensor
    labels: torch.Tensor
    reference: ImageSet

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Trials:
        """The first trials."""
        return Trials(self.candidates[:count], self.labels[:count], self.reference)

    def batches(self, size: int) -> Iterator[Trials]:
        """The trials in order, a few at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Trials(self.candidates[part], self.labels[part], self.reference)

    @property
    def canaries(self) -> torch.Tensor:
        """The true images, (t, channels, height, width)."""
        return self.reference.images[self.candidates[:, 0]]

    @property
    def images(self) -> torch.Tensor:
        """The candidates, (t, N, channels, height, width)."""
        return self.reference.images[self.candidates]


def draw_trials(
    reference: ImageSet, trials: int, candidates: int, random: np.random.Generator
) -> Trials:
    """Draws canaries, no image twice, and candidates of their class.

    The intervals hold for independent trials, so there are never more than there are images.

    Args:
        reference: public images that are alike the private ones.
        trials: how many canaries at most.
        candidates: N, the canary included.
        random: decides both.

    Raises:
        SpecError: no class has N images.
    """
    labels = reference.labels.cpu().numpy()
    members = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    eligible = np.flatnonzero([len(members[int(label)]) >= candidates for label in labels])
    if len(eligible) == 0:
        most = max(map(len, members.values()))
        raise SpecError(
            ("evidence", "candidates"),
            f"{candidates} candidates of one class are wanted, but no class of "
            f"{reference.source} has more than {most} images",
            "Lower it, or give a larger evidence.reference.",
        )
    canaries = random.permutation(eligible)[:trials]
    rows = []
    for canary in canaries:
        others = members[int(labels[canary])]
        others = random.permutation(others[others != canary])
        rows.append(np.concatenate([[canary], others[: candidates - 1]]))
    table = np.stack(rows) if rows else np.zeros((0, candidates), dtype=np.int64)
    indices = torch.as_tensor(table, dtype=torch.long, device=reference.labels.device)
    return Trials(indices, reference.labels[indices[:, 0]], reference)


def captured_trial(
    truth: torch.Tensor,
    label: int,
    reference: ImageSet,
    candidates: int,
    random: np.random.Generator,
) -> Trials | None:
    """The captured image among reference images of its class; None if these are too few.

    Args:
        truth: (channels, height, width), not a member of the reference set.
        label: its class, as the attacker knows it.
        reference: the others.
        candidates: N, the truth included.
        random: draws the others.
    """
    members = np.flatnonzero(reference.labels.cpu().numpy() == label)
    if len(members) < candidates - 1:
        return None
    others = torch.as_tensor(random.permutation(members)[: candidates - 1], device=truth.device)
    images = torch.cat([truth[None], reference.images[others]])
    labels = torch.full((len(images),), label, device=truth.device)
    indices = torch.arange(len(images), device=truth.device)[None]
    return Trials(indices, labels[:1], ImageSet(images, labels, "the captured image's candidates"))


def rank_of_truth(distances: torch.Tensor, random: np.random.Generator) -> list[int]:
    """The rank of candidate 0 among N, 1 for the nearest; ties are broken by lot.

    Args:
        distances: (t, N); a distance that is not finite is the farthest.
        random: the lot.

    Returns:
        t ranks from 1 to N.
    """
    values = np.nan_to_num(distances.double().cpu().numpy(), nan=np.inf, posinf=np.inf)
    truth = values[:, :1]
    nearer = (values[:, 1:] < truth).sum(axis=1)
    level = (values[:, 1:] == truth).sum(axis=1)
    return [int(1 + n + random.integers(0, e + 1)) for n, e in zip(nearer, level, strict=True)]


def match(
    matching: Matching, trials: Trials, observed: Gradient, random: np.random.Generator
) -> list[int]:
    """The ceiling: ranks the truth by the matching distance of the candidates themselves.

    Where the likelihood under the declared noise is known, it orders the candidates, so no
    reconstruction identifies the truth better (Bayes, with equal prior odds).

    Args:
        matching: with the declared defense, by likelihood.
        trials: t trials.
        observed: what the attacker sees of each truth, tensors with a leading dimension t.
        random: breaks ties.

    Returns:
        t ranks.
    """
    labels = trials.labels[:, None].expand_as(trials.candidates)
    return rank_of_truth(matching.distances(trials.images, labels, observed), random)


def reconstruction_ranks(
    reconstructions: torch.Tensor, trials: Trials, distance: Distances, random: np.random.Generator
) -> list[int]:
    """The floor: ranks each canary by the distance of the candidates to a reconstruction.

    Args:
        reconstructions: (t, channels, height, width).
        trials: t trials.
        distance: from images (t, N, ...) and reconstructions (t, ...) to (t, N).
        random: breaks ties.

    Returns:
        t ranks.
    """
    return rank_of_truth(distance(trials.images, reconstructions), random)
