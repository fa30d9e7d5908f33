"""What other packages add to the program: they name it as an entry point, and it is found here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
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
