"""Reads YAML that somebody else may have written: within a second, and every key once.

Values are those of JSON: text, numbers, true, false, null, lists and mappings. YAML's dates, bytes
and sets are refused, because a report could not repeat them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ggl_audit.errors import AuditError, InputError

LARGEST_BYTES = 100_000
MOST_NODES = 5_000
"""Keys and values, each alias counted as what it stands for."""

DEEPEST = 50
LONGEST_KEY = 200
LONGEST_INTEGER = 40


@dataclass(frozen=True)
class Yaml:
    """What a text says.

    Attributes:
        data: dicts, lists and plain values; None for an empty text.
        node: the same with its places in the text; None for an empty text.
    """

    data: Any
    node: yaml.Node | None


class NotYamlError(AuditError):
    """A text that is not YAML as it is taken here.

    Attributes:
        line: where, from 1; None where that is not known.
    """

    def __init__(self, problem: str, remedy: str = "", line: int | None = None) -> None:
        super().__init__(problem, remedy)
        self.line = line


def read_yaml(path: Path, remedy: str = "") -> Yaml:
    """Reads a file.

    Args:
        path: the file.
        remedy: what to do where there is none.

    Raises:
        InputError: missing, too large, not text, or not YAML: with the line.
    """
    try:
        if not path.exists():
            raise InputError(path, "no such file", remedy)
        if not path.is_file():
            raise InputError(path, "not a file; expected a text in YAML")
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_BYTES:
        raise InputError(path, f"larger than {LARGEST_BYTES:,} bytes; expected a short YAML file")
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(path, "not a text in UTF-8; expected YAML") from None
    except NotYamlError as error:
        where = path if error.line is None else f"{path}:{error.line}"
        raise InputError(where, error.problem, error.remedy) from None


def parse_yaml(text: str) -> Yaml:
    """Reads a text.

    Raises:
        NotYamlError: not YAML, a key twice, a value that JSON has not, too deep, too long, or
            aliases that multiply.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Yaml(None if node is None else loader.construct_document(node), node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = repr(chr(error.character))
        raise NotYamlError(f"not valid YAML: the character {found}", line=line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotYamlError(
            f"not valid YAML: {error.problem or error.context}",
            line=None if mark is None else mark.line + 1,
        ) from None
    except (ValueError, KeyError, IndexError, OverflowError):
        # PyYAML fails so on a tag or an escape that the value does not fit.
        raise NotYamlError("not valid YAML: a value that is not of its kind") from None


class _Loader(yaml.SafeLoader):
    """Counts while it composes, so that nothing large is ever made."""

    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # nodes and levels from a node on

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._limit(0, line)
        node = super().compose_node(parent, index)
        assert node is not None
        if alias and id(node) not in self._sizes:
            raise NotYamlError("holds itself, by an alias", line=line)
        if not alias:
            self._sizes[id(node)] = self._measure(node)
        nodes, levels = self._sizes[id(node)]
        self._nodes += nodes if alias else 1
        self._limit(levels, line)
        self._depth -= 1
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        sizes = [self._sizes[id(part)] for part in parts]
        levels = 1 + max((levels for _, levels in sizes), default=-1)
        return 1 + sum(nodes for nodes, _ in sizes), levels

    def _limit(self, levels: int, line: int) -> None:
        if self._depth + levels > DEEPEST:
            raise NotYamlError(f"nests deeper than {DEEPEST} levels", line=line)
        if self._nodes > MOST_NODES:
            raise NotYamlError(f"holds more than {MOST_NODES:,} keys and values", line=line)


def _check_keys(node: yaml.MappingNode) -> None:
    """YAML takes the last of two equal keys without a word; here both may decide a verdict."""
    names = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > LONGEST_KEY:
            raise NotYamlError("a key that is no name", line=line)
        if key.value in names:
            raise NotYamlError(f"the key {key.value!r} stands here twice", line=line)
        names.add(key.value)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > LONGEST_INTEGER:
        line = node.start_mark.line + 1
        raise NotYamlError(f"a number of {len(node.value)} digits", line=line)
    return loader.construct_yaml_int(node)


def _undefined(_: _Loader, node: yaml.Node) -> Hashable:
    raise NotYamlError(
        f"a value of the kind {node.tag.rpartition(':')[2]!r}; expected text, a number, true, "
        "false, null, a list or a mapping",
        "Put text in quotes.",
        line=node.start_mark.line + 1,
    )


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(None, _undefined)
