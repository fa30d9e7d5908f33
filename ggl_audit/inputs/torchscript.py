"""Translates TorchScript, traced or scripted, to steps that run as a module."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ggl_audit.inputs.interpreter import (
    COUNTER,
    INPUT_DEVICE,
    TRAINING,
    Block,
    Branch,
    Call,
    Loop,
    Program,
    Recorder,
    Recording,
    Step,
    UnsupportedError,
    Value,
    held,
)

SCHEMA = re.compile(r"aten::(\w+)(?:\.(\w+))?\(")

CONSTANTS = "constants_of_the_program"
"""Where tensors are kept that the program has as constants."""

DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
"""TorchScript's numbers of the types of numbers."""


def _size(tensor: torch.Tensor, dim: int | None = None) -> int | list[int]:
    return list(tensor.shape) if dim is None else tensor.shape[dim]


def _appended(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _extended(values: list[Any], more: list[Any]) -> None:
    values.extend(more)


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _tensor(data: Any, dtype: int | None, *_: Any) -> torch.Tensor:
    return torch.tensor(data, dtype=None if dtype is None else DTYPES[dtype])


PYTHON: dict[str, Callable[..., Any]] = {
    "__and__": operator.and_,
    "__contains__": operator.contains,
    "__derive_index": lambda index, start, step: start + index * step,
    "__getitem__": operator.getitem,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__not__": operator.not_,
    "__or__": operator.or_,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__xor__": operator.xor,
    "_is_tracing": lambda: False,
    "Bool": bool,
    "Float": float,
    "FloatImplicit": _as_number,
    "Int": int,
    "IntImplicit": _as_number,
    "ScalarImplicit": _as_number,
    "add": operator.add,
    "add_": operator.iadd,
    "all": all,
    "any": any,
    "append": _appended,
    "ceil": math.ceil,
    "dim": torch.Tensor.dim,
    "div": operator.truediv,
    "eq": operator.eq,
    "extend": _extended,
    "floor": math.floor,
    "floordiv": operator.floordiv,
    "format": lambda text, *_: text,
    "ge": operator.ge,
    "gt": operator.gt,
    "has_torch_function": lambda *_: False,
    "is_autocast_enabled": lambda *_: False,
    "is_floating_point": torch.is_floating_point,
    "is_grad_enabled": lambda: True,
    "is_scripting": lambda: True,
    "item": _as_number,
    "le": operator.le,
    "len": len,
    "list": list,
    "lt": operator.lt,
    "mul": operator.mul,
    "ne": operator.ne,
    "neg": operator.neg,
    "numel": torch.numel,
    "pow": math.pow,
    "remainder": operator.mod,
    "round": round,
    "size": _size,
    "slice": lambda values, start, stop, step: values[slice(start, stop, step)],
    "sqrt": math.sqrt,
    "str": str,
    "sub": operator.sub,
    "tensor": _tensor,
    "warn": lambda *_: None,
}
"""Operators on sizes, lists and numbers, of the namespace aten."""

OF_TENSORS = frozenset(
    {
        "Bool",
        "Float",
        "FloatImplicit",
        "Int",
        "IntImplicit",
        "ScalarImplicit",
        "__is__",
        "__isnot__",
        "append",
        "dim",
        "extend",
        "format",
        "has_torch_function",
        "is_floating_point",
        "item",
        "len",
        "list",
        "numel",
        "size",
        "warn",
    }
)
"""Those of them that also take tensors."""

OF_LISTS = ("__contains__", "__getitem__", "add", "add_", "slice")
"""Those of them that also take lists of tensors."""


def _number_of(dtype: torch.dtype) -> int:
    return next(number for number, own in DTYPES.items() if own is dtype)


PRIMITIVES: dict[str, Callable[..., Any]] = {
    "prim::DictConstruct": lambda *values: dict(zip(values[::2], values[1::2], strict=True)),
    "prim::ListConstruct": lambda *values: list(values),
    "prim::NumToTensor": torch.tensor,
    "prim::Print": lambda *_: None,
    "prim::TupleConstruct": lambda *values: values,
    "prim::TupleIndex": operator.getitem,
    "prim::Uninitialized": lambda: None,
    "prim::data": torch.Tensor.detach,
    "prim::device": lambda tensor: tensor.device,
    "prim::dtype": lambda tensor: _number_of(tensor.dtype),
    "prim::is_cuda": lambda tensor: tensor.is_cuda,
    "prim::is_nested": lambda _: False,
    "prim::max": max,
    "prim::min": min,
    "prim::requires_grad": lambda _: True,
    "prim::type": lambda device: device.type,
    "prim::unchecked_cast": lambda value: value,
}
"""The fast paths that are not differentiable are off where a gradient is wanted, so it always is.
"""

UNPACKED = ("prim::ListUnpack", "prim::TupleUnpack")


def translate(script: torch.jit.ScriptModule) -> Program:
    """Makes a module of a loaded TorchScript module.

    Raises:
        UnsupportedError: it does what cannot be run here.
    """
    return _Translator(script).program()


class _Translator:
    def __init__(self, script: torch.jit.ScriptModule) -> None:
        self._script = script
        self._modules = dict(script.named_modules(remove_duplicate=False))
        self._tensors: dict[str, torch.Tensor] = {}
        self._recorder = Recorder()
        # What the names of the graph stand for: constants and tensors that are held, or modules.
        self._known: dict[str, Any] = {}
        self._paths: dict[str, str] = {}
        shared: dict[tuple[int, torch.Size], torch.Tensor] = {}
        for name, parameter in script.named_parameters(remove_duplicate=False):
            same = (parameter.data_ptr(), parameter.shape)
            copy = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            self._tensors[name] = shared.setdefault(same, copy)
        buffers = script.named_buffers(remove_duplicate=False)
        self._tensors |= {name: buffer.detach() for name, buffer in buffers}

    def program(self) -> Program:
        graph = self._script.inlined_graph
        own, *inputs = graph.inputs()
        self._paths[own.debugName()] = ""
        body = self._block(graph, tuple(value.debugName() for value in inputs))
        if len(body.outputs) != 1:
            raise UnsupportedError(f"it returns {len(body.outputs)} values")
        recorder = self._recorder
        recording = Recording(body, frozenset(recorder.modes), recorder.normalizes)
        constants = [name for name in self._tensors if name.startswith(f"{CONSTANTS}.")]
        return Program(self._tensors, constants, recording)

    def _block(self, block: Any, inputs: tuple[str, ...]) -> Block:
        steps: list[Step] = []
        for node in block.nodes():
            try:
                steps += self._steps(node)
            except UnsupportedError as error:
                place = node.sourceRange().strip().splitlines()
                where = f" ({place[0].strip()})" if place else ""
                raise UnsupportedError(f"{error}{where}") from None
        return Block(inputs, tuple(steps), tuple(self._value(own) for own in block.outputs()))

    def _value(self, value: Any) -> Any:
        name = value.debugName()
        return self._known.get(name, Value(name))

    def _steps(self, node: Any) -> Sequence[Step]:
        kind = node.kind()
        outputs = tuple(output.debugName() for output in node.outputs())
        if kind == "prim::Constant":
            self._known[outputs[0]] = self._constant(node.output())
            return ()
        if kind == "prim::GetAttr":
            self._attribute(node)
            return ()
        if kind == "prim::SetAttr":
            if node.s("name") != COUNTER:
                raise UnsupportedError(f"it changes its own {node.s('name')!r}")
            return ()
        if kind in ("prim::If", "prim::Loop"):
            return (self._control(node, outputs),)
        inputs = tuple(self._value(value) for value in node.inputs())
        if kind == "prim::RaiseException":
            return (Call(_raised, inputs[:1], {}, node.kind()),)
        if kind in UNPACKED:
            return (Call(_unpacked, inputs, {}, outputs),)
        if kind in PRIMITIVES:
            return (Call(PRIMITIVES[kind], inputs, {}, outputs[0] if outputs else kind),)
        return (self._operator(node, inputs, outputs),)

    def _operator(self, node: Any, inputs: tuple[Any, ...], outputs: tuple[str, ...]) -> Step:
        schema = SCHEMA.match(node.schema())
        if schema is None:
            raise UnsupportedError(f"the operator {node.kind()}")
        name, overload = schema[1], schema[2] or "default"
        results = outputs[0] if len(outputs) == 1 else outputs
        tensors = any("Tensor" in str(value.type()) for value in node.inputs())
        lists = any(str(value.type()).startswith("List") for value in node.inputs())
        own = not tensors or name in OF_TENSORS or (lists and name in OF_LISTS)
        if name in PYTHON and own:
            return Call(PYTHON[name], inputs, {}, results or node.kind())
        packet = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if packet is None:
            raise UnsupportedError(f"the operator {node.kind()}")
        names = [argument.name for argument in packet._schema.arguments]
        arguments = dict(zip(names, inputs, strict=False))
        if isinstance(number := arguments.get("dtype"), int):
            arguments["dtype"] = DTYPES[number]
        return self._recorder.call(name, overload, arguments, results)

    def _control(self, node: Any, outputs: tuple[str, ...]) -> Step:
        inputs = [self._value(value) for value in node.inputs()]
        blocks = [
            self._block(block, tuple(value.debugName() for value in block.inputs()))
            for block in node.blocks()
        ]
        if node.kind() == "prim::If":
            return Branch(inputs[0], (blocks[0], blocks[1]), outputs)
        return Loop(inputs[0], inputs[1], tuple(inputs[2:]), blocks[0], outputs)

    def _attribute(self, node: Any) -> None:
        owner = self._paths.get(node.input().debugName())
        own, output = node.s("name"), node.output().debugName()
        if owner is None:
            raise UnsupportedError(f"the attribute {own!r} of an object that is no module")
        path = f"{owner}.{own}" if owner else own
        if path in self._modules:
            self._paths[output] = path
        elif path in self._tensors:
            self._known[output] = held(path)
        elif own == "training":
            self._known[output] = TRAINING
        else:
            self._known[output] = self._kept(getattr(self._modules[owner], own))

    def _constant(self, output: Any) -> Any:
        return self._kept(output.toIValue())

    def _kept(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"{CONSTANTS}.{len(self._tensors)}"
            self._tensors[name] = value.detach()
            return held(name)
        if isinstance(value, torch.device):
            return INPUT_DEVICE
        if isinstance(value, (bool, int, float, complex, str, type(None))):
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self._kept(part) for part in value)
        raise UnsupportedError(f"a constant of the type {type(value).__name__}")


def _raised(message: str) -> None:
    raise UnsupportedError(f"it raised: {message}")


def _unpacked(values: Any) -> Any:
    return values
