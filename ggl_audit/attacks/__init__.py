"""The attacks of an audit, one a file; each registers itself."""

from __future__ import annotations

from ggl_audit.attacks import analytic, ggl, pixels, refined
from ggl_audit.attacks.attack import Attack
from ggl_audit.basics.plugins import added_by_packages

IN_ORDER: tuple[type[Attack], ...] = (
    ggl.GenerativeGradientLeakage,
    refined.Refined,
    pixels.Pixels,
    analytic.Analytic,
)


def known_attacks() -> dict[str, type[Attack]]:
    """All attacks by name, in the order in which they are made: ours, then those of packages."""
    ours = {attack.name: attack for attack in IN_ORDER}
    return {**ours, **added_by_packages("attacks")}
