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

from ggl_audit.basics.files import CANNOT_BE_READ, no_file
from ggl_audit.errors import AuditError, InputError
from ggl_audit.messages import Message, Said

LARGEST_BYTES = 100_000
MOST_NODES = 5_000
"""Keys and values, each alias counted as what it stands for."""

DEEPEST = 50
LONGEST_KEY = 200
LONGEST_INTEGER = 40

GIVE_THE_SPEC = "Give the spec itself; tensors and images have keys of their own."
NOT_YAML_FILE = Message(
    "yaml/not-yaml-file",
    "not a file; expected a text in YAML",
    advice=GIVE_THE_SPEC,
)
LARGE_YAML = Message(
    "yaml/large-yaml",
    "larger than {limit:,} bytes; expected a short YAML file",
    advice=GIVE_THE_SPEC,
)
NOT_UTF_8 = Message(
    "yaml/not-utf-8",
    "not a text in UTF-8; expected YAML",
    advice=GIVE_THE_SPEC,
)
CORRECT_THE_LINE = (
    "Correct the line: usual causes are tabs, a missing space after a colon, and text with `:` or "
    "`#` that is not in quotes."
)
CHARACTER = Message(
    "yaml/character",
    "not valid YAML: the character {character}",
    advice=CORRECT_THE_LINE,
)
NOT_YAML = Message(
    "yaml/not-yaml",
    "not valid YAML: {reason}",
    advice=CORRECT_THE_LINE,
)
NO_VALUE_OF_ITS_KIND = Message(
    "yaml/no-value-of-its-kind",
    "not valid YAML: a value that is not of its kind",
    advice=CORRECT_THE_LINE,
)
WRITE_OUT = "Write out what anchors and aliases stand for; no spec needs so much."
HOLDS_ITSELF = Message(
    "yaml/holds-itself",
    "holds itself, by an alias",
    advice=WRITE_OUT,
)
TOO_DEEP = Message(
    "yaml/too-deep",
    "nests deeper than {limit} levels",
    advice=WRITE_OUT,
)
TOO_MANY = Message(
    "yaml/too-many",
    "holds more than {limit:,} keys and values",
    advice=WRITE_OUT,
)
KEY_IS_NO_NAME = Message(
    "yaml/key-is-no-name",
    "a key that is no name",
    advice="Write keys as short plain text.",
)
KEY_TWICE = Message(
    "yaml/key-twice",
    "the key {key!r} stands here twice",
    advice="Keep one of the two.",
)
TOO_MANY_DIGITS = Message(
    "yaml/too-many-digits",
    "a number of {count} digits",
    advice="Write a shorter number, or text in quotes.",
)
VALUE_OF_OTHER_KIND = Message(
    "yaml/value-of-other-kind",
    "a value of the kind {kind!r}; expected text, a number, true, false, null, a list or a mapping",
    "Put text in quotes.",
    advice="Put dates and the like in quotes, and leave out tags such as `!!set`.",
)


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

    def __init__(self, said: Said, line: int | None = None) -> None:
        super().__init__(said)
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
            raise no_file(path, remedy)
        if not path.is_file():
            raise InputError(path, NOT_YAML_FILE())
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise InputError(path, CANNOT_BE_READ(reason=error.strerror)) from None
    if len(content) > LARGEST_BYTES:
        raise InputError(path, LARGE_YAML(limit=LARGEST_BYTES))
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(path, NOT_UTF_8()) from None
    except NotYamlError as error:
        where = path if error.line is None else f"{path}:{error.line}"
        raise InputError(where, error.said) from None


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
        raise NotYamlError(CHARACTER(character=found), line=line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotYamlError(
            NOT_YAML(reason=error.problem or error.context),
            line=None if mark is None else mark.line + 1,
        ) from None
    except (ValueError, KeyError, IndexError, OverflowError):
        # PyYAML fails so on a tag or an escape that the value does not fit.
        raise NotYamlError(NO_VALUE_OF_ITS_KIND()) from None


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
            raise NotYamlError(HOLDS_ITSELF(), line=line)
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
            raise NotYamlError(TOO_DEEP(limit=DEEPEST), line=line)
        if self._nodes > MOST_NODES:
            raise NotYamlError(TOO_MANY(limit=MOST_NODES), line=line)


def _check_keys(node: yaml.MappingNode) -> None:
    """YAML takes the last of two equal keys without a word; here both may decide a verdict."""
    names = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > LONGEST_KEY:
            raise NotYamlError(KEY_IS_NO_NAME(), line=line)
        if key.value in names:
            raise NotYamlError(KEY_TWICE(key=key.value), line=line)
        names.add(key.value)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > LONGEST_INTEGER:
        line = node.start_mark.line + 1
        raise NotYamlError(TOO_MANY_DIGITS(count=len(node.value)), line=line)
    return loader.construct_yaml_int(node)


def _undefined(_: _Loader, node: yaml.Node) -> Hashable:
    raise NotYamlError(
        VALUE_OF_OTHER_KIND(kind=node.tag.rpartition(":")[2]), line=node.start_mark.line + 1
    )


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(None, _undefined)
