"""The pages that are made of tables are current, and what is written in them holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from ggl_audit.judgement import findings, rules
from ggl_audit.judgement.grade import IN_WORDS
from ggl_audit.spec import Spec

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "inputs.md").read_text()

MINIMAL = {
    "version": 1,
    "model": {"factory": "models.py:net", "input": {"shape": [1, 28, 28]}},
    "capture": {"gradient": "gradient.safetensors"},
    "prior": {"bundled": "digits"},
}


def make(docs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(docs / "make.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_pages_are_what_the_tables_say() -> None:
    checked = make(DOCS)
    assert checked.returncode == 0, checked.stderr


def test_pages_that_say_something_else_are_named(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path, dirs_exist_ok=True)
    changed = {"findings.md": ("critical", "harmless"), "inputs.md": ("no such file", "no file")}
    for name, words in changed.items():
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(*words))
    checked = make(tmp_path)
    assert checked.returncode == 1
    assert "findings.md, inputs.md" in checked.stderr
    assert "harmless" in (tmp_path / "findings.md").read_text()
    template = (DOCS / "inputs.template.md").read_text()
    (tmp_path / "inputs.template.md").write_text(template.replace("{{ cause }}", ""))
    checked = make(tmp_path)
    assert checked.returncode == 1
    assert "['cause']" in checked.stderr


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


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", re.findall(r"^ *```yaml\n(.+?)^ *```$", PAGE, re.M | re.S))
def test_examples_are_specs(block: str) -> None:
    Spec.model_validate({**MINIMAL, **yaml.safe_load(textwrap.dedent(block))})


def test_a_grade_means_the_same_everywhere() -> None:
    readme = (ROOT / "README.md").read_text()
    method = " ".join((ROOT / "docs" / "method.md").read_text().split())
    table = dict(re.findall(r"^\| ([A-F]) \| .+ \| (.+) \|$", readme, re.MULTILINE))
    assert table == {grade: words for grade, words in IN_WORDS.items() if grade != "inconclusive"}
    for grade in ("A", "B"):
        assert IN_WORDS[grade] in method


def test_links_lead_somewhere() -> None:
    assert "(docs/inputs.md)" in (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGE)
    assert links
    for file, anchor in links:
        page = (ROOT / "docs" / file).read_text() if file else PAGE
        assert not anchor or anchor in anchors(page), (file, anchor)
