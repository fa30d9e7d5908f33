"""Makes the pages that follow from the program's own tables: `python docs/make.py` writes them.

`--check` writes nothing, and says which page is not what the tables say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Any

import ggl_audit
from ggl_audit.judgement.rules import ASKED, RULES, Rule
from ggl_audit.messages import MESSAGES, Message

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
rest, and says with what it was measured. Of accelerators only those named here were tried.
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


MADE = "<!-- Made of inputs.template.md and of the program's messages by python docs/make.py. -->\n"

TABLE = re.compile(r"{{ (\w+) }}")
"""Where in the template the table of a section goes."""

GLUED = re.compile(r"\w\w")


def inputs() -> str:
    """The page of inputs and messages."""
    for module in pkgutil.walk_packages(ggl_audit.__path__, "ggl_audit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tables = {
        section: _table(("code", "message", "what to do"), [*map(row, messages)])
        for section, messages in groupby(sorted(MESSAGES.values(), key=_place), _section)
    }
    template = (DOCS / "inputs.template.md").read_text()
    named = TABLE.findall(template)
    if sorted(named) != sorted(tables):
        sys.exit(f"sections of messages and of the page: {sorted({*named} ^ {*tables})}")
    return MADE + TABLE.sub(lambda found: tables[found[1]], template)


def row(message: Message) -> tuple[str, str, str]:
    """A message by its code, and what to do about it."""
    what_to_do = message.advice or plain(message.remedy)
    return message.code, f"`{plain(message.text)}`", what_to_do


def plain(text: str) -> str:
    """What a message says, with a word in capitals for each value.

    Words that may follow, or not, have no space of their own around them, and are shown as dots.
    """
    parts = [(words, value) for words, value, _, _ in Formatter().parse(text)]
    shown = ""
    for (words, value), (after, _) in zip(parts, [*parts[1:], ("", None)], strict=True):
        shown += words
        if value is None:
            continue
        if GLUED.search(words[-2:]) or (shown and not words):
            shown = shown.removesuffix(" ...") + " ..."
        else:
            shown += "... " if GLUED.match(after) else value.upper().replace("_", " ")
    return shown


def _section(message: Message) -> str:
    return message.code.partition("/")[0]


def _place(message: Message) -> tuple[str, str]:
    return _section(message), message.code


PAGES = {"findings.md": findings, "gpu.md": gpu, "inputs.md": inputs}


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
