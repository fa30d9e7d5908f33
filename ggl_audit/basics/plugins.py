"""What other packages add to the program: they name it as an entry point, and it is found here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from ggl_audit.errors import AuditError

Group = Literal["defenses", "optimizers", "attacks", "experiments", "report_formats"]
"""What can be added; the group of the entry point is ``ggl_audit.`` and this."""


def added_by_packages(group: Group) -> dict[str, Any]:
    """What the installed packages add to a group, by the name that each gave it.

    Raises:
        AuditError: it cannot be imported, or two packages give the same name.
    """
    found: dict[str, Any] = {}
    for point in entry_points(group=f"ggl_audit.{group}"):
        package = "a package" if point.dist is None else point.dist.name
        if point.name in found:
            raise AuditError(
                f"{package} adds {point.name!r} to {group}, and so does another package",
                "Uninstall one of them.",
            )
        try:
            found[point.name] = point.load()
        except (Exception, SystemExit) as error:
            # Whatever another package raises is a fault in what is installed.
            raise AuditError(
                f"{package} adds {point.name!r} to {group}, but {point.value} cannot be imported "
                f"({type(error).__name__}: {error})",
                "Mend or uninstall it.",
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
            raise AuditError(
                f"a package adds {name!r} to {group} as {point!r}: the two have to be the same, "
                "and none of ours",
                "Mend or uninstall it.",
            )
    return {**ours, **added}
