"""Which optimizers there are: each file of this folder registers its own, packages add others."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TypeVar

from ggl_audit.basics.plugins import added_by_packages
from ggl_audit.errors import AuditError, SpecError, nearest
from ggl_audit.messages import Message
from ggl_audit.optimizers.family import ANY_NAME, Family

Kind = TypeVar("Kind", bound=type[Family])

KEY = ("attack", "optimizer")

TOLD = ("name", "source", "good_for")
"""Traits that have no default."""

_registered: list[type[Family]] = []

OPTIMIZERS_NAMED_ALIKE = Message(
    "code/optimizers-named-alike",
    "{first} and {second} are both the optimizer {name!r}",
    "Rename one of them, or uninstall its package.",
    advice="Rename one of the two, or uninstall its package.",
)
NO_VARIANT = Message(
    "spec/no-variant",
    "{package} has no optimizer {name!r}",
    "{nearest}",
    advice="Choose one of `ggl-audit list optimizers` for `attack.optimizer`.",
)
UNKNOWN_OPTIMIZER = Message(
    "spec/unknown-optimizer",
    "there is no optimizer {name!r}",
    "{nearest} `ggl-audit list optimizers` shows all.",
    advice="Choose one of `ggl-audit list optimizers` for `attack.optimizer`.",
)
MEND_OR_UNINSTALL = (
    "Mend or uninstall the package; [CONTRIBUTING.md](../CONTRIBUTING.md) names a file to imitate."
)
NO_OPTIMIZER = Message(
    "code/no-optimizer",
    "the optimizer {name!r} of another package is a {kind}; expected a class that derives from "
    "ggl_audit.optimizers.Family",
    "Mend or uninstall the package.",
    advice=MEND_OR_UNINSTALL,
)
LACKS_TRAIT = Message(
    "code/lacks-trait",
    "the optimizer {optimizer} has no {trait}",
    'Give it: {trait}: ClassVar[str] = "...".',
    advice=MEND_OR_UNINSTALL,
)


def register(family: Kind) -> Kind:
    """Makes a family of this folder known; decorates its class."""
    _registered.append(family)
    return family


def families() -> dict[str, type[Family]]:
    """All families by name, in the order of their names.

    Raises:
        AuditError: what a package adds is no family or has the name of another.
    """
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    found: dict[str, type[Family]] = {}
    for family in [*_registered, *_added()]:
        for name, other in found.items():
            if _overlap(name, family.name):
                raise AuditError(
                    OPTIMIZERS_NAMED_ALIKE(
                        first=_place(family), second=_place(other), name=family.name
                    )
                )
        found[family.name] = family
    return dict(sorted(found.items()))


def find_family(name: str) -> type[Family]:
    """The family of a declared optimizer.

    Raises:
        SpecError: there is none.
    """
    known = families()
    prefix, _, variant = name.partition(":")
    open_family = known.get(prefix + ANY_NAME)
    if open_family is not None and variant:
        variants = open_family.variants()
        if variant not in variants:
            raise SpecError(
                KEY, NO_VARIANT(package=prefix, name=variant, nearest=nearest(variant, variants))
            )
        return open_family
    if name not in known:
        raise SpecError(KEY, UNKNOWN_OPTIMIZER(name=name, nearest=nearest(name, known)))
    return known[name]


def _added() -> list[type[Family]]:
    """The families that other packages add."""
    found: list[type[Family]] = []
    for point, family in added_by_packages("optimizers").items():
        if not isinstance(family, type) or not issubclass(family, Family):
            raise AuditError(NO_OPTIMIZER(name=point, kind=type(family).__name__))
        for trait in TOLD:
            if not isinstance(getattr(family, trait, None), str):
                raise AuditError(LACKS_TRAIT(optimizer=_place(family), trait=trait))
        found.append(family)
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether one declared name could mean either family."""
    pairs = ((one, other), (other, one))
    return one == other or any(
        first.endswith(ANY_NAME) and second.startswith(first.removesuffix("NAME"))
        for first, second in pairs
    )


def _place(family: type[Family]) -> str:
    return f"{family.__module__}.{family.__qualname__}"
