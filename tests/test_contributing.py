"""The contributor's page speaks of files, names and commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| a")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_addition_has_a_neighbour_and_a_place_where_it_is_named(row: list[str]) -> None:
    _, written, neighbours, named = row
    file = re.findall("`([^`]*py)`", written)[0]
    folder = ROOT / Path(file).parent
    assert folder.is_dir()
    for neighbour in re.findall("`([^`]*)`", neighbours):
        assert (folder / neighbour).is_file(), neighbour
        if named == "nothing: it registers itself":
            assert "\n@register\n" in (folder / neighbour).read_text()
    names = re.findall("`([A-Za-z_]+)`", named)
    for place in re.findall("`([a-z_/]+\\.py)`", named):
        source = (ROOT / "ggl_audit" / place).read_text()
        assert all(name in source for name in names), (place, names)


def test_the_page_lists_each_kind_of_addition() -> None:
    kinds = [row[0] for row in ROWS]
    assert kinds == [
        "a defense", "an optimizer", "an attack", "an experiment",
        "a value of each image that is asked for", "a report format", "a kind of finding",
    ]  # fmt: skip


def test_what_is_linted_before_a_commit_is_what_the_test_command_lints() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert f"\t{hook['entry']}" in makefile


def test_each_command_of_the_page_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall("make ([a-z-]+)`", PAGE):
        assert re.search(f"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"pytest ([\w/.]+)`", PAGE):
        assert (ROOT / file).is_file()
