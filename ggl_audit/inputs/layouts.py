"""How tensors lie in files of Keras, TensorFlow and JAX, which have the channels last.

There kernels are (height, width, in, out) and dense layers (in, out), where PyTorch has (out, in,
height, width) and (out, in). A dense layer that takes a flattened feature map has its inputs in the
order height, width, channel there, and channel, height, width here: which layers these are is found
by following images through the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ggl_audit.basics.gradient import Gradient

Sizes = tuple[int, ...]

CHANNELS_LAST = "channels_last"

MOVES = frozenset(
    {
        *("flatten", "unflatten", "ravel", "reshape", "view", "permute", "transpose", "movedim"),
        *("moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "select", "slice"),
        *("__getitem__", "chunk", "split", "tensor_split", "unbind"),
    }
)
"""Operators that only move values: what they do to a feature map, they do to its places."""

JOINS = frozenset({"cat", "concat", "concatenate"})

MIXES = frozenset(
    {
        *("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
        *("scaled_dot_product_attention", "embedding", "__get__"),
    }
)
"""Operators whose output is in no order of their input, though it may be of its shape."""

NORMALIZATIONS = frozenset({"batch_norm", "layer_norm", "instance_norm", "group_norm"})


def swapped(shape: Sizes) -> Sizes:
    """The shape of a kernel or of a dense layer of the model, with channels last."""
    return (*shape[2:], *reversed(shape[:2]))


def look_channels_last(shapes: Iterable[tuple[Sizes, Sizes]]) -> bool:
    """Whether all tensors of a file fit those of a model with channels last, and not without.

    Args:
        shapes: of each in the file and in the model.
    """
    pairs = list(shapes)
    return any(found != expected for found, expected in pairs) and all(
        found == (swapped(expected) if len(expected) > 1 else expected)
        or (len(expected) > 2 and expected[1] == 1 and _is_depthwise(found, expected))
        for found, expected in pairs
    )


def _is_depthwise(found: Sizes, expected: Sizes) -> bool:
    """Whether a shape is that of a depthwise kernel of Keras: (height, width, in, multiplier)."""
    if len(found) != len(expected):
        return False
    *window, channels, multiplier = found
    return tuple(window) == expected[2:] and channels * multiplier == expected[0]


@dataclass(frozen=True)
class Arrangement:
    """How a tensor of the model lies in a file with channels last.

    Attributes:
        shape: in the model.
        kind: a convolution's kernel, a dense layer's weight, or values that are in the same order
            but for their places.
        shapes: that it may have in the file.
        places: of the inputs of a dense layer, or of the values, in the file; None where they are
            in the same order.
    """

    shape: Sizes
    kind: Literal["kernel", "dense", "values"]
    shapes: tuple[Sizes, ...]
    places: torch.Tensor | None = None

    def restore(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the model has it.

        Args:
            tensor: of one of ``shapes``.
        """
        match self.kind:
            case "kernel":
                *window, first, last = range(tensor.ndim)
                plain = tuple(tensor.shape) == self.shapes[0]
                axes = (last, first) if plain else (first, last)
                return tensor.permute(*axes, *window).reshape(self.shape)
            case "dense":
                return tensor.T if self.places is None else tensor.T[:, self.places]
        return tensor if self.places is None else tensor.flatten()[self.places]


Arrangements = dict[str, Arrangement]


def trace_arrangements(module: nn.Module, images: torch.Tensor) -> Arrangements:
    """Finds how the tensors of a model lie in a file with channels last.

    Args:
        module: which is left as it is.
        images: (n, channels, height, width), as it takes them.

    Returns:
        The arrangement of each tensor that a convolution, a linear layer, an embedding or a
        normalization uses, by name, tied ones by their first name.
    """
    module = copy.deepcopy(module)
    for layer in module.modules():
        layer.training = False
    following = _Following(module, images)
    with torch.no_grad(), following:
        module(images)
    return following.found


def flattened(arrangements: Arrangements) -> Gradient:
    """The places of the inputs of each dense layer that takes a flattened map, by its weight."""
    return {
        name: arrangement.places
        for name, arrangement in arrangements.items()
        if arrangement.kind == "dense" and arrangement.places is not None
    }


class _Following(TorchFunctionMode):
    """Keeps for each feature map the place that each of its values has with channels last."""

    def __init__(self, module: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        held = [*module.named_parameters(), *module.named_buffers()]
        self._names = {id(tensor): name for name, tensor in held}
        self._places: dict[int, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []
        self.found: dict[str, Arrangement] = {}
        self._follow(images, _channels_first(images.shape))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "").partition(".")[0]
        tensors, results = _tensors([*args, *kwargs.values()]), _tensors([result])
        if not tensors or not results:
            return result
        self._note(name, tensors)
        if name in MOVES and any(self._of(tensor) is not None for tensor in tensors):
            own = dict(zip(kwargs, self._replaced(kwargs.values()), strict=True))
            moved: list[torch.Tensor | None] = [*_tensors([function(*self._replaced(args), **own)])]
        else:
            moved = [self._kept_in_order(name, tensors, part) for part in results]
        for part, places in zip(results, moved, strict=True):
            if places is not None:
                self._follow(part, places)
        return result

    def _follow(self, tensor: torch.Tensor, places: torch.Tensor) -> None:
        self._kept.append(tensor)  # an id is of one tensor as long as it is there
        self._places[id(tensor)] = places.contiguous()

    def _of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self._places.get(id(tensor))

    def _kept_in_order(
        self, name: str, tensors: list[torch.Tensor], result: torch.Tensor
    ) -> torch.Tensor | None:
        """The places of the values of a result, None where it is not in the order of a map."""
        if name.startswith(("conv", "_conv")):
            return _channels_first(result.shape)
        followed = [own for tensor in tensors if (own := self._of(tensor)) is not None]
        if not followed:
            return None
        if name in JOINS and result.ndim == 2:
            return self._joined(tensors, result)
        if name not in MIXES and followed[0].shape == result.shape:
            return followed[0]
        if result.ndim > 2 and result.ndim == followed[0].ndim:
            return _in_the_order_of(followed[0], result.shape)
        return None

    def _replaced(self, arguments: Iterable[Any]) -> list[Any]:
        own = [(a, self._of(a) if isinstance(a, torch.Tensor) else None) for a in arguments]
        return [argument if places is None else places for argument, places in own]

    def _joined(self, tensors: list[torch.Tensor], result: torch.Tensor) -> torch.Tensor | None:
        parts, start = [], 0
        for tensor in tensors:
            places = self._of(tensor)
            own = torch.arange(tensor.shape[1]).expand(tensor.shape) if places is None else places
            parts.append(start + own)
            start += tensor.shape[1]
        joined = torch.cat(parts, dim=1)
        return joined if joined.shape == result.shape else None

    def _note(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Notes how the weights of a layer lie."""
        taken = self._of(tensors[0])
        own = [(self._names[id(t)], t) for t in tensors[1:] if id(t) in self._names]
        for key, tensor in own:
            shape = tuple(tensor.shape)
            if name.startswith(("conv", "_conv")) and len(shape) > 2:
                shapes = [swapped(shape)]
                if shape[1] == 1:
                    channels = tensors[0].shape[1]
                    shapes.append((*shape[2:], channels, shape[0] // channels))
                self.found[key] = Arrangement(shape, "kernel", tuple(shapes))
            elif name == "linear" and len(shape) == 2:
                places = None if taken is None else _ranks(taken, shape[1:])
                self.found[key] = Arrangement(shape, "dense", (swapped(shape),), places)
            elif name in NORMALIZATIONS:
                places = None if taken is None else _ranks(taken, shape)
                there = shape if places is None else (*shape[1:], shape[0])
                self.found[key] = Arrangement(shape, "values", (there,), places)
            elif name == "embedding":
                self.found[key] = Arrangement(shape, "values", (shape,))
        if name == "embedding" and id(tensors[0]) in self._names:
            key, shape = self._names[id(tensors[0])], tuple(tensors[0].shape)
            self.found[key] = Arrangement(shape, "values", (shape,))


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        parts = value if isinstance(value, (list, tuple)) else [value]
        found += [part for part in parts if isinstance(part, torch.Tensor)]
    return found


def _channels_first(shape: Sizes) -> torch.Tensor:
    """The places of the values of a map (n, channels, ...)."""
    batch, channels, *rest = shape
    places = torch.arange(channels * math.prod(rest)).reshape(*rest, channels)
    return places.movedim(-1, 0).expand(batch, channels, *rest)


def _in_the_order_of(places: torch.Tensor, shape: Sizes) -> torch.Tensor:
    """The places of the values of a map that has its channels where another has them."""
    if 1 in places.shape[1:]:
        return _channels_first(shape)
    first = places[0]
    origin, axes = first[(0,) * first.ndim], range(first.ndim)
    steps = [int(first.select(axis, 1)[(0,) * (first.ndim - 1)] - origin) for axis in axes]
    outermost = sorted(axes, key=lambda axis: -steps[axis])
    sizes = [shape[1 + axis] for axis in outermost]
    new = torch.arange(math.prod(sizes)).reshape(sizes)
    return new.permute([outermost.index(axis) for axis in axes]).expand(shape)


def _ranks(places: torch.Tensor, shape: Sizes) -> torch.Tensor | None:
    """Where each of the values that a layer weighs stands with channels last.

    Returns:
        None where they are in the same order, or in several.
    """
    if places[0].numel() % max(1, math.prod(shape)) or (
        tuple(places.shape[-len(shape) :]) != shape
    ):
        return None
    rows = places[0].reshape(-1, *shape).flatten(1)
    ranks = rows.argsort(dim=1).argsort(dim=1)
    plain = torch.arange(ranks.shape[1])
    if bool((ranks == plain).all()) or bool((ranks != ranks[0]).any()):
        return None
    return ranks[0].reshape(shape)
