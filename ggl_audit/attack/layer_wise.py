"""Matching distances of many candidates, layer by layer, without holding their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ggl_audit.attack.layers import Outer, Part, Small, parts_of
from ggl_audit.defenses.value_wise import ValueWise
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.model import ClientModel

BLOCK = 2**19
"""Values that are worked on at a time: they stay in a processor's cache while they are."""

SHARING = 8
"""Candidates that are worked on together at least, as the observed gradient is read for each."""

GHOST = 16
"""Multiplications for Gram matrices that cost as much as one value of a gradient that is held."""

COPIES_OF_A_LAYER = 4
"""What its layers are given and return, the gradient of both, and what is between them."""

TRIED = 3
"""Images; more than the layers of a model are likely to confuse with another dimension."""

Place = tuple[slice, slice]
ALL: Place = (slice(None), slice(None))


class LayerWise:
    """Norms and inner products of replicas of candidates' gradients.

    Args:
        model: the client's; each of its images has a gradient of its own.
        replica: the defense by single values.
        layout: of the images in memory.
        chunk: how many candidates to take at a time.
    """

    def __init__(
        self,
        model: ClientModel,
        replica: ValueWise,
        layout: torch.memory_format,
        chunk: int,
    ) -> None:
        self._model = model
        self._replica = replica
        self._layout = layout
        self.chunk = chunk

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
        squares = torch.zeros(labels.shape, dtype=torch.double, device=images.device)
        inner = torch.zeros_like(squares)
        for place in _blocks(labels.shape, self.chunk):
            seen = {name: tensor[place[0]] for name, tensor in observed.items()}
            with torch.no_grad():
                self._sum_up(images[place], labels[place], seen, squares[place], inner[place])
        norms = squares.sqrt()
        factor = self._replica.factor(norms)
        return norms * factor, inner * factor

    def _sum_up(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        squares: torch.Tensor,
        inner: torch.Tensor,
    ) -> None:
        """Adds the squared norms (t, n), and the inner products, of all tensors."""
        readings = self._replica.readings(observed)
        targets = self._model.targets_of(labels.flatten())
        together = images.flatten(0, 1).contiguous(memory_format=self._layout)
        for part in parts_of(self._model, together, targets):
            seen, beside = observed[part.name], [reading[part.name] for reading in readings]
            if isinstance(part, Small):
                self._add_small(part, seen, beside, squares, inner)
            elif not readings and _is_cheaper_as_a_ghost(part):
                _add_ghosts(part, seen, squares, inner)
            else:
                self._add_gradients(part, seen, beside, squares, inner)

    def _add_small(
        self,
        part: Small,
        observed: torch.Tensor,
        readings: list[torch.Tensor],
        squares: torch.Tensor,
        inner: torch.Tensor,
    ) -> None:
        """The same of what is held."""
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


def layer_wise(
    model: ClientModel,
    replica: ValueWise | None,
    gradients: Callable[[torch.Tensor, torch.Tensor], Gradient],
    memory: int,
) -> LayerWise | None:
    """The way layer by layer, or None where it is not known to be exact.

    It is tried on random images: each tensor's gradients must be those that are computed whole.

    Args:
        model: the client's.
        replica: the defense by single values; None where it is more.
        gradients: computes those of n images and labels, whole.
        memory: bytes that may be held at a time.
    """
    if replica is None or model.batch_size > 1 or model.local is not None:
        return None
    random = torch.Generator().manual_seed(0)
    images = torch.rand(TRIED, *model.shape, generator=random).to(model.mean)
    labels = torch.arange(TRIED, device=model.device) % model.classes
    expected = gradients(images, labels)
    # A model that takes views of its activations does not take every layout.
    for layout in (torch.channels_last, torch.contiguous_format):
        given = images.contiguous(memory_format=layout)
        parts = _tried(model, given, labels)
        if parts and all(part.is_of(expected[part.name]) for part in parts):
            bytes_each = COPIES_OF_A_LAYER * sum(part.bytes_held for part in parts) // TRIED
            return LayerWise(model, replica, layout, max(1, memory // bytes_each))
    return None


def _tried(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> list[Part]:
    """The gradients layer by layer; nothing where they are not known."""
    try:
        return list(parts_of(model, images, model.targets_of(labels)))
    except (Exception, SystemExit):
        return []  # the forward pass is the user's own code


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
