"""What there is of a kind: in a folder of this program, and by entry points of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, TypeVar

from ggl_audit.errors import AuditError, raised
from ggl_audit.messages import Message

Group = Literal["defenses", "optimizers", "attacks", "experiments", "report_formats"]
"""What can be added; the group of the entry point is ``ggl_audit.`` and this."""

ADDED_TWICE = Message(
    "code/added-twice",
    "{package} adds {name!r} to {group}, and so does another package",
    "Uninstall one of them.",
    advice="Uninstall one of the two.",
)
PACKAGE_FAILS = Message(
    "code/package-fails",
    "{package} adds {name!r} to {group}, but {module} cannot be imported ({error})",
    "Mend or uninstall it.",
    advice="Mend or uninstall the package, which adds a part to this program by an entry point.",
)
OTHER_NAME = Message(
    "code/other-name",
    "a package adds {name!r} to {group} as {point!r}: the two have to be the same, and none of "
    "ours",
    "Mend or uninstall it.",
    advice="Mend or uninstall the package: its entry point has to have the name that its class "
    "has.",
)


def kinds_beside(module: str, base: type[Kind]) -> list[type[Kind]]:
    """The classes with a ``name`` that the files of a folder define, by the files' names.

    Args:
        module: the name of one of its modules.
        base: what they derive from.
    """
    package = module.rpartition(".")[0]
    folder = Path(str(import_module(package).__file__)).parent
    files = [import_module(f"{package}.{file.name}") for file in iter_modules([str(folder)])]
    return [
        kind
        for file in files
        for kind in vars(file).values()
        if isinstance(kind, type)
        and issubclass(kind, base)
        and kind.__module__ == file.__name__
        and "name" in vars(kind)
    ]


def added_by_packages(group: Group) -> dict[str, Any]:
    """What the installed packages add to a group, by the name that each gave it.

    Raises:
        AuditError: it cannot be imported, or two packages give the same name.
    """
    found: dict[str, Any] = {}
    for point in entry_points(group=f"ggl_audit.{group}"):
        package = "a package" if point.dist is None else point.dist.name
        if point.name in found:
            raise AuditError(ADDED_TWICE(package=package, name=point.name, group=group))
        try:
            found[point.name] = point.load()
        except (Exception, SystemExit) as error:
            # Whatever another package raises is a fault in what is installed.
            raise AuditError(
                PACKAGE_FAILS(
                    package=package,
                    name=point.name,
                    group=group,
                    module=point.value,
                    error=raised(error),
                )
            ) from error
    return found


Kind = TypeVar("Kind")


def with_packages(group: Group, ours: Mapping[str, Kind]) -> dict[str, Kind]:
    """What there is of a kind, by name: ours, then what packages add.

    Args:
        group: the kind.
        ours: by name.

    Raises:
        AuditError: a package adds what there is already, or under another name than its own.
    """
    added = added_by_packages(group)
    for point, thing in added.items():
        name = getattr(thing, "name", point)
        if point in ours or name != point:
            raise AuditError(OTHER_NAME(name=name, group=group, point=point))
    return {**ours, **added}
