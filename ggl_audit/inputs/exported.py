"""Translates a torch.export program, as its JSON has it, to steps that run as a module.

PyTorch's own reader evaluates expressions that stand in the file and looks up functions by names in
it, so that a crafted file can run code. This one knows numbers, names of values, and operators.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ggl_audit.inputs.interpreter import (
    UNKNOWN_OPERATOR,
    Block,
    Call,
    Program,
    Recorder,
    Recording,
    UnsupportedError,
    Value,
    held,
)
from ggl_audit.messages import Message

ATEN = "torch.ops.aten."

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""The numbers that torch.export gives to types of numbers."""

MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
STRIDED = 7
DICT = "builtins.dict"

ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "_operator.add": operator.add,
    "_operator.and_": operator.and_,
    "_operator.eq": operator.eq,
    "_operator.floordiv": operator.floordiv,
    "_operator.ge": operator.ge,
    "_operator.getitem": operator.getitem,
    "_operator.gt": operator.gt,
    "_operator.le": operator.le,
    "_operator.lt": operator.lt,
    "_operator.mod": operator.mod,
    "_operator.mul": operator.mul,
    "_operator.ne": operator.ne,
    "_operator.neg": operator.neg,
    "_operator.or_": operator.or_,
    "_operator.sub": operator.sub,
    "_operator.truediv": operator.truediv,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
}
"""What a program does with sizes."""

PLAIN = ("as_bool", "as_bools", "as_int", "as_ints", "as_int_lists", "as_string", "as_strings")
NAMED = ("as_sym_bool", "as_sym_float", "as_sym_int", "as_tensor")
LISTS = {
    "as_tensors": "as_tensor",
    "as_sym_ints": "as_sym_int",
    "as_sym_bools": "as_sym_bool",
    "as_sym_floats": "as_sym_float",
}

UNKNOWN_INPUT = Message(
    "program/unknown-input",
    "an input of the kind {kind}",
    advice="Give a factory; the program holds more than tensors and numbers.",
)
SEVERAL_VALUES = Message(
    "program/several-values",
    "it returns {count} values",
    advice="Wrap the module before it is saved, so that it takes images (a generator: latents, or "
    "latents and labels) and returns one tensor.",
)
UNKNOWN_RESULT = Message(
    "program/unknown-result",
    "the operator {operator}, which gives {kind}",
    advice="Give a factory: only operators of PyTorch that compute on tensors are run from a file.",
)
UNKNOWN_ARGUMENT = Message(
    "program/unknown-argument",
    "an argument of the kind {kind}",
    advice="Give a factory; the program holds more than tensors and numbers.",
)


def translate(model: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
    """Makes a module of an exported program.

    Args:
        model: the program, as its JSON has it.
        tensors: parameters, buffers and constants, by their names.

    Raises:
        UnsupportedError: it does what cannot be run here.
        LookupError, TypeError, ValueError: the JSON is not of a program.
    """
    graph, signature = model["graph_module"]["graph"], model["graph_module"]["signature"]
    names: dict[str, Value] = {}
    kept: dict[str, torch.Tensor] = {}
    constants: set[str] = set()
    inputs: list[str] = []
    for specification in signature["input_specs"]:
        (kind, own), *_ = specification.items()
        if kind == "user_input":
            inputs.append(own["arg"]["as_tensor"]["name"])
            continue
        if kind == "constant_input":  # a default, which stands in the graph too
            continue
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise UnsupportedError(UNKNOWN_INPUT(kind=kind))
        name = own[f"{kind}_name"]
        tensor = tensors[name]
        kept[name] = tensor if kind == "parameter" else tensor.detach()
        if kind == "tensor_constant" or (kind == "buffer" and not own.get("persistent", True)):
            constants.add(name)
        if kind == "parameter" and not isinstance(tensor, nn.Parameter):
            kept[name] = nn.Parameter(tensor)
        names[own["arg"]["name"]] = held(name)
    # PyTorch 2.6 lists inputs as they are used, but tensors as the model names them.
    kept = {name: kept[name] for name in tensors if name in kept}
    results = [own["user_output"] for own in signature["output_specs"] if "user_output" in own]
    if not results:
        raise UnsupportedError(SEVERAL_VALUES(count=len(results)))
    recorder = Recorder()
    steps = tuple(_step(node, names, recorder) for node in graph["nodes"])
    body = Block(tuple(inputs), steps, tuple(_argument(own["arg"], names) for own in results))
    batch = graph["tensor_values"][inputs[0]]["sizes"][0].get("as_int")
    keys = _keys(model["graph_module"], len(results))
    recording = Recording(body, frozenset(recorder.modes), recorder.normalizes, batch, keys)
    return Program(kept, constants, recording)


def _keys(graph_module: Mapping[str, Any], results: int) -> tuple[str, ...]:
    """Those of the dict that it returns, if it returns a dict of tensors and says so."""
    try:
        _, returned = json.loads(graph_module["module_call_graph"][0]["signature"]["out_spec"])
        is_flat = not any(child["children_spec"] for child in returned["children_spec"])
        keys = json.loads(returned["context"]) if returned["type"] == DICT and is_flat else ()
    except (LookupError, TypeError, ValueError):
        return ()
    named = len(keys) == results and all(isinstance(key, str) for key in keys)
    return tuple(keys) if named else ()


def _step(node: Mapping[str, Any], names: Mapping[str, Value], recorder: Recorder) -> Call:
    target = node["target"]
    arguments = {own["name"]: _argument(own["arg"], names) for own in node["inputs"]}
    outputs = _outputs(node)
    if target in ON_NUMBERS:
        return Call(ON_NUMBERS[target], tuple(arguments.values()), {}, outputs)
    name, _, overload = target.removeprefix(ATEN).partition(".")
    if not target.startswith(ATEN) or not overload:
        raise UnsupportedError(UNKNOWN_OPERATOR(operator=target))
    return recorder.call(name, overload, arguments, outputs)


def _outputs(node: Mapping[str, Any]) -> str | tuple[str, ...]:
    named = []
    for output in node["outputs"]:
        (kind, own), *_ = output.items()
        if kind == "as_tensors" and len(node["outputs"]) == 1:
            return tuple(one["name"] for one in own)
        if kind not in NAMED and kind != "as_none":
            raise UnsupportedError(UNKNOWN_RESULT(operator=node["target"], kind=kind))
        named.append("" if kind == "as_none" else own.get("name", own.get("as_name")))
    return named[0] if len(named) == 1 else tuple(named)


def _argument(argument: Mapping[str, Any], names: Mapping[str, Value]) -> Any:
    (kind, value), *_ = argument.items()
    if kind in PLAIN:
        return value
    if kind == "as_none":
        return None
    if kind in ("as_float", "as_floats"):  # which may be words: -Infinity
        return [float(one) for one in value] if kind == "as_floats" else float(value)
    if kind in NAMED:
        name = value.get("name", value.get("as_name"))
        if name is None:
            return next(iter(value.values()))  # a size that is a number
        return names.get(name, Value(name))
    if kind in LISTS:
        return [_argument({LISTS[kind]: part}, names) for part in value]
    if kind == "as_optional_tensors":
        return [_argument(part, names) for part in value]
    if kind == "as_scalar_type":
        return DTYPES[value]
    if kind == "as_memory_format":
        return MEMORY_FORMATS[value]
    if kind == "as_device":
        return torch.device("cpu")  # it follows the input
    if kind == "as_layout" and value == STRIDED:
        return torch.strided
    raise UnsupportedError(UNKNOWN_ARGUMENT(kind=kind))
