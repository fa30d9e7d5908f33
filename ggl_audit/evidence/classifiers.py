"""Which of several values has an image, as its label, by what was sent of it: the classifiers.

They are learned on one part of the public images, the best of them is chosen on another, and it is
measured on canaries of a third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient

FEWEST_IMAGES = 8
"""Of a value, which are divided into three parts."""

MOST_VALUES = 32
LEARNED, CHOSEN_ON = 256, 64
"""Images of all values together at most."""

LEARNED_BY_CANARY = 8
"""Images that are learned from for each canary at most, and one is chosen on."""

SIGNS_SEED = 0


@dataclass(frozen=True)
class Parts:
    """Public images in three parts, of which each has all values.

    Attributes:
        values: those that are told apart, in ascending order.
        learned: (n,), indices of the images that classifiers are learned from.
        chosen_on: (m,), of those that one is chosen on.
        canaries: (t,), of those that it is measured on, in the order of trials: round by round each
            value once, in an order drawn anew, so that a guess that takes no notice of what was
            sent is right for one of so many values, however many trials there are.
    """

    values: list[int]
    learned: torch.Tensor
    chosen_on: torch.Tensor
    canaries: torch.Tensor

    @property
    def chance(self) -> float:
        """The success probability of guessing."""
        return 1 / len(self.values)


def divide(values: torch.Tensor, most: int, random: np.random.Generator) -> Parts | None:
    """Divides public images into three parts.

    Half of the images of the rarest value is left for canaries at the most; of the rest a quarter
    is chosen on, and both are fewer where canaries are few. Values of fewer than 8 images are left
    out, and of more than 32 values as many are drawn.

    Args:
        values: (n,), of the images.
        most: canaries.
        random: decides.

    Returns:
        None where fewer than two values are left.
    """
    own = values.cpu().numpy()
    kept = [int(value) for value in np.unique(own) if (own == value).sum() >= FEWEST_IMAGES]
    kept = sorted(random.permutation(kept)[:MOST_VALUES].tolist())
    if len(kept) < 2:
        return None
    images = {value: random.permutation(np.flatnonzero(own == value)) for value in kept}
    rounds = min(-(-most // len(kept)), min(map(len, images.values())) // 2)
    learned: list[int] = []
    chosen_on: list[int] = []
    for own_images in images.values():
        rest = own_images[rounds:]
        fewer = max(1, min(min(CHOSEN_ON, most) // len(kept), len(rest) // 4))
        chosen_on += rest[:fewer].tolist()
        own_learned = max(2, min(LEARNED, LEARNED_BY_CANARY * most) // len(kept))
        learned += rest[fewer : fewer + own_learned].tolist()
    canaries = [
        int(images[value][number])
        for number in range(rounds)
        for value in random.permutation(kept).tolist()
    ]
    device = values.device
    return Parts(
        values=kept,
        learned=torch.tensor(learned, device=device),
        chosen_on=torch.tensor(chosen_on, device=device),
        canaries=torch.tensor(canaries[:most], device=device),
    )


class Projection:
    """Makes rows of features out of gradients, few enough to learn from.

    Where there are more values than that, half of the features are the last values as they are,
    which belong to the layers nearest to the loss; each of the others adds up equally many values
    with random signs, over the root of their number (a count sketch: Charikar, Chen and
    Farach-Colton, ICALP 2002). So independent noise on the values stays what it was.

    Args:
        size: values of a gradient.
        most: features.
    """

    def __init__(self, size: int, most: int) -> None:
        self.size = min(size, max(2, most))
        self._whole = self.size if size <= self.size else self.size // 2
        self._sketched = size - self._whole
        generator = torch.Generator().manual_seed(SIGNS_SEED)
        signs = torch.randint(2, (self._sketched,), generator=generator, dtype=torch.int8)
        self._signs = 2 * signs - 1

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The features of n gradients, (n, features), in the widest floating point of their device.

        Args:
            values: (n, size).
        """
        last = widened(values[:, self._sketched :])
        if self._sketched == 0:
            return last
        width = self.size - self._whole
        signed = values[:, : self._sketched] * self._signs.to(values.device)
        count = -(-self._sketched // width)
        padded = torch.nn.functional.pad(signed, (0, count * width - self._sketched))
        sums = padded.unflatten(1, (count, width)).sum(1, dtype=last.dtype)
        added = torch.full((width,), float(count), dtype=last.dtype, device=values.device)
        added[self._sketched - (count - 1) * width :] -= 1
        return torch.cat([sums / added.sqrt(), last], dim=1)


def spreads(observed: Gradient) -> torch.Tensor:
    """How large the values of t releases are, which linear functions of them do not tell.

    Args:
        observed: k tensors with a leading dimension t.

    Returns:
        (t, 2k + 2), the logarithms of the root mean square and of the mean magnitude, of each
        tensor and of the whole.
    """
    parts = [widened(tensor.flatten(1)) for tensor in observed.values()]
    sums = [(part.square().sum(1), part.abs().sum(1), part.shape[1]) for part in parts]
    squares, magnitudes, counts = zip(*sums, strict=True)
    whole = sum(squares), sum(magnitudes), sum(counts)
    columns = [
        column
        for square, magnitude, count in [*sums, whole]
        for column in ((square / count).sqrt(), magnitude / count)
    ]
    return torch.stack(columns, dim=1).clamp(min=1e-30).log()


class LinearClassifier:
    """Tells values by linear functions of what was sent: Fisher's discriminant, regularized.

    The covariance within a value is that of the images learned from, and beside it that of the
    noise, which is known and need not be learned, and a ridge.

    Args:
        features: (n, d), as :class:`Projection` gives them, of gradients before noise or with it.
        numbers: (n,), of their values, from 0.
        noise: the standard deviation of the noise that is not in the features.
        ridge: in the mean variance of a gradient's length within a value.
    """

    def __init__(
        self, features: torch.Tensor, numbers: torch.Tensor, noise: float, ridge: float
    ) -> None:
        count = int(numbers.max()) + 1
        means = torch.stack([features[numbers == number].mean(0) for number in range(count)])
        within = (features - means[numbers]) / max(1, len(features) - count) ** 0.5
        products = within @ within.T
        least = noise**2 + ridge * float(products.diagonal().mean())
        least = max(least, 1e-12 * float(means.square().sum(1).mean()), 1e-300)
        # The inverse of a covariance of d values by that of n images (Woodbury).
        inner = products + least * torch.eye(len(products)).to(products)
        solved = torch.linalg.solve(inner, within @ means.T)
        self._weights = (means - solved.T @ within) / least
        self._offsets = (self._weights * means).sum(1) / 2

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """How well each value explains each of t gradients, (t, values).

        Args:
            features: (t, d).
        """
        scores: torch.Tensor = features @ self._weights.T - self._offsets
        return scores


def mixture_scores(log_likelihoods: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The log-likelihood of each value, averaged over public images that have it.

    Args:
        log_likelihoods: (t, n), of each of t releases with each of n images in it.
        numbers: (n,), of the images' values, from 0.

    Returns:
        (t, values), up to a constant for each release.
    """
    columns = [log_likelihoods[:, numbers == number] for number in range(int(numbers.max()) + 1)]
    return torch.stack([c.logsumexp(1) - np.log(c.shape[1]) for c in columns], dim=1)


def nearest_scores(distances: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """How near the nearest public image of each value is to each of t releases.

    Args:
        distances: (t, n).
        numbers: (n,), of the images' values, from 0.

    Returns:
        (t, values), the larger the nearer.
    """
    columns = [distances[:, numbers == number] for number in range(int(numbers.max()) + 1)]
    return torch.stack([-column.amin(1) for column in columns], dim=1)


def guess(scores: torch.Tensor, lots: Sequence[float]) -> list[int]:
    """The number of the value with the highest score for each of t releases.

    Args:
        scores: (t, values); what is not a number counts least.
        lots: (t,), drawn evenly from [0, 1), which break ties.
    """
    table = np.nan_to_num(scores.cpu().double().numpy(), nan=-np.inf, neginf=-np.inf)
    best = [np.flatnonzero(row == row.max()) for row in table]
    return [int(own[int(lot * len(own))]) for own, lot in zip(best, lots, strict=True)]


def best_of(hits: Mapping[str, Sequence[bool]]) -> str:
    """The classifier that is right most often; of several the first.

    Args:
        hits: whether each was right, release by release.
    """
    return max(hits, key=lambda name: sum(hits[name]))
