"""A gradient: tensors by parameter name, in the order of ``named_parameters()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ggl_audit.basics.device import widened

Gradient = dict[str, torch.Tensor]


def norm(gradient: Gradient) -> torch.Tensor:
    """The l2 norm of the whole gradient, a scalar."""
    # vector_norm makes no squared copy, which the batched objective would spend its time on.
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in gradient.values()])
    whole: torch.Tensor = torch.linalg.vector_norm(norms)
    return whole


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a tensor's values, a scalar."""
    # Copies nothing, where magnitudes take 20 times as long mapped over large tensors.
    return torch.maximum(tensor.amax(), -tensor.amin())


def each(function: Callable[[torch.Tensor], torch.Tensor], gradient: Gradient) -> Gradient:
    """Applies a function to each tensor."""
    return {name: function(tensor) for name, tensor in gradient.items()}


def flat(gradient: Gradient) -> torch.Tensor:
    """All values in one row, (size,)."""
    return torch.cat([tensor.reshape(-1) for tensor in gradient.values()])


def added(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of gradients."""
    if len(gradients) == 1:
        return gradients[0]
    return {name: torch.stack([g[name] for g in gradients]).sum(0) for name in gradients[0]}


def rows(gradients: Iterable[Gradient], count: int) -> torch.Tensor:
    """All values of each of so many gradients in a row of its own, (count, size)."""
    table: torch.Tensor | None = None
    for place, gradient in enumerate(gradients):
        row = flat(gradient)
        # They come one by one, and are never held twice.
        table = row.new_empty(count, len(row)) if table is None else table
        table[place] = row
    assert table is not None
    return table


def stack(gradients: Sequence[Gradient]) -> Gradient:
    """Stacks n gradients into one whose tensors have a leading dimension n."""
    return {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}


def concatenate(stacks: Sequence[Gradient]) -> Gradient:
    """Joins stacks along their leading dimension."""
    return {name: torch.cat([gradients[name] for gradients in stacks]) for name in stacks[0]}


def repeated(gradients: Gradient, times: int) -> Gradient:
    """Each gradient of a stack so many times in a row."""
    return each(lambda tensor: tensor.repeat_interleave(times, dim=0), gradients)


def shares(gradients: Gradient) -> torch.Tensor:
    """The share of each of k tensors in the squared norm of each of t gradients, (t, k)."""
    squares = [widened(t.reshape(len(t), -1)).square().sum(1) for t in gradients.values()]
    table = torch.stack(squares, dim=1)
    return table / table.sum(1, keepdim=True).clamp(min=1e-300)


def take(gradients: Gradient, index: int) -> Gradient:
    """One gradient of a stack."""
    return {name: tensor[index] for name, tensor in gradients.items()}


def unstack(gradients: Gradient) -> list[Gradient]:
    """The gradients of a stack."""
    count = len(next(iter(gradients.values())))
    return [take(gradients, index) for index in range(count)]
