"""A room imports from the rooms below it in docs/architecture.md, and each room is on that page."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ggl_audit
from ggl_audit.defenses import Aggregation, SecureAggregation

SOURCE = Path(ggl_audit.__file__).parent
PAGE = (SOURCE.parent / "docs" / "architecture.md").read_text()
ROOMS = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", PAGE, re.MULTILINE)
DOORS = {"__init__", "__main__", "__pycache__"}


def imported(source: str) -> Iterator[str]:
    """The rooms that a program imports from, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ggl_audit":
            yield from (name.name for name in node.names if name.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ggl_audit."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("ggl_audit."))


def upward(room: str, source: str) -> list[str]:
    """The rooms above its own that a program imports from."""
    return [other for other in imported(source) if ROOMS.index(other) < ROOMS.index(room)]


def test_each_room_is_on_the_page() -> None:
    there = {path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert there - DOORS == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_below_alone(room: str) -> None:
    file = SOURCE / f"{room}.py"
    for path in [file] if file.exists() else (SOURCE / room).rglob("*.py"):
        assert upward(room, path.read_text()) == [], path


def test_an_import_that_points_up_is_found() -> None:
    assert upward("defenses", "from ggl_audit.attack.matching import Matching") == ["attack"]
    assert upward("defenses", "def f():\n    import ggl_audit.audit") == ["audit"]
    assert upward("defenses", "from ggl_audit import experiments") == ["experiments"]
    assert upward("attack", "from ggl_audit.defenses import Pipeline") == []


def test_each_file_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (SOURCE / name).is_file() or list(SOURCE.rglob(name)), name


def kinds_asked_for(module: ModuleType) -> Iterator[type]:
    """The classes that a module asks by ``isinstance`` or ``issubclass`` whether something is."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id in ("isinstance", "issubclass"):
            asked = ast.walk(node.args[1])
            found = [getattr(module, one.id, None) for one in asked if isinstance(one, ast.Name)]
            yield from (kind for kind in found if isinstance(kind, type))


def is_one_of_several(kind: type) -> bool:
    """Whether a class of ours is a single defense, optimizer, attack or experiment."""
    return kind.__module__.startswith("ggl_audit") and isinstance(vars(kind).get("name"), str)


def test_nobody_asks_which_of_several_kinds_a_thing_is() -> None:
    assert is_one_of_several(SecureAggregation)
    assert not is_one_of_several(Aggregation)
    for path in SOURCE.rglob("*.py"):
        if path.stem not in DOORS:
            name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
            module = importlib.import_module(name)
            assert not [kind for kind in kinds_asked_for(module) if is_one_of_several(kind)], name
