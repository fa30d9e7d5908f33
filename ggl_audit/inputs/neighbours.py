"""Imports Python files of the user's own, which may import the files beside them.

A file that the spec names may say ``from blocks import Block``, of a folder that Python does not
search. While such a file is imported, and while what it defines is called, its folder is searched
first. At other times neither the folder nor what was imported from it can be seen, so that files of
one name in two folders are not mixed up.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALLED = ("site-packages", "dist-packages")
OURS = "ggl_audit"


class Neighbours:
    """What was imported from one folder.

    Args:
        folder: with the user's files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, ModuleType] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._is_seen = False

    @property
    def is_stale(self) -> bool:
        """Whether a file that was imported has been changed since."""
        return any(_stamp(file) != stamp for file, stamp in self._stamps.items())

    def load(self, file: Path) -> ModuleType:
        """Imports a file of the folder, once.

        Raises:
            Exception: whatever the file raises.
        """
        with self.seen():
            names = (file.stem, f"{OURS}_user_{file.stem}")
            for name in names:
                if name in self._modules:
                    return self._modules[name]
            taken = file.stem in sys.modules or file.stem in sys.stdlib_module_names
            name = names[1] if taken else names[0]
            specification = importlib.util.spec_from_file_location(name, file)
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[name] = module
            try:
                specification.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
            return module

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Has the folder searched first, and what was imported from it known by its name."""
        if self._is_seen:
            yield
            return
        hidden = self._taken_away()
        before = set(sys.modules)
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self._folder))
        importlib.invalidate_caches()
        self._is_seen = True
        try:
            yield
        finally:
            self._is_seen = False
            with suppress(ValueError):  # the user's code may have taken it away
                sys.path.remove(str(self._folder))
            self._put_away(before)
            sys.modules.update(hidden)

    def runs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which finds its neighbours whenever it is called."""

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            with self.seen():
                return function(*arguments, **named)

        return run

    def _put_away(self, before: set[str]) -> None:
        """Takes what was imported from the folder out of what all can see."""
        new = {name: sys.modules[name] for name in sys.modules.keys() - before}
        for name, module in new.items():
            if self._is_own(new.get(name.partition(".")[0])):
                del sys.modules[name]
                self._modules[name] = module
                if (file := getattr(module, "__file__", None)) is not None:
                    self._stamps.setdefault(Path(file), _stamp(Path(file)))

    def _taken_away(self) -> dict[str, ModuleType]:
        """Takes modules out of sys.modules, not installed ones, in whose place the folder's come.

        Returns:
            What was taken away, to be put back.
        """
        there = [entry.name for entry in os.scandir(self._folder)]
        tops = {name.removesuffix(".py") for name in there} & sys.modules.keys()
        hidden = {top for top in tops if self._comes_before(sys.modules[top])}
        if not hidden:
            return {}
        names = [name for name in sys.modules if name.partition(".")[0] in hidden]
        return {name: sys.modules.pop(name) for name in names}

    def _is_own(self, module: ModuleType | None) -> bool:
        """Whether a module of the first level is a file or a package of the folder."""
        named = getattr(module, "__file__", None)
        file = Path(named) if named else None
        if file is not None and file.name != "__init__.py":
            return file.parent == self._folder
        places = [file.parent] if file is not None else getattr(module, "__path__", ())
        return any(Path(place).parent == self._folder for place in places)

    def _comes_before(self, module: ModuleType) -> bool:
        """Whether the folder has another module of a name, and this one is no library's."""
        name, file = module.__name__, getattr(module, "__file__", None)
        own = (self._folder / f"{name}.py", self._folder / name / "__init__.py")
        library = name in (OURS, "__main__") or name in sys.stdlib_module_names
        installed = file is not None and any(part in INSTALLED for part in Path(file).parts)
        there = any(candidate.is_file() for candidate in own)
        return there and not library and not installed and not self._is_own(module)


def imports_of(file: Path) -> list[Path]:
    """The files of a folder that one of them imports, and those that these import, sorted.

    Read off the import statements, so that it does not depend on what was imported before. Imports
    that are put together while the code runs are not seen.
    """
    folder, found, left = file.parent, set[Path](), [file]
    while left:
        for name in _imported_names(left.pop()):
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                place = folder.joinpath(*parts[:count])
                for candidate in (place.with_suffix(".py"), place / "__init__.py"):
                    if candidate.is_file() and candidate not in found | {file}:
                        found.add(candidate)
                        left.append(candidate)
    return sorted(found)


def _imported_names(file: Path) -> Iterator[str]:
    """The modules that a file imports, by their full names; of a package's own, from its folder."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.name if node.level else ""
            stem = ".".join(part for part in (package, node.module or "") if part)
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _stamp(file: Path) -> tuple[int, int]:
    """What changes with a file."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
