"""Runs a saved program as a module that torch.func can map and differentiate.

A program is a list of steps on named values. Its operators are PyTorch's own, called one by one, so
that nothing of a file runs but these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ggl_audit.errors import ReasonError
from ggl_audit.messages import Message

Mode = Literal["train", "eval"]
Values = dict[str, Any]

DEEPEST = 100

REFUSED = ("from_file", "record_stream", "save", "set_")
"""Operators that reach beyond their arguments."""

MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")
"""Operators that make a tensor of none."""

ASSERTIONS = (
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_functional_assert_async",
    "_functional_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "warn",
)
"""Operators that give nothing, and fail on what a map over candidates makes of a tensor."""

COUNTER = "num_batches_tracked"

TOO_DEEP = Message(
    "program/too-deep",
    "a tensor {depth} modules deep",
    advice="Give a factory; no usual model is written like that.",
)
OTHER_TRAINED_BATCH = Message(
    "program/other-trained-batch",
    "it was saved in train mode for {batch} images, not {images}",
    advice="Declare the batch size that it was saved with, or save it with a dynamic batch "
    "dimension.",
)
OTHER_INPUTS = Message(
    "program/other-inputs",
    "it takes {count} inputs, not {given}",
    advice="Wrap the module before it is saved, so that it takes images (a generator: latents, or "
    "latents and labels) and returns one tensor.",
)
ONLY_OPERATORS = (
    "Give a factory: only operators of PyTorch that compute on tensors are run from a file."
)
UNKNOWN_OPERATOR = Message(
    "program/unknown-operator",
    "the operator {operator}",
    advice=ONLY_OPERATORS,
)
TAKES_NO_TENSOR = Message(
    "program/takes-no-tensor",
    "the operator aten::{name}, which takes no tensor",
    advice=ONLY_OPERATORS,
)
CHANGES_ITSELF = Message(
    "program/changes-itself",
    "it changes its own tensor {name!r}",
    advice="Save it in eval mode, or give a factory; the weights must stay what they are.",
)


class UnsupportedError(ReasonError):
    """A program does what cannot be run here."""


@dataclass(frozen=True)
class Value:
    """Stands for a value in the arguments of a step."""

    name: str


INPUT_DTYPE, INPUT_DEVICE = Value("@dtype"), Value("@device")
"""What a program was saved with as constants follows the module here."""


def held(name: str) -> Value:
    """A parameter or a buffer of the program, by its name."""
    return Value(f"@{name}")


@dataclass(frozen=True)
class Call:
    """Calls an operator.

    Attributes:
        operator: what is called.
        arguments: by position; lists, and :class:`Value` in them, as they come.
        named: by name.
        outputs: the name of the result, or one for each of several results.
    """

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    outputs: str | tuple[str, ...]

    def run(self, values: Values) -> None:
        """Calls it."""
        named = {name: _filled(argument, values) for name, argument in self.named.items()}
        result = self.operator(*_filled(self.arguments, values), **named)
        if isinstance(self.outputs, str):
            values[self.outputs] = result
        elif self.outputs:  # an assertion gives nothing
            values.update(zip(self.outputs, result, strict=True))


@dataclass(frozen=True)
class Block:
    """Steps, and the values that they give.

    Attributes:
        inputs: names.
        steps: in order.
        outputs: as the arguments of a call.
    """

    inputs: tuple[str, ...]
    steps: tuple[Call, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Recording:
    """What a program does.

    Attributes:
        body: its inputs are the program's, and so are its outputs.
        modes: the modes that it was saved in, where that makes a difference: of dropouts, and of
            normalizations with running statistics.
        normalizes: whether there is a normalization with running statistics.
        batch: the number of images that it was saved for, None for any.
        keys: of the outputs, where it returns a dict; without, several come as a tuple.
    """

    body: Block
    modes: frozenset[Mode]
    normalizes: bool
    batch: int | None = None
    keys: tuple[str, ...] = ()


class Program(nn.Module):
    """A saved program.

    Args:
        tensors: parameters and buffers by name, in the order of the original.
        constants: those that are no part of its state dict.
        recording: what it does.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        constants: Collection[str],
        recording: Recording,
    ) -> None:
        super().__init__()
        self._names = tuple(tensors)
        self._recording = recording
        self._last_uses = _last_uses(recording.body)
        for name, tensor in tensors.items():
            *path, own = name.split(".")
            if len(path) > DEEPEST:
                raise UnsupportedError(TOO_DEEP(depth=len(path)))
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(own, tensor)
            else:
                owner.register_buffer(own, tensor, persistent=name not in constants)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Runs it, with copies of its inputs where it was saved for more, or in parts."""
        batch, count = self._recording.batch, len(inputs[0])
        if batch is None or count == batch:
            return self._run(inputs)
        if "train" in self._recording.modes and batch % count:
            # A whole number of copies leaves the statistics of a batch as they are.
            raise UnsupportedError(OTHER_TRAINED_BATCH(batch=batch, images=count))
        wanted = torch.arange(-(-count // batch) * batch, device=inputs[0].device) % count
        parts = [[one[part] for one in inputs] for part in wanted.split(batch)]
        returned = [tree_flatten(self._run(part)) for part in parts]
        leaves = zip(*(own for own, _ in returned), strict=True)
        together = [
            torch.cat(own)[:count] if isinstance(own[0], torch.Tensor) and own[0].ndim else own[0]
            for own in leaves
        ]
        return tree_unflatten(together, returned[0][1])

    def limit_to(self, batch: int) -> None:
        """Has it run with so many images at a time from now on, whatever it is given."""
        self._recording = replace(self._recording, batch=batch)

    def _run(self, inputs: Sequence[torch.Tensor]) -> Any:
        body = self._recording.body
        if len(inputs) != len(body.inputs):
            raise UnsupportedError(OTHER_INPUTS(count=len(body.inputs), given=len(inputs)))
        values: Values = {held(name).name: self._tensor(name) for name in self._names}
        values[INPUT_DTYPE.name] = inputs[0].dtype
        values[INPUT_DEVICE.name] = inputs[0].device
        values.update(zip(body.inputs, inputs, strict=True))
        for step, done in zip(body.steps, self._last_uses, strict=True):
            step.run(values)
            for name in done:
                values.pop(name, None)
        outputs = _filled(body.outputs, values)
        if self._recording.keys:
            return dict(zip(self._recording.keys, outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, own = name.rpartition(".")
        tensor: torch.Tensor = getattr(self.get_submodule(path), own)
        return tensor


def recording_of(module: nn.Module) -> Recording | None:
    """What a saved program does; None for a module of another kind."""
    return module._recording if isinstance(module, Program) else None


class Recorder:
    """Makes the steps that call operators, and notes which of them depend on the mode.

    Attributes:
        modes: as in :class:`Recording`, so far.
        normalizes: as in :class:`Recording`, so far.
    """

    def __init__(self) -> None:
        self.modes: set[Mode] = set()
        self.normalizes = False
        self._transposed: dict[Value, Value] = {}

    def call(
        self, name: str, overload: str, arguments: Mapping[str, Any], outputs: str | tuple[str, ...]
    ) -> Call:
        """Makes the call of an operator of the namespace aten.

        Args:
            name: without the namespace.
            overload: its variant, ``default`` where that has no name.
            arguments: by the names of its schema.
            outputs: as in :class:`Call`.

        Raises:
            UnsupportedError: there is no such operator, or it does more than to compute.
        """
        operator = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if not isinstance(operator, torch._ops.OpOverload) or name in REFUSED:
            shown = f"aten::{name} {overload}".removesuffix(" default")
            raise UnsupportedError(UNKNOWN_OPERATOR(operator=shown))
        if name in ASSERTIONS:
            return Call(_nothing, (), {}, outputs)
        schema = operator._schema.arguments
        if name not in MAKERS and not any("Tensor" in str(own.type) for own in schema):
            raise UnsupportedError(TAKES_NO_TENSOR(name=name))
        if "batch_norm" in name and "backward" not in name:
            return self._batch_norm(name, arguments, outputs)
        if name == "instance_norm":
            return self._instance_norm(arguments, outputs)
        for own in schema:
            target = arguments.get(own.name)
            writes = own.alias_info is not None and own.alias_info.is_write
            if writes and isinstance(target, Value) and target.name.startswith("@"):
                if target.name.endswith(COUNTER):
                    return Call(_same, (target,), {}, outputs)
                raise UnsupportedError(CHANGES_ITSELF(name=target.name[1:]))
        linear = self._linear(name, arguments, outputs)
        if linear is not None:
            return linear
        if "dropout" in name and "p" in arguments:
            self._note(arguments.get("train", True), matters=arguments["p"] != 0)
        attention_dropout = arguments.get("dropout_p")
        if isinstance(attention_dropout, float) and attention_dropout > 0:
            self.modes.add("train")
        if operator is torch.ops.aten.view.default:
            # Attention may have another layout here than where the program was made.
            return Call(torch.reshape, (arguments["self"], arguments["size"]), {}, outputs)
        positional = [own.name for own in schema if not own.kwarg_only and own.name in arguments]
        named = {n: _follows(argument) for n, argument in arguments.items()}
        return Call(operator, tuple(named.pop(n) for n in positional), named, outputs)

    def _linear(
        self, name: str, arguments: Mapping[str, Any], outputs: str | tuple[str, ...]
    ) -> Call | None:
        """Puts a linear layer together again that was taken apart, as its output may be the last.

        That is the product with a transposed weight, with or without the sum with a bias.
        """
        own, factor = arguments.get("self"), arguments.get("mat2")
        weight = self._transposed.get(factor) if isinstance(factor, Value) else None
        is_transpose = name == "t" or (name == "permute" and arguments.get("dims") == [1, 0])
        if is_transpose and isinstance(own, Value) and isinstance(outputs, str):
            self._transposed[Value(outputs)] = own
        if weight is None or arguments.get("beta", 1) != 1 or arguments.get("alpha", 1) != 1:
            return None
        linear = torch.ops.aten.linear.default
        if name == "mm":
            return Call(linear, (own, weight), {}, outputs)
        if name == "addmm" and isinstance(own, Value) and own.name.startswith("@"):
            return Call(linear, (arguments["mat1"], weight, own), {}, outputs)
        return None

    def _batch_norm(
        self, name: str, arguments: Mapping[str, Any], outputs: str | tuple[str, ...]
    ) -> Call:
        """All variants are one function here, of which only the normalized values are used."""
        running = (arguments.get("running_mean"), arguments.get("running_var"))
        training = arguments.get("training", "no_" not in name)
        self._note_normalization(training, tracked=running[0] is not None)
        weight, bias = arguments.get("weight"), arguments.get("bias")
        operands = (arguments["input"], *running, weight, bias, training, arguments["eps"])
        single = isinstance(outputs, str)
        operator = _normalize_batch if single else _normalize_batch_alone
        return Call(operator, operands, {} if single else {"results": len(outputs)}, outputs)

    def _instance_norm(self, arguments: Mapping[str, Any], outputs: str | tuple[str, ...]) -> Call:
        running = (arguments.get("running_mean"), arguments.get("running_var"))
        own = arguments["use_input_stats"]
        self._note_normalization(own, tracked=running[0] is not None)
        weight, bias = arguments.get("weight"), arguments.get("bias")
        operands = (arguments["input"], *running, weight, bias, own, arguments["eps"])
        return Call(_normalize_instance, operands, {}, outputs)

    def _note_normalization(self, training: Any, tracked: bool) -> None:
        if tracked:
            self.normalizes = True
            self._note(training, matters=True)

    def _note(self, training: Any, matters: bool) -> None:
        if matters and isinstance(training, bool):
            self.modes.add("train" if training else "eval")


def _last_uses(body: Block) -> list[list[str]]:
    """The names that no step after each of the steps uses, nor the output."""
    used = set(_names(body.outputs))
    last: list[list[str]] = []
    for step in reversed(body.steps):
        own = set(_names(step))
        last.append(sorted(own - used))
        used |= own
    return last[::-1]


def _names(part: Any) -> Iterator[str]:
    """The names of all values in a call, or in arguments."""
    if isinstance(part, Value):
        yield part.name
    elif isinstance(part, (list, tuple)):
        for one in part:
            yield from _names(one)
    elif isinstance(part, Call):
        yield from _names((part.arguments, list(part.named.values())))
        yield from (part.outputs,) if isinstance(part.outputs, str) else part.outputs


def _filled(argument: Any, values: Values) -> Any:
    if isinstance(argument, Value):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_filled(part, values) for part in argument)
    return argument


def _follows(argument: Any) -> Any:
    """A saved device, or the default dtype, gives way to those of the input."""
    if isinstance(argument, torch.device):
        return INPUT_DEVICE
    return INPUT_DTYPE if argument is torch.float32 else argument


def _normalize_batch(
    images: torch.Tensor,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    eps: float,
) -> torch.Tensor:
    # Without the running statistics of a batch's own, which it would change, a map can run it.
    running = (None, None) if training else (mean, variance)
    return F.batch_norm(images, *running, weight, bias, training, 0.0, eps)


def _normalize_batch_alone(*operands: Any, results: int) -> list[torch.Tensor | None]:
    return [_normalize_batch(*operands), *[None] * (results - 1)]


def _normalize_instance(
    images: torch.Tensor,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    eps: float,
) -> torch.Tensor:
    running = (None, None) if training else (mean, variance)
    return F.instance_norm(images, *running, weight, bias, training, 0.0, eps)


def _same(value: Any) -> Any:
    return value


def _nothing() -> None:
    return None
