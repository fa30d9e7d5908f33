"""``ggl-audit list``: what can be declared, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated

import typer


class Kind(str, Enum):
    """What can be listed."""

    DEFENSES = "defenses"
    OPTIMIZERS = "optimizers"
    PRIORS = "priors"
    ATTACKS = "attacks"
    EXPERIMENTS = "experiments"
    FORMATS = "formats"


def list_parts(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what can be declared or is made, with its parameters and sources."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False)
    if kind is Kind.DEFENSES:
        table.add_column("name")
        table.add_column("what to know of it")
        for name, known in _defenses():
            table.add_row(Text(name), Text(known))
            table.add_row()
    else:
        columns, rows = LISTED[kind]()
        for column in columns:
            table.add_column(column, no_wrap=column == "name")
        for row in rows:
            table.add_row(*map(Text, row))
    Console().print(table)


def _defenses() -> list[tuple[str, str]]:
    from ggl_audit.defenses import known

    listed = []
    for name, defense in sorted(known().items()):
        said = [(defense.__doc__ or "").splitlines()[0]]
        for key, field in defense.model_fields.items():
            needed = "needed" if field.is_required() else f"default {field.default}"
            said.append(f"{key}: {field.description} ({needed})")
        said += [
            f"source: {defense.source}",
            f"guarantee: {defense.promise}",
            f"broken by: {defense.broken_by}",
        ]
        listed.append((name, "\n".join(said)))
    return listed


Rows = tuple[Sequence[str], Sequence[Sequence[str]]]


def _optimizers() -> Rows:
    from ggl_audit.optimizers import families

    rows = []
    for name, family in families().items():
        needs = f"; needs {family.install}" if family.install else ""
        rows.append((name, family.source + needs, family.good_for))
    return ("name", "source", "good for"), rows


def _priors() -> Rows:
    from ggl_audit.priors.card import read_card
    from ggl_audit.priors.loading import bundled_folder, bundled_names

    cards = [(name, read_card(bundled_folder() / name)) for name in bundled_names()]
    rows = [(name, f"latent {card.architecture.latent}", card.data) for name, card in cards]
    return ("name", "parameters", "source"), rows


def _attacks() -> Rows:
    from ggl_audit.attacks.registry import known_attacks

    return ("name", "source"), [(name, kind.source) for name, kind in known_attacks().items()]


def _experiments() -> Rows:
    from ggl_audit.audit import known_experiments

    rows = [(kind.name, (kind.__doc__ or "").splitlines()[0]) for kind in known_experiments()]
    return ("name", "what it measures"), rows


def _formats() -> Rows:
    from ggl_audit.report.formats import known_formats

    rows = [(name, (r.__doc__ or "").splitlines()[0]) for name, r in known_formats().items()]
    return ("ending", "what it is"), rows


LISTED: dict[Kind, Callable[[], Rows]] = {
    Kind.OPTIMIZERS: _optimizers,
    Kind.PRIORS: _priors,
    Kind.ATTACKS: _attacks,
    Kind.EXPERIMENTS: _experiments,
    Kind.FORMATS: _formats,
}
