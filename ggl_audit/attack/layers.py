"""The gradients of many candidates, layer by layer, from one batched pass.

A weight's gradient of one candidate is a sum of outer products, over positions, of what the layer
was given and the gradient of what it returned. So its norm and its inner product with another
gradient can be had without it: the ghost trick (Goodfellow, Efficient Per-Example Gradient
Computations, 2015; Li et al., Large Language Models Can Be Strong Differentially Private Learners,
ICLR 2022, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ggl_audit.basics.device import widest_float
from ggl_audit.basics.gradient import Gradient
from ggl_audit.inputs.model import ClientModel

Arguments = dict[str, Any]

LEAST_GHOST = 2**15
"""Values of a gradient that is worth to be left out."""

GHOST = 16
"""Multiplications for Gram matrices that cost as much as one value of a gradient that is held."""

ROUNDING = 1e-3
"""Relative, of a gradient of a tensor that is computed in two ways."""


class UnknownLayerError(Exception):
    """A parameter is used in a way whose gradient is not known layer by layer."""


@dataclass(frozen=True)
class Outer:
    """Gradients of one weight as sums of outer products over positions.

    A linear layer is a convolution with a kernel of one value here.

    Attributes:
        name: of the parameter.
        windows: (n, groups, height, width, kernel height, kernel width, channels), what the kernel
            was given at each position; a view, in which inputs are repeated.
        errors: (n, groups, outputs, positions), the gradient of what the layer returned.
        kernel: which part of the kernel that is. The rest sees nothing but padding, where the
            gradient of every candidate is zero.
    """

    name: str
    windows: torch.Tensor
    errors: torch.Tensor
    kernel: tuple[slice, slice] = (slice(None), slice(None))

    @property
    def positions(self) -> int:
        """Over which the products are summed."""
        return self.errors.shape[3]

    @property
    def inputs(self) -> int:
        """The inputs of each group."""
        return math.prod(self.windows.shape[4:])

    @property
    def _rows(self) -> int:
        """The outputs of each group."""
        return self.errors.shape[2]

    @property
    def _size(self) -> int:
        """The values of one candidate's gradient."""
        return self.errors.shape[1] * self._rows * self.inputs

    @property
    def size_of_factors(self) -> int:
        """Values of what one candidate's gradient is the product of."""
        return self.positions * (self.inputs + self.errors.shape[1] * self._rows)

    @property
    def size_held(self) -> int:
        """Values that one candidate takes while its gradient is computed."""
        return max(self._size, self.positions * self.inputs)

    @property
    def bytes_held(self) -> int:
        """By what the gradients are the products of."""
        return self.windows.untyped_storage().nbytes() + self.errors.nbytes

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        """Values (t, ...) of the weight's shape, (t, groups, rows, inputs)."""
        whole = like if like.ndim == 5 else like[..., None, None]
        grouped: torch.Tensor = whole.unflatten(1, (self.errors.shape[1], -1))
        return grouped[(..., *self.kernel)].movedim(3, -1).flatten(3)

    def factors(
        self, shape: torch.Size, place: tuple[slice, slice]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the gradients of some candidates are the products of.

        Args:
            shape: (t, n), how the candidates are arranged.
            place: which of them.

        Returns:
            (t, n, groups, rows, positions) and (t, n, groups, positions, inputs).
        """
        windows = self.windows.unflatten(0, shape)[place].flatten(5).flatten(3, 4)
        return self.errors.unflatten(0, shape)[place], windows

    def gradients(
        self, shape: torch.Size, place: tuple[slice, slice], most: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The gradients of some candidates, a few rows at a time.

        Args:
            shape: (t, n), how the candidates are arranged.
            place: which of them.
            most: values to hold, if that is a row at least.

        Yields:
            Which rows of each group, and their gradients (t, n, groups, rows, inputs), which may be
            written over.
        """
        errors, windows = self.factors(shape, place)
        for rows in slices(self._rows, max(1, most // windows[..., 0, :].numel())):
            yield rows, products(errors[:, :, :, rows], windows)

    def unseen(self, like: torch.Tensor) -> torch.Tensor:
        """The squared norms (t,) of values (t, ...) of the weight's shape where no input is."""
        sums = widest_float(like.device)
        squares = torch.zeros(len(like), dtype=sums, device=like.device)
        if self._size == like[0].numel():
            return squares
        # Of a convolution, as what a linear layer is given reaches all of its weight.
        rows, columns = self.kernel
        above, below = like[..., : rows.start, :], like[..., rows.stop :, :]
        left, right = like[..., rows, : columns.start], like[..., rows, columns.stop :]
        for rest in (above, below, left, right):
            squares += torch.linalg.vector_norm(rest.flatten(2), dim=2).to(sums).square().sum(1)
        return squares

    def as_ghost(self) -> Outer | None:
        """Itself, where Gram matrices of its factors cost less than the gradient; else None."""
        cost = self.positions**2 * (self.inputs + self._rows)
        return self if self._size >= LEAST_GHOST and cost < GHOST * self._size else None

    def is_of(self, gradients: torch.Tensor) -> bool:
        """Whether the products are these gradients (n, ...), up to rounding."""
        alone = torch.Size((len(gradients), 1))
        errors, windows = self.factors(alone, (slice(None), slice(None)))
        found, seen = products(errors, windows)[:, 0], self.matrix(gradients)
        return _same(found, seen) and _same(seen.norm(), gradients.norm())


@dataclass(frozen=True)
class Small:
    """Gradients that are held: of biases, and of the scale and shift of a normalization.

    Attributes:
        name: of the parameter.
        values: (n, ...), of the parameter's shape.
    """

    name: str
    values: torch.Tensor

    @property
    def size_held(self) -> int:
        """The values of one candidate's gradient."""
        return self.values[0].numel()

    @property
    def size_of_factors(self) -> int:
        """That is held as it is."""
        return self.size_held

    @property
    def bytes_held(self) -> int:
        """By the gradients."""
        return self.values.nbytes

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        """Values (t, ...) of the parameter's shape as one row, (t, 1, 1, inputs)."""
        return like.reshape(len(like), 1, 1, -1)

    def gradients(
        self, shape: torch.Size, place: tuple[slice, slice], most: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Those of some candidates; see :meth:`Outer.gradients`."""
        # A copy, since what a layer norm returned may be another layer's output too.
        yield slice(0, 1), self.matrix(self.values).unflatten(0, shape)[place].clone()

    def unseen(self, like: torch.Tensor) -> torch.Tensor:
        """Nothing; see :meth:`Outer.unseen`."""
        return like.new_zeros(len(like))

    def as_ghost(self) -> Outer | None:
        """None, as it has no factors."""
        return None

    def is_of(self, gradients: torch.Tensor) -> bool:
        """Whether they are these gradients (n, ...), up to rounding."""
        return _same(self.values, gradients)


Part = Outer | Small


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix products, of which those of a column and a row are faster without a sum."""
    return left * right if left.shape[-1] == 1 else left @ right


def slices(size: int, together: int) -> Iterator[slice]:
    """Parts of a dimension, of about equal size."""
    count = max(1, math.ceil(size / together))
    together = max(1, math.ceil(size / count))
    for start in range(0, size, together):
        yield slice(start, start + together)


@dataclass(frozen=True)
class Call:
    """One use of a layer's parameters.

    Attributes:
        layer: what it does with them.
        arguments: of the function, by name.
        names: of the parameters that are trained, by argument.
        version: of what it was given, which is not to be changed later.
        edge: where the gradient of what it returned arrives.
    """

    layer: Layer
    arguments: Arguments
    names: dict[str, str]
    version: int
    edge: GradientEdge

    def parts(self, errors: torch.Tensor) -> Iterator[Part]:
        """The gradients of its parameters, given that of what it returned."""
        if self.arguments["input"]._version != self.version:
            raise UnknownLayerError("what a layer was given is changed after it")
        return self.layer(self.arguments, self.names, errors)


Layer = Callable[[Arguments, dict[str, str], torch.Tensor], Iterator[Part]]


def linear(arguments: Arguments, names: dict[str, str], errors: torch.Tensor) -> Iterator[Part]:
    """A linear layer, at any number of positions."""
    taken = arguments["input"].reshape(len(errors), 1, -1, 1, 1, 1, arguments["weight"].shape[1])
    errors = errors.reshape(len(errors), 1, -1, errors.shape[-1]).transpose(2, 3)
    if "weight" in names:
        yield Outer(names["weight"], taken, errors)
    if "bias" in names:
        yield Small(names["bias"], errors.sum((1, 3)))


def convolution(
    arguments: Arguments, names: dict[str, str], errors: torch.Tensor
) -> Iterator[Part]:
    """In two dimensions, with groups, stride, dilation and padding."""
    if "bias" in names:
        yield Small(names["bias"], errors.sum((2, 3)))
    if "weight" not in names:
        return
    taken, groups, kernel = arguments["input"], arguments["groups"], arguments["weight"].shape[2:]
    if isinstance(arguments["padding"], str):
        raise UnknownLayerError("padding by name")
    stride, padding, dilation = (
        _pair(arguments[name]) for name in ("stride", "padding", "dilation")
    )
    # Channels last, so that a row of a window is read in one go.
    margins = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(taken.permute(0, 2, 3, 1), margins).contiguous()
    image, row, column, _ = padded.stride()
    places = errors.shape[2:]
    windows = padded.as_strided(
        (len(taken), *places, *kernel, taken.shape[1]),
        (image, row * stride[0], column * stride[1], row * dilation[0], column * dilation[1], 1),
    )
    seen = [
        _seen(*sizes)
        for sizes in zip(kernel, taken.shape[2:], places, stride, padding, dilation, strict=True)
    ]
    windows = windows[:, :, :, seen[0], seen[1]].unflatten(5, (groups, -1)).movedim(5, 1)
    grouped = errors.flatten(2).unflatten(1, (groups, -1))
    yield Outer(names["weight"], windows, grouped, (seen[0], seen[1]))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= ROUNDING * expected.norm())


def _pair(option: int | Sequence[int]) -> tuple[int, int]:
    """An option of a convolution for both dimensions."""
    return (option, option) if isinstance(option, int) else (option[0], option[-1])


def _seen(kernel: int, size: int, places: int, stride: int, padding: int, dilation: int) -> slice:
    """The part of a kernel, along one dimension, that ever sees more than padding."""
    seen = [
        tap
        for tap in range(kernel)
        if any(0 <= place * stride + tap * dilation - padding < size for place in range(places))
    ]
    return slice(min(seen), max(seen) + 1) if seen else slice(0, kernel)


def embedding(arguments: Arguments, names: dict[str, str], errors: torch.Tensor) -> Iterator[Part]:
    """Rows of a table, as a linear layer of one-hot vectors with its weight transposed."""
    plain = arguments["max_norm"] is None and not arguments["scale_grad_by_freq"]
    if not plain or arguments["padding_idx"] not in (None, -1):
        raise UnknownLayerError("an embedding with options")
    rows = F.one_hot(arguments["input"].flatten(1), len(arguments["weight"])).to(errors.dtype)
    taken = errors.reshape(len(errors), 1, -1, 1, 1, 1, errors.shape[-1])
    yield Outer(names["weight"], taken, rows.transpose(1, 2)[:, None])


def batch_norm(arguments: Arguments, names: dict[str, str], errors: torch.Tensor) -> Iterator[Part]:
    """With given statistics; with those of the batch no image has a gradient of its own."""
    if arguments["training"] or arguments["running_mean"] is None:
        raise UnknownLayerError("batch norm with the statistics of the batch")
    statistics = (arguments["running_mean"], arguments["running_var"])
    taken = F.batch_norm(arguments["input"], *statistics, eps=arguments["eps"])
    return _of_channels(taken, names, errors)


def group_norm(arguments: Arguments, names: dict[str, str], errors: torch.Tensor) -> Iterator[Part]:
    """The scale and shift of a group norm."""
    taken = F.group_norm(arguments["input"], arguments["num_groups"], eps=arguments["eps"])
    return _of_channels(taken, names, errors)


def layer_norm(arguments: Arguments, names: dict[str, str], errors: torch.Tensor) -> Iterator[Part]:
    """The scale and shift of a layer norm."""
    shape = list(arguments["normalized_shape"])
    taken = F.layer_norm(arguments["input"], shape, eps=arguments["eps"])
    positions = tuple(range(1, errors.ndim - len(shape)))
    for argument, values in (("weight", taken * errors), ("bias", errors)):
        if argument in names:
            yield Small(names[argument], values.sum(positions) if positions else values)


def _of_channels(
    normalized: torch.Tensor, names: dict[str, str], errors: torch.Tensor
) -> Iterator[Part]:
    if "weight" in names:
        yield Small(names["weight"], (normalized * errors).flatten(2).sum(2))
    if "bias" in names:
        yield Small(names["bias"], errors.flatten(2).sum(2))


LAYERS: dict[Callable[..., Any], tuple[Layer, tuple[str, ...]]] = {
    F.linear: (linear, ("input", "weight", "bias")),
    F.conv2d: (
        convolution,
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    F.embedding: (
        embedding,
        (
            "input",
            "weight",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        ),
    ),
    F.batch_norm: (
        batch_norm,
        (
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "training",
            "momentum",
            "eps",
        ),
    ),
    F.group_norm: (group_norm, ("input", "num_groups", "weight", "bias", "eps")),
    F.layer_norm: (layer_norm, ("input", "normalized_shape", "weight", "bias", "eps")),
}
"""By the function that a module calls, with the names of its arguments."""

DEFAULTS: Arguments = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_idx": None,
    "max_norm": None,
    "scale_grad_by_freq": False,
    "training": False,
    "eps": 1e-5,
}


class Layers(TorchFunctionMode):
    """Watches a forward pass for what is done with parameters.

    Args:
        parameters: the trained ones, by name.
        images: how many; every layer is to be given, and to return, a row for each.
    """

    def __init__(self, parameters: Gradient, images: int) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._images = images
        self.calls: list[Call] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs the function, and notes it if it takes a parameter."""
        result = function(*args, **(kwargs or {}))
        used = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if used and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            self._note(function, args, kwargs or {}, len(used), result)
        return result

    def _note(
        self, function: Any, args: Any, kwargs: Arguments, used: int, result: torch.Tensor
    ) -> None:
        if function not in LAYERS:
            raise UnknownLayerError(f"{function} takes a parameter")
        layer, arguments = LAYERS[function]
        given = DEFAULTS | dict(zip(arguments, args, strict=False)) | kwargs
        names = {
            argument: self._names[id(given[argument])]
            for argument in ("weight", "bias")
            if id(given.get(argument)) in self._names
        }
        batches = (given["input"], result)
        if len(names) != used or any(len(batch) != self._images for batch in batches):
            raise UnknownLayerError(f"{function} does not map each image by itself")
        if not result.requires_grad:
            result.requires_grad_()
        self.calls.append(
            Call(layer, given, names, given["input"]._version, get_gradient_edge(result))
        )


def _single(output: Any) -> Any:
    """What a model returned for one image, as if for a batch of one."""
    return tree_map_only(torch.Tensor, lambda part: part[None], output)


def parts_of(model: ClientModel, images: torch.Tensor, targets: torch.Tensor) -> Iterator[Part]:
    """Each parameter's gradients of n images, each with a loss of its own.

    Args:
        model: the client's.
        images: (n, channels, height, width) in [0, 1].
        targets: (n, ...), as the loss takes them.

    Raises:
        UnknownLayerError: a parameter is used twice, not at all, or by an unknown layer.
    """
    with torch.enable_grad(), Layers(model.parameters, len(images)) as seen:
        outputs = model.outputs(model.parameters, images.detach().requires_grad_())
    used = [name for call in seen.calls for name in call.names.values()]
    if sorted(used) != sorted(model.parameters):
        raise UnknownLayerError("a parameter is used twice, or not at all")
    with torch.enable_grad():
        losses = vmap(lambda output, target: model.criterion(_single(output), target[None]))
        loss = losses(outputs, targets).sum()
        errors = torch.autograd.grad(loss, [call.edge for call in seen.calls])
    for call, error in zip(seen.calls, errors, strict=True):
        with torch.no_grad():
            yield from call.parts(error.detach())
