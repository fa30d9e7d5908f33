"""The running statistics that normalizations keep in train mode, and what images make of them.

Batch norm keeps (1 - m) r + m s, with its momentum m, of each channel's running mean and variance
r and of those s of the batch, the variance unbiased (Ioffe and Szegedy, ICML 2015, algorithm 2; as
PyTorch has it). Sent beside the gradient they are observed as it is, and of the first layer they
are the mean image, so what they become is computed for candidates exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ggl_audit.basics.gradient import Gradient
from ggl_audit.inputs.fitting import COUNTER, RUNNING

MEAN, VARIANCE = RUNNING

Batch = dict[str, torch.Tensor]
"""What the layers saw in one forward pass: (calls, 2, channels), means and variances, by layer."""


@dataclass(frozen=True)
class Normalization:
    """A layer that keeps running statistics of what it takes.

    Attributes:
        layer: its name in the model.
        running: (2, channels), the mean and the variance that the client received.
        batches: how many batches these are of.
        momentum: the share of a new batch; None where it is the average over all batches.
        counts: whether it counts batches, as batch norm does and instance norm does not.
        known: whether the running statistics are those that the client received.
    """

    layer: str
    running: torch.Tensor
    batches: int
    momentum: float | None
    counts: bool = True
    known: bool = True

    @property
    def names(self) -> tuple[str, str]:
        """The buffers' names, of the mean and of the variance."""
        return f"{self.layer}.{MEAN}".lstrip("."), f"{self.layer}.{VARIANCE}".lstrip(".")

    @property
    def counter(self) -> str:
        """The name of the buffer that counts batches."""
        return f"{self.layer}.{COUNTER}".lstrip(".")

    def after(self, seen: torch.Tensor) -> torch.Tensor:
        """The running statistics after batches, (2, channels).

        Args:
            seen: (calls, 2, channels), of these batches, one after the other.
        """
        running = self.running
        for number, batch in enumerate(seen, start=self.batches + 1):
            share = 1 / number if self.momentum is None else self.momentum
            running = (1 - share) * running + share * batch
        return running


@dataclass(frozen=True)
class Statistics:
    """The running statistics that are observed beside the parameters.

    Attributes:
        layers: those of the model that keep any.
        names: of the buffers that are observed, counts of batches included where these are scaled
            like the rest.
        rounding: of the changes in the file, squared and relative.
        unit: what changes are multiplied by. Statistics and gradients have no unit in common, and
            neither should drown the other in a distance.
    """

    layers: tuple[Normalization, ...]
    names: tuple[str, ...]
    unit: float = 1.0
    rounding: float = 0.0

    def changes(self, seen: Sequence[Batch]) -> Gradient:
        """What forward passes change of them, before less after, in the unit.

        Args:
            seen: of each forward pass, in turn.
        """
        changed: Gradient = {}
        for layer in self.layers:
            called = [batch[layer.layer] for batch in seen if layer.layer in batch]
            calls = torch.cat(called) if called else layer.running[None][:0]
            before, after = layer.running, layer.after(calls)
            changed |= dict(zip(layer.names, before - after, strict=True))
            changed[layer.counter] = -torch.ones_like(after[0, 0]) * layer.counts * len(calls)
        return {name: self.unit * changed[name] for name in self.names}


def find_normalizations(module: nn.Module, filled: Collection[str]) -> tuple[Normalization, ...]:
    """The layers of a model that keep running statistics, in the modes in which they are.

    Args:
        module: the model.
        filled: names of what its weights were given with.
    """
    return tuple(
        Normalization(
            layer=name,
            running=torch.stack([layer.running_mean, layer.running_var]).detach(),
            batches=int(layer.num_batches_tracked or 0),
            momentum=layer.momentum if isinstance(layer, _BatchNorm) else layer.momentum or 0.0,
            counts=isinstance(layer, _BatchNorm),
            known=f"{name}.{MEAN}".lstrip(".") in filled,
        )
        for name, layer in module.named_modules()
        if isinstance(layer, (_BatchNorm, _InstanceNorm))
        and layer.training
        and layer.running_mean is not None
        and layer.running_var is not None
    )


@contextmanager
def batches_seen(module: nn.Module, statistics: Statistics | None) -> Iterator[Batch]:
    """Notes what the layers that keep statistics take in a forward pass."""
    seen: dict[str, list[torch.Tensor]] = {}
    noted: Batch = {}
    layers = () if statistics is None else statistics.layers

    def note(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        by_image = isinstance(layer, _InstanceNorm)

        def look(_: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            seen.setdefault(name, []).append(_moments(arguments[0], by_image))

        return layer.register_forward_pre_hook(look)

    hooks = [note(one.layer, module.get_submodule(one.layer)) for one in layers]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
    noted.update({name: torch.stack(calls) for name, calls in seen.items()})


def _moments(taken: torch.Tensor, by_image: bool) -> torch.Tensor:
    """The mean and the unbiased variance of each channel, (2, channels)."""
    places = [axis for axis in range(taken.ndim) if axis > 1]
    axes = places if by_image else [0, *places]
    moments = torch.stack([taken.mean(axes), taken.var(axes)])
    return moments.mean(1) if by_image else moments
