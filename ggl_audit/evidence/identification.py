"""Identification among N same-class candidates: the floor and the ceiling.

In a trial a canary is drawn from the reference set together with N - 1 others of its class. As the
canary is one of N images drawn alike, whoever has no information about it ranks it first with a
probability of exactly 1/N, however typical an image the prior draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.errors import SpecError
from ggl_audit.inputs.images import ImageSet
from ggl_audit.messages import Message

Distances = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Lots = Sequence[float] | NDArray[np.float64]

TOO_FEW_OF_A_CLASS = Message(
    "image/too-few-of-a-class",
    "{candidates} candidates of one class are wanted, but no class of {source} has more than "
    "{most} images",
    "Lower it, or give a larger evidence.reference.",
    advice="Lower `evidence.candidates`, or give more images of a class.",
)
TOO_FEW_IMAGES = Message(
    "image/too-few-images",
    "{source} has {count} images; {candidates} candidates and {companions} other members of a "
    "release are wanted",
    "Give a larger one.",
    advice="Give a larger `evidence.reference`.",
)


@dataclass(frozen=True)
class Trials:
    """Canaries and the candidates that each is to be found among.

    Attributes:
        candidates: (t, N), indices into the reference set; column 0 is the canary.
        labels: (t,), the canaries' own, which the attacker gives to every candidate.
        reference: the set that the indices point into.
        companions: (t, k - 1), the other images that the canary's gradient is made of.
    """

    candidates: torch.Tensor
    labels: torch.Tensor
    reference: ImageSet
    companions: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Trials:
        """The first trials."""
        return self.part(slice(count))

    def batches(self, size: int) -> Iterator[Trials]:
        """The trials in order, a few at a time."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))

    def part(self, part: slice) -> Trials:
        """Some of the trials."""
        return Trials(
            self.candidates[part], self.labels[part], self.reference, self.companions[part]
        )

    def among(self, candidates: int | None) -> Trials:
        """The trials with so many candidates each; all unless told."""
        return replace(self, candidates=self.candidates[:, :candidates])

    @property
    def canaries(self) -> torch.Tensor:
        """The true images, (t, channels, height, width)."""
        return self.reference.images[self.candidates[:, 0]]

    @property
    def images(self) -> torch.Tensor:
        """The candidates, (t, N, channels, height, width)."""
        return self.reference.images[self.candidates]

    @property
    def members(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images that each gradient is made of, the canary first, and their labels.

        Returns:
            (t, k, channels, height, width) and (t, k).
        """
        if self.companions.shape[1] == 0:
            # A captured image that is no member of the set has a label of its own.
            return self.canaries[:, None], self.labels[:, None]
        chosen = torch.cat([self.candidates[:, :1], self.companions], dim=1)
        return self.reference.images[chosen], self.reference.labels[chosen]


def draw_trials(
    reference: ImageSet,
    trials: int,
    candidates: int,
    random: np.random.Generator,
    companions: int = 0,
) -> Trials:
    """Draws canaries, no image twice, and candidates of their class (:attr:`ImageSet.groups`).

    The intervals hold for independent trials, so there are never more than there are images.

    Args:
        reference: public images that are alike the private ones.
        trials: how many canaries at most.
        candidates: N, the canary included.
        random: decides both; not used up, each trial has a stream of its own.
        companions: other images, of any class and none of the candidates, for each canary.

    Raises:
        SpecError: no class has N images.
    """
    groups = reference.groups.cpu().numpy()
    members = {int(group): np.flatnonzero(groups == group) for group in np.unique(groups)}
    eligible = np.flatnonzero([len(members[int(group)]) >= candidates for group in groups])
    if len(eligible) == 0:
        most = max(map(len, members.values()))
        raise SpecError(
            ("evidence", "candidates"),
            TOO_FEW_OF_A_CLASS(candidates=candidates, source=reference.source, most=most),
        )
    canaries = random.permutation(eligible)[:trials]
    # A stream for each, so that a trial does not depend on how many there are.
    randoms = random.spawn(len(canaries))
    rows = []
    for canary, own in zip(canaries, randoms, strict=True):
        others = members[int(groups[canary])]
        others = own.permutation(others[others != canary])
        rows.append(np.concatenate([[canary], others[: candidates - 1]]))
    if len(reference) < candidates + companions:
        raise SpecError(
            ("evidence", "reference"),
            TOO_FEW_IMAGES(
                source=reference.source,
                count=len(reference),
                candidates=candidates,
                companions=companions,
            ),
        )
    others_of = [
        own.permutation(np.setdiff1d(np.arange(len(reference)), row))[:companions]
        for row, own in (zip(rows, randoms, strict=True) if companions else [])
    ]

    def table(filled: list[np.ndarray], width: int) -> torch.Tensor:
        values = np.stack(filled) if filled else np.zeros((len(rows), width), dtype=np.int64)
        return torch.as_tensor(values, dtype=torch.long, device=reference.labels.device)

    indices = table(rows, candidates)
    return Trials(indices, reference.labels[indices[:, 0]], reference, table(others_of, companions))


def captured_trial(
    truths: torch.Tensor,
    labels: Sequence[int],
    place: int,
    batch_size: int,
    reference: ImageSet,
    candidates: int,
    random: np.random.Generator,
) -> Trials | None:
    """A captured image among reference images of its class; None if these are too few.

    Args:
        truths: (k, channels, height, width), all images of the release, client by client; none of
            them is a member of the reference set.
        labels: of these.
        place: of the one that is to be found.
        batch_size: images of one client.
        reference: the others.
        candidates: N, the truth included.
        random: draws the others.
    """
    label = labels[place]
    alike = reference.groups == (0 if reference.one_group else label)
    members = np.flatnonzero(alike.cpu().numpy())
    if len(members) < candidates - 1:
        return None
    others = torch.as_tensor(random.permutation(members)[: candidates - 1], device=truths.device)
    # The client's own images come before those of other clients.
    beside = [other for other in range(len(truths)) if other != place]
    beside.sort(key=lambda other: other // batch_size != place // batch_size)
    images = torch.cat([truths[place][None], reference.images[others], truths[beside]])
    own = [label] * candidates + [labels[other] for other in beside]
    source = ImageSet(
        images, torch.tensor(own, device=truths.device), "the captured image's candidates"
    )
    indices = torch.arange(len(images), device=truths.device)[None]
    return Trials(indices[:, :candidates], source.labels[:1], source, indices[:, candidates:])


def rank_of_truth(distances: torch.Tensor, lots: Lots) -> list[int]:
    """The rank of candidate 0 among N, 1 for the nearest; ties are broken by lot.

    Args:
        distances: (t, N); a distance that is not finite is the farthest.
        lots: (t,), drawn evenly from [0, 1), which break ties.

    Returns:
        t ranks from 1 to N.
    """
    values = np.nan_to_num(widened(distances).cpu().numpy(), nan=np.inf, posinf=np.inf)
    truth = values[:, :1]
    nearer = (values[:, 1:] < truth).sum(axis=1)
    level = (values[:, 1:] == truth).sum(axis=1)
    drawn = zip(nearer, level, lots, strict=True)
    return [int(1 + before + lot * (equal + 1)) for before, equal, lot in drawn]


def match(matching: Matching, trials: Trials, observed: Gradient, lots: Lots) -> list[int]:
    """The ceiling: ranks the truth by the matching distance of the candidates themselves.

    Where the likelihood under the declared noise is known, it orders the candidates, so no
    reconstruction identifies the truth better (Bayes, with equal prior odds). Where a release is
    made of more images, all others are known here: the informed adversary (Balle, Cherubin and
    Hayes, S&P 2022), who bounds every other one.

    Args:
        matching: with the declared defense, by likelihood.
        trials: t trials.
        observed: what the attacker sees of each truth, tensors with a leading dimension t.
        lots: (t,), break ties.

    Returns:
        t ranks.
    """
    labels = trials.labels[:, None].expand_as(trials.candidates)
    return rank_of_truth(distances_of(matching, trials, labels, observed), lots)


def distances_of(
    matching: Matching, trials: Trials, labels: torch.Tensor, observed: Gradient
) -> torch.Tensor:
    """The matching distance of each candidate, all other images of the release being known.

    Args:
        matching: with the declared defense.
        trials: t trials of N candidates.
        labels: (t, N), of the candidates.
        observed: what the attacker sees of each, tensors with a leading dimension t.

    Returns:
        (t, N).
    """
    companions = trials.companions.shape[1]
    if companions == 0:
        return matching.distances(trials.images, labels, observed)
    own = matching.model.batch_size - 1
    images, all_labels = trials.members
    beside = images[:, None, 1 : own + 1].expand(-1, labels.shape[1], *images[0, 1 : own + 1].shape)
    beside_labels = all_labels[:, None, 1 : own + 1].expand(*labels.shape, own)
    sets = torch.cat([trials.images[:, :, None], beside], dim=2)
    set_labels = torch.cat([labels[..., None], beside_labels], dim=2)
    others = (images[:, own + 1 :], all_labels[:, own + 1 :])
    return matching.distances(sets, set_labels, observed, others)


def reconstruction_ranks(
    reconstructions: torch.Tensor, trials: Trials, distance: Distances, lots: Lots
) -> list[int]:
    """The floor: ranks each canary by the distance of the candidates to a reconstruction.

    Args:
        reconstructions: (t, k, channels, height, width), of which the nearest counts.
        trials: t trials.
        distance: from images (t, N, ...) and reconstructions (t, ...) to (t, N).
        lots: (t,), break ties.

    Returns:
        t ranks.
    """
    of_each = [distance(trials.images, picture) for picture in reconstructions.unbind(1)]
    return rank_of_truth(torch.stack(of_each).amin(0), lots)
