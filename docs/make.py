"""Makes the pages that follow from the program's own tables: `python docs/make.py` writes them.

`--check` writes nothing, and says which page is not what the tables say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

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


GPU = """# On a GPU

What one run of [benchmarks/gpu.py](../benchmarks/gpu.py) measured; this page is made of
[gpu.json](gpu.json) by `python docs/make.py`. A part that was not measured again is older than the
rest, and says with what it was measured.
"""

PARTS = {
    "tests": "The tests that are marked `device`",
    "throughput": "Candidates a second, beside a plain loop",
    "audits": "Whole audits",
}


def gpu() -> str:
    """The page of what was measured on an accelerator."""
    measured = json.loads((DOCS / "gpu.json").read_text(encoding="utf-8"))
    sections = []
    for part, title in PARTS.items():
        found = measured[part]
        header = (
            f"{found['device']}, PyTorch {found['torch']}, Python {found['python']}, ggl-audit "
            f"{found['ggl_audit']}: `{found['command']}`"
        )
        failed = [f"- {row['name']}: {row['failed']}" for row in found["rows"] if "name" in row]
        rows = [row for row in found["rows"] if "name" not in row]
        sections += [f"## {title}", header, SHOWN[part](rows), "\n".join(failed)]
    return "\n\n".join(part.strip() for part in [GPU, *sections] if part) + "\n"


def _tests(rows: list[dict[str, Any]]) -> str:
    return "\n".join(line for row in rows for line in (row["said"], *row["failed"]))


def _throughput(rows: list[dict[str, Any]]) -> str:
    keys = ("model", "defense", "plain", "ours", "ratio", "peak_mib")
    head = ("model", "defense", "plain loop", "ours", "ratio", "MiB at the peak")
    return _table(head, [[row[key] for key in keys] for row in rows])


def _audits(rows: list[dict[str, Any]]) -> str:
    keys = ("audit", "grade", "ceiling", "floor", "seconds", "evaluations", "peak_mib")
    head = ("audit", "grade", "ceiling", "floor", "seconds", "candidates", "MiB at the peak")
    return _table(head, [[row[key] for key in keys] for row in rows])


SHOWN = {"tests": _tests, "throughput": _throughput, "audits": _audits}


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


PAGES = {"findings.md": findings, "gpu.md": gpu}


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
