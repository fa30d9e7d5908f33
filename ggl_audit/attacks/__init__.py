"""The attacks of an audit, one a file, in the order in which they are made."""

from __future__ import annotations

from ggl_audit.attacks import analytic, ggl, pixels, refined
from ggl_audit.attacks.attack import Attack
from ggl_audit.basics.plugins import with_packages

IN_ORDER: tuple[type[Attack], ...] = (
    ggl.GenerativeGradientLeakage,
    refined.Refined,
    pixels.Pixels,
    analytic.Analytic,
)


def known_attacks() -> dict[str, type[Attack]]:
    """All attacks by name, in the order in which they are made: ours, then those of packages."""
    return with_packages("attacks", {attack.name: attack for attack in IN_ORDER})
