"""Matching distances of many candidates, layer by layer, without holding their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ggl_audit.attack.layers import Outer, Small, parts_of
from ggl_audit.defenses.value_wise import ValueWise
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.model import ClientModel

BLOCK = 2**19
"""Values that are worked on at a time: they stay in a processor's cache while they are."""

SHARING = 8
"""Candidates that are worked on together at least, as the observed gradient is read for each."""

GHOST = 16
"""Multiplications for Gram matrices that cost as much as one value of a gradient that is held."""

Place = tuple[slice, slice]
ALL: Place = (slice(None), slice(None))


class LayerWise:
    """Norms and inner products of replicas of candidates' gradients.

    Args:
        model: the client's; each of its images has a gradient of its own.
        replica: the defense by single values.
    """

    def __init__(self, model: ClientModel, replica: ValueWise) -> None:
        self._model = model
        self._replica = replica

    def products(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms of n replicas, and their inner products with each of t observed gradients.

        Args:
            images: (t, n, channels, height, width) in [0, 1].
            labels: (t, n).
            observed: tensors with a leading dimension t.

        Returns:
            (t, n) and (t, n), in double precision.

        Raises:
            UnknownLayerError: the model's gradients are not known layer by layer.
        """
        readings = self._replica.readings(observed)
        targets = self._model.targets_of(labels.flatten())
        squares = torch.zeros(labels.shape, dtype=torch.double, device=images.device)
        inner = torch.zeros_like(squares)
        for part in parts_of(self._model, images.flatten(0, 1), targets):
            seen, beside = observed[part.name], [reading[part.name] for reading in readings]
            if isinstance(part, Small):
                self._add_small(part, seen, beside, squares, inner)
            elif not readings and _is_cheaper_as_a_ghost(part):
                _add_ghosts(part, seen, squares, inner)
            else:
                self._add_gradients(part, seen, beside, squares, inner)
        norms = squares.sqrt()
        factor = self._replica.factor(norms)
        return norms * factor, inner * factor

    def _add_small(
        self,
        part: Small,
        observed: torch.Tensor,
        readings: list[torch.Tensor],
        squares: torch.Tensor,
        inner: torch.Tensor,
    ) -> None:
        """Adds the squared norms (t, n), and the inner products, of what is held."""
        values = part.values.reshape(*squares.shape, -1)
        beside = [r.reshape(len(r), 1, -1) for r in readings]
        self._add(values, observed.flatten(1), beside, squares, inner, ALL)

    def _add_gradients(
        self,
        part: Outer,
        observed: torch.Tensor,
        readings: list[torch.Tensor],
        squares: torch.Tensor,
        inner: torch.Tensor,
    ) -> None:
        """The same of a weight, whose gradients are computed a block at a time."""
        target = part.matrix(observed)
        beside = [part.matrix(r) if r.ndim > 1 else r[:, None, None, None] for r in readings]
        least = max(part.size, part.positions * part.inputs)
        for place in _blocks(squares.shape, max(SHARING, BLOCK // least)):
            errors, windows = part.factors(squares.shape, place)
            together = max(1, BLOCK // (windows[..., 0, :].numel()))
            for rows in _slices(part.rows, together):
                gradients = _products(errors[:, :, :, rows], windows).flatten(2)
                some = [_rows(tensor[place[0]], rows) for tensor in beside]
                seen = _rows(target[place[0]], rows)[:, 0]
                self._add(gradients, seen, some, squares, inner, place)

    def _add(
        self,
        gradients: torch.Tensor,
        observed: torch.Tensor,
        readings: list[torch.Tensor],
        squares: torch.Tensor,
        inner: torch.Tensor,
        place: Place,
    ) -> None:
        """The same of some values: (t, n, size), (t, size) and (t, 1, size or 1)."""
        replicas = self._replica.on_values(gradients, readings)
        squares[place] += torch.linalg.vector_norm(replicas, dim=2).double().square()
        inner[place] += (replicas @ observed[:, :, None])[..., 0]


def _add_ghosts(
    part: Outer, observed: torch.Tensor, squares: torch.Tensor, inner: torch.Tensor
) -> None:
    """The same of a weight, without its gradients, where they are what is compared."""
    target = part.matrix(observed)
    for place in _blocks(squares.shape, max(SHARING, BLOCK // (part.positions * part.inputs))):
        errors, windows = part.factors(squares.shape, place)
        grams = _products(errors.transpose(3, 4), errors), _products(windows, windows.mT)
        squares[place] += (grams[0] * grams[1]).flatten(2).sum(2)
        trials, candidates, groups, positions, inputs = windows.shape
        together = windows.transpose(1, 2).reshape(trials, groups, -1, inputs)
        along = together @ target[place[0]].mT
        along = along.unflatten(2, (candidates, positions)) * errors.transpose(1, 2).mT
        inner[place] += along.sum((1, 3, 4))


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix products, of which those of a column and a row are faster without a sum."""
    return left * right if left.shape[-1] == 1 else left @ right


def _is_cheaper_as_a_ghost(part: Outer) -> bool:
    return part.positions**2 * (part.inputs + part.rows) < GHOST * part.size


def _rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of each of t tensors, (t, 1, size); of a scalar, (t, 1, 1)."""
    return (tensor if tensor.shape[2] == 1 else tensor[:, :, rows]).flatten(1)[:, None]


def _slices(size: int, together: int) -> Iterator[slice]:
    for start in range(0, size, together):
        yield slice(start, start + together)


def _blocks(shape: torch.Size, together: int) -> Iterator[Place]:
    """Parts of (t, n): of several of the t only with all of the n."""
    for trials in _slices(shape[0], max(1, together // shape[1])):
        for candidates in _slices(shape[1], together):
            yield trials, candidates
