"""Matching distances of many candidates, layer by layer, without holding their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.func import vmap

from ggl_audit.attack.layers import Outer, Part, parts_of, products, slices
from ggl_audit.basics.device import widest_float
from ggl_audit.basics.gradient import Gradient, norm
from ggl_audit.defenses.value_wise import ValueWise
from ggl_audit.inputs.model import ClientModel

BLOCK = 2**21
"""Values that are worked on at a time: they stay in a processor's cache while they are. An
accelerator works on as many as fit, as each call of it costs the same."""

SHARING = 8
"""Candidates that are worked on together at least, as the observed gradient is read for each."""

NEAR = 1e-2
"""Relative l2 below which a difference of sums has too few digits."""

COPIES_OF_A_LAYER = 3
"""What its layers are given and return, the gradient of both, and a block of the weight's."""

BYTES_OF_A_BLOCK = 16
"""Of each value: its gradient, the replica, and what two steps of a comparison take."""

TRIED = 3
"""Images; more than the layers of a model are likely to confuse with another dimension."""

Place = tuple[slice, slice]


class LayerWise:
    """Distances of replicas of candidates' gradients from observed ones.

    A distance takes no more than the norm of a replica and its inner product with what was
    observed, or the norm of their difference, which are summed up over layers.

    Args:
        model: the client's; each of its images has a gradient of its own.
        replica: the defense by single values.
        cosine: whether the distance is one minus the cosine, and not the relative squared l2.
        chunk: how many candidates to take at a time.
        together: how many can be held together, layer by layer.
        block: values of a layer's gradients that are held at a time.
        ghosts: whether some layers' gradients are not computed in a sum of norms.
    """

    def __init__(
        self,
        model: ClientModel,
        replica: ValueWise,
        cosine: bool,
        chunk: int,
        together: int,
        block: int,
        ghosts: bool,
    ) -> None:
        self._model = model
        self._replica = replica
        self._cosine = cosine
        self._summed = cosine or ghosts or bool(replica.scalings)
        self.chunk = chunk
        self._together = together
        self._block = block
        self._sums = widest_float(model.device)

    def holds(self, candidates: int) -> bool:
        """Whether so many candidates can be compared with each other."""
        return candidates <= min(self.chunk, self._together)

    def distances(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> torch.Tensor:
        """The distances of n candidates to each of t observed gradients, every one its own n.

        Args:
            images: (t, n, channels, height, width) in [0, 1].
            labels: (t, n).
            observed: tensors with a leading dimension t.

        Returns:
            (t, n).
        """
        found = torch.empty(labels.shape, dtype=self._sums, device=images.device)
        for place in _blocks(labels.shape, self.chunk):
            seen = {name: tensor[place[0]] for name, tensor in observed.items()}
            with torch.no_grad():
                found[place] = self._of_chunk(images[place], labels[place], seen)
        return found.to(images.dtype)

    def residual_products(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compares n candidates with each of t observed gradients, and with each other.

        Args:
            images: (t, n, channels, height, width) in [0, 1].
            labels: (t, n), as many as it :meth:`holds`.
            observed: tensors with a leading dimension t.

        Returns:
            The distances (t, n), and the inner products (t, n, n) of what the first candidate
            leaves of the observed gradient, and what the others leave less that.
        """
        parts = []
        for place in _blocks(labels.shape, self.chunk):
            seen = {name: tensor[place[0]] for name, tensor in observed.items()}
            with torch.no_grad():
                parts.append(self._residual_products(images[place], labels[place], seen))
        distances, table = (
            torch.cat(column).to(images.dtype) for column in zip(*parts, strict=True)
        )
        return distances, table

    def _residual_products(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = _lengths(observed)
        norms, factor = torch.ones_like(lengths), None
        if self._cosine or self._replica.scalings:
            norms = self._products(images, labels, observed)[0].sqrt()
            directions = lengths / norms.clamp(min=1e-30)
            factor = directions if self._cosine else self._replica.factor(norms)
        count = labels.shape[1]
        table = torch.zeros(*labels.shape, count, dtype=self._sums, device=images.device)
        readings = self._replica.readings(observed)
        for part in self._parts(images, labels):
            for place, left, seen in self._replicas(
                part, labels.shape, observed, readings, least=count
            ):
                if factor is not None:
                    left.mul_(factor[place][..., None])
                left[:, 1:] -= left[:, :1]
                left[:, :1] -= seen
                table[place[0]] += left @ left.mT
            table[:, 0, 0] += part.unseen(observed[part.name])
        table /= (2 if self._cosine else 1) * lengths.square()[..., None]
        first = table[:, :1, 0]
        others = table.diagonal(dim1=1, dim2=2)[:, 1:] + 2 * table[:, 0, 1:] + first
        distances = torch.cat([first, others], dim=1)
        return distances.masked_fill(norms == 0, 1), table  # nothing has no direction

    def _of_chunk(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> torch.Tensor:
        lengths = _lengths(observed)
        if not self._summed:
            return self._differences(images, labels, observed, None) / lengths.square()
        squares, inner = self._products(images, labels, observed)
        norms = squares.sqrt()
        factor = self._replica.factor(norms)
        norms, inner = norms * factor, inner * factor
        if self._cosine:
            return 1 - inner / (norms * lengths).clamp(min=1e-30)
        distances = (norms.square() - 2 * inner) / lengths.square() + 1
        # The difference of large sums has too few digits there.
        for trial, near in enumerate(distances < NEAR):
            if near.any():
                seen = {name: tensor[trial, None] for name, tensor in observed.items()}
                candidates = images[trial, near][None], labels[trial, near][None]
                exact = self._differences(*candidates, seen, factor[trial, near][None])
                distances[trial, near] = exact[0] / lengths[trial].square()
        return distances

    def _products(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared norms (t, n) of replicas before they are scaled, and the inner products."""
        squares = torch.zeros(labels.shape, dtype=self._sums, device=images.device)
        inner = torch.zeros_like(squares)
        readings = self._replica.readings(observed)
        for part in self._parts(images, labels):
            ghost = None if readings else part.as_ghost()
            if ghost is not None:
                _add_ghosts(ghost, observed[part.name], squares, inner, self._block)
                continue
            for place, replicas, seen in self._replicas(part, labels.shape, observed, readings):
                squares[place] += _squares(replicas)
                inner[place] += (replicas @ seen.transpose(1, 2))[..., 0]
        return squares, inner

    def _differences(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        factor: torch.Tensor | None,
    ) -> torch.Tensor:
        """The squared norms (t, n) of replicas, multiplied by factors (t, n), less the observed."""
        squares = torch.zeros(labels.shape, dtype=self._sums, device=images.device)
        readings = self._replica.readings(observed)
        for part in self._parts(images, labels):
            for place, replicas, seen in self._replicas(part, labels.shape, observed, readings):
                if factor is not None:
                    replicas.mul_(factor[place][..., None])
                squares[place] += _squares(replicas.sub_(seen))
            squares += part.unseen(observed[part.name])[:, None]
        return squares

    def _parts(self, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Part]:
        targets = self._model.targets_of(labels.flatten())
        return parts_of(self._model, images.flatten(0, 1), targets)

    def _replicas(
        self,
        part: Part,
        shape: torch.Size,
        observed: Gradient,
        readings: Sequence[Gradient],
        least: int = SHARING,
    ) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor]]:
        """Replicas of one tensor's gradients of (t, n) candidates, a block of least so many.

        Yields:
            Which candidates; (t, n, size) of their replicas, which may be written over; (t, 1,
            size) of what was observed.
        """
        target = part.matrix(observed[part.name])
        own = [reading[part.name] for reading in readings]
        beside = [part.matrix(r) if r.ndim > 1 else r[:, None, None, None] for r in own]
        for place in _blocks(shape, max(least, self._block // part.size_held)):
            for rows, gradients in part.gradients(shape, place, self._block):
                some = [_rows(tensor[place[0]], rows) for tensor in beside]
                values = self._replica.on_values(gradients.flatten(2), some)
                yield place, values, _rows(target[place[0]], rows)


def _lengths(observed: Gradient) -> torch.Tensor:
    """The norms (t, 1) of what was observed."""
    lengths = vmap(norm)(observed)
    return lengths.to(widest_float(lengths.device))[:, None].clamp(min=1e-30)


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Squared norms (t, n) of values (t, n, size)."""
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=2)
    return norms.to(widest_float(norms.device)).square()


def layer_wise(
    model: ClientModel,
    replica: ValueWise | None,
    cosine: bool,
    gradients: Callable[[torch.Tensor, torch.Tensor], Gradient],
    memory: int,
) -> LayerWise | None:
    """The way layer by layer, or None where it is not known to be exact.

    It is tried on random images: each tensor's gradients must be those that are computed whole.

    Args:
        model: the client's.
        replica: the defense by single values; None where it is more.
        cosine: whether the distance is one minus the cosine.
        gradients: computes those of n images and labels, whole.
        memory: bytes that may be held at a time.
    """
    if replica is None or model.batch_size > 1 or model.local is not None:
        return None
    random = torch.Generator().manual_seed(0)
    images = torch.rand(TRIED, *model.shape, generator=random).to(model.mean)
    labels = torch.arange(TRIED, device=model.device) % model.classes
    expected = gradients(images, labels)
    for arranged in _arrangements(model):
        parts = _tried(arranged, images, labels)
        if parts and all(part.is_of(expected[part.name]) for part in parts):
            break
    else:
        return None
    ghosts = not replica.steps and any(part.as_ghost() is not None for part in parts)
    bytes_each = COPIES_OF_A_LAYER * sum(part.bytes_held for part in parts) // TRIED
    together = memory // (4 * max(part.size_of_factors for part in parts))
    # Half for the layers, and half for a block of replicas with what is compared.
    block = BLOCK if model.device.type == "cpu" else max(BLOCK, memory // (2 * BYTES_OF_A_BLOCK))
    chunk = max(1, memory // bytes_each)
    return LayerWise(arranged, replica, cosine, chunk, together, block, ghosts)


def _arrangements(model: ClientModel) -> Iterator[ClientModel]:
    """The model with its kernels laid out as they may be used, the fastest first."""
    if model.device.type == "cpu":
        # What a convolution returns is laid out as its kernel is. Not every model takes that.
        kernels = {
            name: tensor.to(memory_format=torch.channels_last)
            for name, tensor in model.parameters.items()
            if tensor.ndim == 4
        }
        if kernels:
            yield replace(model, parameters={**model.parameters, **kernels})
    yield model


def _tried(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> list[Part]:
    """The gradients layer by layer; nothing where they are not known."""
    try:
        return list(parts_of(model, images, model.targets_of(labels)))
    except (Exception, SystemExit):
        return []  # the forward pass is the user's own code


def _add_ghosts(
    part: Outer, observed: torch.Tensor, squares: torch.Tensor, inner: torch.Tensor, block: int
) -> None:
    """Adds a weight's part in squared norms and inner products (t, n), without its gradients."""
    target = part.matrix(observed)
    for place in _blocks(squares.shape, max(SHARING, block // (part.positions * part.inputs))):
        errors, windows = part.factors(squares.shape, place)
        grams = products(errors.mT, errors), products(windows, windows.mT)
        squares[place] += (grams[0] * grams[1]).flatten(2).sum(2)
        trials, candidates, groups, positions, inputs = windows.shape
        together = windows.transpose(1, 2).reshape(trials, groups, -1, inputs)
        along = together @ target[place[0]].mT
        along = along.unflatten(2, (candidates, positions)) * errors.transpose(1, 2).mT
        inner[place] += along.sum((1, 3, 4))


def _rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of each of t tensors, (t, 1, size); of a scalar, (t, 1, 1)."""
    return (tensor if tensor.shape[2] == 1 else tensor[:, :, rows]).flatten(1)[:, None]


def _blocks(shape: torch.Size, together: int) -> Iterator[Place]:
    """Parts of (t, n): of several of the t only with all of the n."""
    for trials in slices(shape[0], max(1, together // shape[1])):
        for candidates in slices(shape[1], together):
            yield trials, candidates
