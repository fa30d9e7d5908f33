"""Which attacks there are: those of this folder, and those that other packages add."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from ggl_audit.attacks.attack import Attack
from ggl_audit.basics.plugins import with_packages


def known_attacks() -> dict[str, type[Attack]]:
    """All attacks by name, in the order in which they are made: ours, then those of packages.

    Raises:
        AuditError: a package's cannot be imported, or gives a name that there is already.
    """
    package = __name__.rpartition(".")[0]
    modules = [
        importlib.import_module(f"{package}.{file.name}")
        for file in pkgutil.iter_modules([str(Path(__file__).parent)])
    ]
    ours = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Attack)
        and kind.__module__ == module.__name__
        and "name" in vars(kind)
    ]
    ours.sort(key=lambda kind: kind.turn)
    return with_packages("attacks", {kind.name: kind for kind in ours})
