"""Which attacks there are: those of this folder, and those that other packages add."""

from __future__ import annotations

from ggl_audit.attacks.attack import Attack
from ggl_audit.basics.plugins import kinds_beside, with_packages


def known_attacks() -> dict[str, type[Attack]]:
    """All attacks by name, in the order in which they are made: ours, then those of packages.

    Raises:
        AuditError: a package's cannot be imported, or gives a name that there is already.
    """
    ours = sorted(kinds_beside(__name__, Attack), key=lambda kind: kind.turn)
    return with_packages("attacks", {kind.name: kind for kind in ours})
