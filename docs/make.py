"""Makes the pages that follow from the program's own tables: `python docs/make.py` writes them.

`--check` writes nothing, and says which page is not what the tables say.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from ggl_audit.judgement.rules import ASKED, RULES, Rule

DOCS = Path(__file__).parent

FINDINGS = """# Findings

What a report can tell you to act on. This page is made of `ggl_audit/judgement/rules.py` by
`python docs/make.py`.

An id is stable over versions. Kinds that are acted on alike share one: GGL005 says that the audit
cannot speak of the client, GGL006 that a promise is not kept.
"""


def findings() -> str:
    """The page of findings."""
    rows = [
        f"| {rule.id} | [{rule.title}](#{rule.anchor}) | {rule.severity} | {rule.question} |"
        for rule in RULES
    ]
    asked = [f"- **{question}**: {text}" for question, text in ASKED.items()]
    parts = [
        FINDINGS,
        "\n".join(["| id | finding | severity | question |", "| --- | --- | --- | --- |", *rows]),
        "\n".join(["The questions:", "", *asked]),
    ]
    for number, kinds in groupby(RULES, lambda rule: rule.id):
        parts += [f"## {number}", *map(finding, kinds)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def finding(rule: Rule) -> str:
    """The section of one kind."""
    return f"### {rule.title}\n\n{rule.meaning}\n\n**What to do.** {rule.remedy}"


PAGES = {"findings.md": findings}


def main() -> None:
    """Writes the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [name for name, made in PAGES.items() if _read(DOCS / name) != made()]
    if check and stale:
        sys.exit(f"not what the tables say: {', '.join(stale)}; run python docs/make.py")
    for name in stale:
        (DOCS / name).write_text(PAGES[name]())


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
