"""Reads a spec from YAML and from the command line, and remembers which line said what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import AuditError, InputError, Key, SpecError, dotted
from ggl_audit.inputs.confinement import check_paths
from ggl_audit.inputs.yaml_file import NotYamlError, Yaml, parse_yaml, read_yaml
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

PLACE = re.compile(r"[0-9]{1,9}")

NO_ASSIGNMENT = Message(
    "spec/no-assignment",
    "--set {text!r}: expected path=value, for example --set seed=3",
    advice="Write the dotted key, an equals sign and the value.",
)
PARAMETER_WITHOUT_VALUE = Message(
    "spec/parameter-without-value",
    "--defense {text!r}: {parameter!r} has no value; expected name:parameter=value,..., for "
    "example clip:bound=1+noise:std=0.1",
    advice="Give each parameter as `name=value`.",
)
NO_VALUE = Message(
    "spec/no-value",
    "{flag}: {text!r} is not a YAML value ({reason})",
    advice="Put the value in quotes, as the shell or YAML takes some characters for its own.",
)
NO_MAPPING = Message(
    "spec/no-mapping",
    "expected a mapping of keys, found a {kind}",
    advice="Begin the file with `version: 1` and sections as `ggl-audit init` writes them.",
)
CANNOT_BE_WRITTEN_DOWN = Message(
    "spec/cannot-be-written-down",
    "holds a value that cannot be written down ({reason})",
    advice="Use plain YAML values, as the report repeats the spec.",
)
NUMBER_NOT_FINITE = Message(
    "spec/number-not-finite",
    "expected a finite number, found {number}",
    advice="Write a number; infinity and NaN mean nothing in a spec.",
)
NO_ENTRY = Message(
    "spec/no-entry",
    "there is no such entry; the list has {count}",
    advice="Count entries from 0, as in `--set defense.0.std=0.1`; `--defense` replaces the whole "
    "list.",
)
VALUE_HAS_NO_KEYS = Message(
    "spec/value-has-no-keys",
    "{key} is a value and has no keys",
    advice="Shorten the dotted key: what stands there in the spec is a value and no section.",
)


def read_spec(path: Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> Spec:
    """Reads, overrides and validates a spec.

    Args:
        path: the YAML file, or None when the command line declares everything.
        overrides: dotted keys and their values, applied in order: ``("defense.0.std", 0.1)``.

    Returns:
        The spec, which resolves its paths against the folder of the file (without a file, against
        the current folder).

    Raises:
        InputError: the file is missing or is not YAML.
        SpecError: a key is unknown, missing or has a wrong value, or a path in the file leads out
            of its folder.
    """
    declared = Yaml({}, None) if path is None else _read(path)
    data, node = declared.data, declared.node
    changed = []
    for key, value in overrides:
        changed.append(_override(data, key, value))
    if path is None:
        data.setdefault("version", 1)
    folder = path.parent if path else Path()

    def locate(key: Key) -> str:
        if any(key[: len(override)] == override for override in changed):
            return "command line:"
        return f"{path}:{_line(node, key)}:" if path else ""

    try:
        spec = _validated(data).placed(folder, locate)
        check_paths(spec, None if path is None else folder, changed)
    except SpecError as error:
        error.location = locate(error.key)
        raise
    return spec


def parse_override(text: str) -> tuple[str, Any]:
    """Splits ``path=value`` as ``--set`` takes it; the value is read as YAML.

    Raises:
        AuditError: there is no ``=``, or the value is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise AuditError(NO_ASSIGNMENT(text=text))
    return key, _value(value, f"--set {text!r}")


def parse_defense(text: str) -> list[dict[str, Any]]:
    """Reads a defense as ``--defense`` takes it: ``clip:bound=1+noise:std=0.1``, or ``none``.

    Raises:
        AuditError: a parameter has no value.
    """
    steps: list[dict[str, Any]] = []
    for part in text.split("+") if text != "none" else []:
        name, _, parameters = part.strip().partition(":")
        step: dict[str, Any] = {"name": name}
        for assignment in filter(None, parameters.split(",")):
            key, separator, value = assignment.partition("=")
            if not separator:
                raise AuditError(PARAMETER_WITHOUT_VALUE(text=text, parameter=assignment))
            step[key.strip()] = _value(value, f"--defense {text!r}")
        steps.append(step)
    return steps


def _value(text: str, where: str) -> Any:
    try:
        return parse_yaml(text).data
    except NotYamlError as error:
        raise AuditError(NO_VALUE(flag=where, text=text, reason=error.said)) from None


def _read(path: Path) -> Yaml:
    declared = read_yaml(path, "`ggl-audit init` writes a commented spec.")
    if declared.data is None:
        return Yaml({}, declared.node)
    if not isinstance(declared.data, dict):
        found = type(declared.data).__name__
        raise InputError(path, NO_MAPPING(kind=found))
    return declared


def _validated(data: dict[str, Any]) -> Spec:
    try:
        spec = Spec.model_validate(data)
        spec.model_dump_json()  # the report repeats the spec
    except ValidationError as error:
        raise SpecError(*first_problem(error, _keys_at)) from None
    except (ValueError, RecursionError) as error:
        raise SpecError((), CANNOT_BE_WRITTEN_DOWN(reason=error)) from None
    for key, number in _numbers(spec.model_dump(), ()):
        if not math.isfinite(number):
            raise SpecError(key, NUMBER_NOT_FINITE(number=number))
    return spec


def _override(data: dict[str, Any], dotted_key: str, value: Any) -> Key:
    parts: list[str | int] = [
        int(part) if PLACE.fullmatch(part) else part for part in dotted_key.split(".")
    ]
    container: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = tuple(parts[: depth + 1])
        if isinstance(container, list):
            if not isinstance(part, int) or part >= len(container):
                raise SpecError(here, NO_ENTRY(count=len(container)))
        elif not isinstance(container, dict):
            raise SpecError(here, VALUE_HAS_NO_KEYS(key=dotted(tuple(parts[:depth]))))
        if last:
            container[part] = value
        elif isinstance(container, dict):
            container = container.setdefault(part, {})
        else:
            container = container[part]
    return tuple(parts)


def _line(node: yaml.Node | None, key: Key) -> int:
    line = 1
    for part in key:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == str(part):
                    child, line = value, name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            child = next(iter(node.value[part:]), None)
            line = child.start_mark.line + 1 if child else line
        if child is None:
            break
        node = child
    return line


def _numbers(value: Any, key: Key) -> Iterator[tuple[Key, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from _numbers(part, (*key, name))


def _keys_at(key: Key) -> list[str]:
    section: type[BaseModel] = Spec
    for part in key:
        field = section.model_fields.get(str(part))
        candidates = [] if field is None else _sections(field.annotation)
        if not candidates:
            break
        section = candidates[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for part in getattr(annotation, "__args__", ()) for s in _sections(part)]
