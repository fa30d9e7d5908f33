"""What other packages add is found by its entry point, and a broken one is told in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ggl_audit.attacks.registry import known_attacks
from ggl_audit.basics.plugins import added_by_packages
from ggl_audit.errors import AuditError

Install = Callable[[str, str, str], Path]


def test_what_a_package_names_is_found(package: Install) -> None:
    package("defenses", "toy = toy_defense:TOY", "TOY = 7")
    assert added_by_packages("defenses") == {"toy": 7}
    assert added_by_packages("optimizers") == {}


def test_a_package_that_cannot_be_imported_is_named(package: Install) -> None:
    package("defenses", "toy = toy_broken:TOY", "import nothing_of_this_name")
    with pytest.raises(AuditError, match="toy_broken adds 'toy' to defenses, but toy_broken:TOY"):
        added_by_packages("defenses")


def test_two_packages_with_one_name_are_refused(package: Install) -> None:
    package("attacks", "toy = first_toy:TOY", "TOY = 1")
    package("attacks", "toy = second_toy:TOY", "TOY = 2")
    with pytest.raises(AuditError, match="and so does another package"):
        added_by_packages("attacks")


def test_attacks_are_in_the_order_in_which_they_are_made(package: Install) -> None:
    package("attacks", "toy = toy_attack:TOY", "TOY = type('Toy', (), {'name': 'toy'})")
    assert list(known_attacks()) == ["ggl", "refined", "pixels", "analytic", "toy"]


def test_nothing_of_ours_is_replaced(package: Install) -> None:
    package("attacks", "ggl = toy_ggl:TOY", "TOY = type('Toy', (), {'name': 'ggl'})")
    with pytest.raises(AuditError, match="adds 'ggl' to attacks as 'ggl'"):
        known_attacks()
