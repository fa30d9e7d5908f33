"""What the client's model computes, as pure functions of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ggl_audit.basics.environment import is_out_of_memory
from ggl_audit.basics.gradient import Gradient
from ggl_audit.errors import SpecError
from ggl_audit.inputs.images import Shape
from ggl_audit.inputs.interpreter import UnsupportedError, recording_of
from ggl_audit.inputs.layouts import Arrangements
from ggl_audit.inputs.losses import Criterion, CrossEntropy
from ggl_audit.inputs.outputs import Place, choose, first_rows
from ggl_audit.inputs.statistics import (
    Normalization,
    Statistics,
)
from ggl_audit.inputs.targets import Targets
from ggl_audit.inputs.tensors import Tensors
from ggl_audit.inputs.weights import NORMALIZATIONS
from ggl_audit.messages import Message
from ggl_audit.spec import LocalTrainingSpec

LINEAR = (F.linear, torch.ops.aten.linear.default)

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
WITH_MODES = (*DROPOUTS, *NORMALIZATIONS)
"""Layers that do something else in train mode than in eval mode."""

LOSS_FAILS = Message(
    "model/loss-fails",
    "the loss cannot be taken of {count} images ({error})",
    advice="Mend the loss of your own; the reason says what fails, for some number of images or "
    "some of their labels.",
)
PROGRAM_FAILS = Message(
    "program/fails",
    "the program cannot be run: {reason}",
    advice="Correct `model.input.shape` and the batch size, or give a factory.",
)
FAILS_FOR_SOME = Message(
    "model/fails-for-some",
    "the model does not take {count} images of {shape} at a time ({error})",
    advice="Write the forward pass so that it takes any number of images; the reason says what "
    "fails.",
)


@dataclass(frozen=True)
class Head:
    """The linear layer whose output is the logits, by parameter names."""

    module: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ClientModel:
    """The model at the round of the capture.

    Attributes:
        module: the module, in the declared mode, on its device.
        parameters: the trained parameters, by name, in the order of ``named_parameters()``.
        constants: buffers and frozen parameters, by name.
        shape: (channels, height, width) of its images.
        mean: (channels, 1, 1) or (1, 1, 1), subtracted from an image in [0, 1].
        std: the same shape, divides it.
        loss_scale: multiplies the loss.
        loss_sum: whether the loss is summed over a batch, and not averaged.
        batch_size: images of one client.
        bgr: whether the module takes the channels in the reverse order.
        state: the state dict, with the running statistics that ``mode: train`` does without.
        local: how a client trains before it sends an update; None where it sends a gradient.
        classes: how many labels there are: logits, or rows of targets.
        head: the linear layer that gives the output, or None.
        criterion: the loss of outputs and targets, scale included.
        targets: the table that labels are rows of; None where they are class indices.
        output: which of what the module returns are the logits; None where that is one tensor.
        whole: whether the loss is of all that the module returns, and not of the logits alone.
        mixes: whether an image's output depends on the others of its batch, as with batch norm in
            train mode.
        fewest: images that the module takes at a time; fewer are filled up with copies of them.
        unsent: names of the state dict, buffers included, that are declared never to be sent.
        arrangements: how the tensors of a capture lie in its file; None for PyTorch's layout.
        normalizations: the layers that keep running statistics in this mode.
        statistics: those of them that are observed beside the parameters; None where none are.
    """

    module: nn.Module
    parameters: Gradient
    constants: Tensors
    shape: Shape
    mean: torch.Tensor
    std: torch.Tensor
    loss_scale: float
    classes: int
    head: Head | None
    loss_sum: bool = False
    batch_size: int = 1
    local: LocalTrainingSpec | None = None
    bgr: bool = False
    state: Tensors = field(default_factory=dict)
    criterion: Criterion = field(default_factory=CrossEntropy)
    targets: Targets | None = None
    output: Place | None = None
    whole: bool = False
    mixes: bool = False
    fewest: int = 1
    unsent: frozenset[str] = frozenset()
    arrangements: Arrangements | None = None
    normalizations: tuple[Normalization, ...] = ()
    statistics: Statistics | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and everything that is computed from them."""
        return self.mean.device

    @property
    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """What the module is called with, for images (..., channels, height, width) in [0, 1]."""
        return ((images.flip(-3) if self.bgr else images) - self.mean) / self.std

    def as_received(self) -> nn.Module:
        """A copy of the module as a client has it, which keeps running statistics."""
        module = copy.deepcopy(self.module)
        for normalization in self.normalizations:
            layer: Any = module.get_submodule(normalization.layer)
            layer.track_running_stats = True
            layer.running_mean, layer.running_var = normalization.running.clone()
            if normalization.counts:
                layer.num_batches_tracked = torch.tensor(normalization.batches)
        return module

    def without(self, names: Collection[str]) -> ClientModel:
        """The model of a client that neither trains nor sends these parameters."""
        kept = {name: tensor for name, tensor in self.parameters.items() if name not in names}
        fixed = {name: tensor for name, tensor in self.parameters.items() if name in names}
        head = self.head
        if head is not None and head.weight in fixed:
            head = None
        elif head is not None and head.bias in fixed:
            head = replace(head, bias=None)
        return replace(self, parameters=kept, constants={**self.constants, **fixed}, head=head)

    def logits(
        self, parameters: Gradient, images: torch.Tensor, drawn: Tensors | None = None
    ) -> torch.Tensor:
        """Maps (n, channels, height, width) in [0, 1] to (n, classes).

        Args:
            parameters: by name.
            images: the batch.
            drawn: takes the place of constants of the same name.

        Raises:
            SpecError: the module does not take so many images.
        """
        output: torch.Tensor = self._call(parameters, images, drawn, self.output)
        return output

    def outputs(
        self, parameters: Gradient, images: torch.Tensor, drawn: Tensors | None = None
    ) -> Any:
        """What the loss takes of (n, channels, height, width) in [0, 1]; see :meth:`logits`."""
        return self._call(parameters, images, drawn, None if self.whole else self.output)

    def loss(
        self,
        parameters: Gradient,
        images: torch.Tensor,
        targets: torch.Tensor,
        drawn: Tensors | None = None,
    ) -> torch.Tensor:
        """The client's loss on a batch, a scalar.

        Args:
            parameters: by name.
            images: (n, channels, height, width) in [0, 1].
            targets: (n, ...), as the loss takes them (:meth:`targets_of`).
            drawn: takes the place of constants of the same name.
        """
        outputs = self.outputs(parameters, images, drawn)
        try:
            return self.criterion(outputs, targets)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            # The loss may be the user's own code.
            raise SpecError(
                ("model", "loss"), LOSS_FAILS(count=len(images), error=reason_of(error))
            ) from error

    def targets_of(self, labels: torch.Tensor) -> torch.Tensor:
        """What the loss takes for labels (n,): these, or their rows of the table."""
        return labels if self.targets is None else self.targets.rows[labels]

    def mixable_targets_of(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Targets that may be averaged over images, (n, ...); None where the loss takes no such."""
        if self.targets is None:
            return self.criterion.mixable(labels, self.classes)
        rows = self.targets.rows
        return rows[labels] if rows.is_floating_point() else None

    def representation(self, images: torch.Tensor) -> torch.Tensor | None:
        """What the head takes, (n, features), for images (n, channels, height, width)."""
        if self.head is None:
            return None
        with LinearCalls() as calls:
            self.logits(self.parameters, images)
        weight = self.parameters[self.head.weight]
        head = next(call for call in reversed(calls.seen) if call.weight is weight)
        taken: torch.Tensor = head.taken.flatten(1)[: len(images)]
        return taken

    def _call(
        self,
        parameters: Gradient,
        images: torch.Tensor,
        drawn: Tensors | None,
        place: Place | None,
    ) -> Any:
        normalized, count = self.normalize(images), len(images)
        if count < self.fewest:
            # Whole copies of the batch leave its statistics as they are.
            normalized = normalized.repeat(-(-self.fewest // count), 1, 1, 1)
        swapped = {name: tensor for name, tensor in (drawn or {}).items() if name in self.constants}
        constants = {**self.constants, **swapped, **parameters}
        try:
            with differentiable_attention():
                returned = call_with(self.module, constants, normalized)
            output = choose(returned, place)
            filled = len(normalized)
            return output if filled == count else first_rows(output, count, filled)
        except UnsupportedError as error:
            raise SpecError(("model",), PROGRAM_FAILS(reason=error)) from None
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            # The forward pass is the user's own code; whatever it raises is told in a message.
            raise SpecError(
                ("model",),
                FAILS_FOR_SOME(count=count, shape=list(self.shape), error=reason_of(error)),
            ) from error


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the statistics that a model normalizes with."""
    recording = recording_of(module)
    if recording is not None:
        return recording.normalizes
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def in_other_mode(module: nn.Module, mode: str) -> list[str]:
    """The layers, of those that a mode makes a difference to, that are not in it."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, WITH_MODES) and layer.training != (mode == "train")
    ]


def reason_of(error: BaseException) -> str:
    """What was raised, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def call_with(module: nn.Module, tensors: Tensors, images: torch.Tensor) -> Any:
    """Calls a module with other tensors in place of its own, which it has again afterwards.

    ``functional_call`` ties weights by name, and leaves the other tensors in a layer that stands in
    the module under two names.

    Args:
        module: the module.
        tensors: by name, tied ones by their first.
        images: what it is called with.
    """
    first: dict[int, str] = {}
    tied = {}
    for prefix, layer in module.named_modules():
        for own, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            name = f"{prefix}.{own}" if prefix else own
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    more = {name: tensors[one] for name, one in tied.items() if one in tensors}
    return functional_call(module, {**tensors, **more}, (images,), tie_weights=False)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Computes attention by operators that can be mapped, and differentiated in either way."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class LinearCall:
    """A call of a linear layer: what it took, its weight and bias, and what it gave."""

    taken: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    given: torch.Tensor


class LinearCalls(TorchFunctionMode):
    """Notes each call of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[LinearCall] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in LINEAR and len(args) > 1:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            self.seen.append(LinearCall(args[0], args[1], bias, result))
        return result
