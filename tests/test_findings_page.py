"""The table of findings, its page, and that each kind can be found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ggl_audit.judgement import findings, rules

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_what_the_table_says() -> None:
    command = [sys.executable, str(DOCS / "make.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_a_page_that_says_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "make.py").write_text((DOCS / "make.py").read_text())
    page = (DOCS / "findings.md").read_text()
    (tmp_path / "findings.md").write_text(page.replace("critical", "harmless"))
    command = [sys.executable, str(tmp_path / "make.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "findings.md" in checked.stderr
    assert "harmless" in (tmp_path / "findings.md").read_text()


def test_every_kind_is_in_the_table_once_and_has_its_place_on_the_page() -> None:
    kinds = [value for value in vars(rules).values() if isinstance(value, rules.Rule)]
    assert kinds == list(rules.RULES)
    titles = [rule.title for rule in rules.RULES]
    assert len(set(titles)) == len(titles)
    headings = re.findall("^### (.*)$", (DOCS / "findings.md").read_text(), re.MULTILINE)
    assert headings == titles
    assert rules.UNLIKE.anchor == "the-capture-is-unlike-the-canaries-gradients"


def test_a_finding_says_what_its_kind_says() -> None:
    found = findings.Finding.of(rules.RECONSTRUCTED, "20 of 20.", "high")
    kind = rules.RECONSTRUCTED
    said = (found.id, found.title, found.question, found.remedy)
    assert said == (kind.id, kind.title, kind.question, kind.remedy)
    assert (found.severity, found.detail) == ("high", "20 of 20.")
    assert findings.Finding.of(kind, "20 of 20.").severity == "critical"
