"""Reads a spec from YAML and from the command line, and remembers which line said what."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ggl_audit.errors import AuditError, InputError, Key, SpecError, dotted
from ggl_audit.spec import Spec
from ggl_audit.validation import first_problem

LARGEST_SPEC_BYTES = 1_000_000


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
        SpecError: a key is unknown, missing or has a wrong value.
    """
    text = _read_text(path) if path else ""
    data, node = _parse(text, path)
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
        spec = Spec.model_validate(data)
        spec.model_dump_json()  # the report repeats the spec
        return spec.placed(folder, locate)
    except ValidationError as error:
        wrong = SpecError(*first_problem(error, _keys_at))
        wrong.location = locate(wrong.key)
        raise wrong from None
    except (ValueError, RecursionError) as error:
        raise SpecError((), f"holds a value that cannot be written down ({error})") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Splits ``path=value`` as ``--set`` takes it; the value is read as YAML.

    Raises:
        AuditError: there is no ``=``, or the value is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise AuditError(f"--set {text!r}: expected path=value, for example --set seed=3")
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
                raise AuditError(
                    f"--defense {text!r}: {assignment!r} has no value; "
                    "expected name:parameter=value,..., for example clip:bound=1+noise:std=0.1"
                )
            step[key.strip()] = _value(value, f"--defense {text!r}")
        steps.append(step)
    return steps


def _value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise AuditError(f"{where}: {text!r} is not a YAML value") from None


def _read_text(path: Path) -> str:
    if not path.exists():
        raise InputError(path, "no such file", "`ggl-audit init` writes a commented spec.")
    if not path.is_file():
        raise InputError(path, "not a file; expected a YAML spec")
    if path.stat().st_size > LARGEST_SPEC_BYTES:
        raise InputError(path, f"larger than {LARGEST_SPEC_BYTES:,} bytes; that is not a spec")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(path, "not a text file; expected a YAML spec") from None


def _parse(text: str, path: Path | None) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it nests too deep or holds a bad value"
        raise InputError(where, f"not valid YAML: {problem}") from None
    if data is None:
        data = {}
    _refuse_duplicates(node, path)
    if not isinstance(data, dict):
        raise InputError(path or "", f"expected a mapping of keys, found a {type(data).__name__}")
    return data, node


def _refuse_duplicates(node: yaml.Node | None, path: Path | None) -> None:
    """YAML takes the last of two equal keys without a word; here both may decide a verdict."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, yaml.MappingNode):
            names = set()
            for key, value in current.value:
                if key.value in names:
                    line = key.start_mark.line + 1
                    raise InputError(f"{path}:{line}", f"the key {key.value!r} stands here twice")
                names.add(key.value)
                waiting.append(value)
        elif isinstance(current, yaml.SequenceNode):
            waiting.extend(current.value)


def _override(data: dict[str, Any], dotted_key: str, value: Any) -> Key:
    parts: list[str | int] = [int(p) if p.isdecimal() else p for p in dotted_key.split(".")]
    container: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = tuple(parts[: depth + 1])
        if isinstance(container, list):
            if not isinstance(part, int) or part >= len(container):
                raise SpecError(here, f"there is no such entry; the list has {len(container)}")
        elif not isinstance(container, dict):
            raise SpecError(here, f"{dotted(tuple(parts[:depth]))} is a value and has no keys")
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
        elif isinstance(node, yaml.SequenceNode) and str(part).isdecimal():
            child = next(iter(node.value[int(part) :]), None)
            line = child.start_mark.line + 1 if child else line
        if child is None:
            break
        node = child
    return line


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
