"""Which defenses there are: those of this folder, and those that other packages add."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from ggl_audit.basics.plugins import added_by_packages, kinds_beside
from ggl_audit.defenses.base import Declared, Step
from ggl_audit.errors import AuditError
from ggl_audit.messages import Message

PACKAGE_ADDS_NO_DEFENSE = Message(
    "code/package-adds-no-defense",
    "what a package adds as {name!r} to defenses is none: expected a class with a name, of "
    "ggl_audit.defenses.Defense or another kind of step",
    "Mend or uninstall it.",
    advice="Let the entry point name the class of a defense, as in [the "
    "README](../README.md#what-a-client-can-do-and-what-is-captured).",
)
DEFENSES_NAMED_ALIKE = Message(
    "code/defenses-named-alike",
    "two defenses are called {name!r}: {first} and {second}",
    "Uninstall the package that adds one of them, or rename that one.",
    advice="Uninstall the package that adds one of them, or give its class another `name`.",
)


@functools.cache
def shipped() -> dict[str, type[Declared]]:
    """The steps and recipes in the files of this folder, by name."""
    return _by_name(kinds_beside(__name__, Declared))


def known() -> dict[str, type[Declared]]:
    """The same, and what the installed packages add.

    Raises:
        AuditError: a package adds something else, cannot be imported, or gives a name that there is
            already.
    """
    added = added_by_packages("defenses")
    for point, kind in added.items():
        fits = isinstance(kind, type) and issubclass(kind, Declared) and hasattr(kind, "name")
        if not fits:
            raise AuditError(PACKAGE_ADDS_NO_DEFENSE(name=point))
    return _by_name([*shipped().values(), *added.values()])


def is_own(step: Step) -> bool:
    """Whether it is a user's own, or another package's, and not of this folder."""
    return type(step) not in shipped().values()


def _by_name(kinds: Iterable[type[Declared]]) -> dict[str, type[Declared]]:
    found: dict[str, type[Declared]] = {}
    for kind in kinds:
        other = found.setdefault(kind.name, kind)
        if other is not kind:
            raise AuditError(
                DEFENSES_NAMED_ALIKE(
                    name=kind.name, first=_whole_name(other), second=_whole_name(kind)
                )
            )
    return found


def _whole_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
