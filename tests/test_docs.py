"""Each error, refusal and doubt has its line in docs/inputs.md, and each line there is of one.

What the program can say is read off its source: an f-string is a pattern, whose values may be
anything. A line of the page is of the message that it fits with the most letters.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import ggl_audit
from ggl_audit import errors
from ggl_audit.inputs import yaml_file
from ggl_audit.judgement.grade import IN_WORDS
from ggl_audit.spec import Spec

ROOT = Path(__file__).parent.parent
SOURCE = Path(ggl_audit.__file__).parent
PAGE = (ROOT / "docs" / "inputs.md").read_text()
HEADER = "| message | what to do |"
PROGRAM = "ggl-audit: "

VALUE = "\0"
"""Stands for a value in what the source can say."""

FEWEST_LETTERS = 5
"""With fewer of its own a message only passes on another one, which has its own line."""

FEWEST_IN_SENTENCE = 13
"""With fewer a string beside a finding is a name."""

AUDIT_ERRORS = {**vars(errors), "NotYamlError": yaml_file.NotYamlError}
JUDGED = (
    "Check", "Check | None", "list[Check]", "Likeness", "Likeness | None", "tuple[bool, str]",
    "Iterator[Violation]", "list[Violation]", "tuple[list[Violation], set[str]]",
)  # fmt: skip
"""What is returned by functions that judge a capture."""

OTHER_JUDGES = (
    "decide",
    "_grade",
    "other_declarations",
    "_modes",
    "_hinted",
    "other_layouts",
    "_other_arrangements",
    "other_signs",
    "other_trainings",
    "why_not_inferred",
    "_check_range",
)

WHOLE = "nobody is told: whole gradients are taken instead"

NOT_FOR_USERS = {
    "padding by name": WHOLE,
    "an embedding with options": WHOLE,
    "batch norm with the statistics of the batch": WHOLE,
    "a parameter is used twice, or not at all": WHOLE,
    "what a layer was given is changed after it": WHOLE,
    "... takes a parameter": WHOLE,
    "... does not map each image by itself": WHOLE,
    "... needs ... gradients of earlier rounds; ... are known": "only a program that calls a "
    "defense itself can forget them",
    "a conditional generator takes latents and labels": "only a program that calls a trained "
    "generator itself can forget them",
    "not a PNG data URI": "told as 'not a PNG in a data URI'",
    "module ... has no attribute ...": "Python's own words, for a misspelt name in a program",
}
"""What no input leads to, and why."""

MINIMAL = {
    "version": 1,
    "model": {"factory": "models.py:net", "input": {"shape": [1, 28, 28]}},
    "capture": {"gradient": "gradient.safetensors"},
    "prior": {"bundled": "digits"},
}


@dataclass(frozen=True)
class Message:
    """What the source can say.

    Attributes:
        text: with ``VALUE`` for each value.
        whole: whether it is told by itself; else within another one, as a reason is.
        place: file and line.
    """

    text: str
    whole: bool
    place: str

    @property
    def letters(self) -> int:
        return sum(map(str.isalpha, self.text))

    @property
    def shown(self) -> str:
        return self.text.replace(VALUE, "...")

    def fits(self, line: str) -> bool:
        pattern = ".*?".join(map(re.escape, self.text.split(VALUE)))
        return bool((re.fullmatch if self.whole else re.search)(pattern, line))


@dataclass(frozen=True)
class Row:
    """Messages of the page, and what to do about them."""

    messages: tuple[str, ...]
    remedy: str


def texts(node: ast.expr, known: Mapping[str, Sequence[str]]) -> list[str]:
    """All that an expression can be, given all that some variables can be."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Name(id=name) if name in known:
            return [*known[name]]
        case ast.FormattedValue(value=value):
            return texts(value, known)
        case ast.JoinedStr(values=parts):
            return joined(parts, known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return joined([left, right], known)
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts(body, known), *texts(orelse, known)]
    return [VALUE]


def joined(parts: Sequence[ast.expr], known: Mapping[str, Sequence[str]]) -> list[str]:
    choices = itertools.product(*(texts(part, known) for part in parts))
    return [re.sub(f"{VALUE}+", VALUE, "".join(choice)) for choice in choices]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def makers_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions of a module that make an error, by name."""
    return {
        function.name: function
        for function in functions(tree)
        if function.returns is not None and ast.unparse(function.returns).endswith("Error")
    }


def assigned(tree: ast.Module) -> dict[str, list[str]]:
    """All that the variables of a module can be that are assigned by themselves."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).extend(texts(node.value, {}))
    return found


def problem_of(name: str, call: ast.Call) -> ast.expr | None:
    """The argument of an error that says what is wrong; None where it is made elsewhere."""
    kind = AUDIT_ERRORS.get(name, errors.AuditError)
    place = [*inspect.signature(kind).parameters].index("problem")
    given = call.args[: place + 1]
    starred = any(isinstance(argument, ast.Starred) for argument in given)
    return given[place] if len(given) > place and not starred else None


def errors_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """What the errors say that a module makes, by themselves or through its own functions."""
    makers, variables = makers_of(tree), assigned(tree)
    inside = {id(call) for maker in makers.values() for _, call in calls(maker)}
    for name, call in calls(tree):
        known: dict[str, list[str]] = {}
        made = [] if id(call) in inside else [(name, call)]
        if name in makers:
            parameters = [argument.arg for argument in makers[name].args.args]
            told = zip(parameters, call.args, strict=False)
            known = {parameter: texts(value, {}) for parameter, value in told}
            made = [*calls(makers[name])]
        for error, made_call in made:
            problem = problem_of(error, made_call) if error.endswith("Error") else None
            alone = isinstance(problem, ast.Name) and problem.id not in known
            for text in [] if problem is None else texts(problem, variables if alone else known):
                yield call.lineno, text, error in AUDIT_ERRORS


def endings_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """What else ends the program, and what is wrong with a value of a wrong type."""
    for name, call in calls(tree):
        if name == "typer.echo":
            for text in texts(call.args[0], {}):
                if text.startswith(PROGRAM):
                    yield call.lineno, text.removeprefix(PROGRAM), True
    for function in functions(tree):
        if function.returns is not None and ast.unparse(function.returns) == "tuple[Key, str, str]":
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                    yield from ((node.lineno, t, True) for t in texts(node.value.elts[1], {}))


def findings_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """What is said by functions that judge a capture or a grade, doubt it, or look for a cause."""
    for function in functions(tree):
        returns = "" if function.returns is None else ast.unparse(function.returns)
        if returns in JUDGED or "doubts" in function.name or function.name in OTHER_JUDGES:
            for node in sentences(function.body):
                for text in texts(node, {}):
                    if " " in text and sum(map(str.isalpha, text)) >= FEWEST_IN_SENTENCE:
                        yield node.lineno, text, False


def sentences(nodes: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """The strings in a piece of code, but for docstrings, names, errors and what is fine."""
    for node in nodes:
        match node:
            case ast.Constant(value=str()) | ast.JoinedStr():
                yield node
            case ast.Expr(value=ast.Constant()) | ast.Compare() | ast.Subscript() | ast.Raise():
                pass
            case ast.Return(value=ast.Tuple(elts=[ast.Constant(value=outcome), _])) if outcome in (
                False,
                "A",
                "B",
                "C",
            ):
                pass
            case _:
                yield from sentences([*ast.iter_child_nodes(node)])


def said_by(modules: Mapping[str, ast.Module]) -> list[Message]:
    return [
        message
        for name, tree in modules.items()
        for line, text, whole in [*errors_of(tree), *endings_of(tree), *findings_of(tree)]
        if (message := Message(text, whole, f"{name}:{line}")).letters >= FEWEST_LETTERS
    ]


def read_rows(page: str) -> list[Row]:
    rows = []
    for table in page.split(HEADER)[1:]:
        for line in table.split("\n\n")[0].strip().splitlines()[1:]:
            cells = re.fullmatch(r"\| (`.+?`) \| (.+) \|", line)
            assert cells, f"no messages in backquotes and a remedy: {line}"
            rows.append(Row(tuple(re.findall("`(.+?)`", cells[1])), cells[2]))
    return rows


MODULES = {
    str(path.relative_to(SOURCE)): ast.parse(path.read_text())
    for path in sorted(SOURCE.rglob("*.py"))
}
SAID = said_by(MODULES)
ROWS = read_rows(PAGE)


def messages_of(line: str, said: Sequence[Message]) -> list[Message]:
    """Of those that are told by themselves, that with the most letters; and all others."""
    fitting = [message for message in said if message.fits(line)]
    most = max((message.letters for message in fitting if message.whole), default=0)
    return [message for message in fitting if not message.whole or message.letters == most]


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_message_of_the_source_is_on_the_page() -> None:
    found = {
        message for row in ROWS for line in row.messages for message in messages_of(line, SAID)
    }
    missing = [
        f"{message.place}: {message.shown}"
        for message in SAID
        if message not in found and message.shown not in NOT_FOR_USERS
    ]
    assert not missing, "\n".join(["without a line in docs/inputs.md:", *missing])


def test_every_line_of_the_page_is_of_a_message() -> None:
    left = [line for row in ROWS for line in row.messages if not messages_of(line, SAID)]
    assert not left, "\n".join(["in docs/inputs.md, but nothing in the source says so:", *left])


def test_every_line_says_once_what_to_do() -> None:
    lines = [line for row in ROWS for line in row.messages]
    assert sorted(lines) == sorted(set(lines))
    assert [row.remedy for row in ROWS if not re.fullmatch(r"[A-Z`].{10,}\.", row.remedy)] == []


def test_no_error_is_made_where_it_is_not_looked_for() -> None:
    unknown = []
    for module, tree in MODULES.items():
        known = {*makers_of(tree), "typer.Exit"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                if not name.endswith("Error") and name not in known:
                    unknown.append(f"{module}:{node.lineno}: {name}")
    assert unknown == []


def test_what_this_test_names_is_in_the_source() -> None:
    names = {function.name for tree in MODULES.values() for function in functions(tree)}
    assert set(OTHER_JUDGES) <= names
    assert set(NOT_FOR_USERS) <= {message.shown for message in SAID}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise InputError(path, f'has {count} rows' + (' too many' if a else ''))", 2),
        ("def test(self):\n    if x:\n        raise ValueError('too many of them')", 1),
        ("problem = 'too many of them'\nraise AuditError(problem, 'What to do.')", 1),
        ("def doubts_about(x) -> list[str]:\n    return [f'{x} cannot be told from it']", 1),
        ("def check(x) -> Check:\n    return Check('x', 'agrees', 'its values are too large')", 1),
        (
            "def misfit(problem: str) -> AuditError:\n    return AuditError(f'it {problem}')\n"
            "raise misfit(f'has {n} rows')",
            1,
        ),
        ("typer.echo('ggl-audit: nothing was measured', err=True)", 1),
        ("logger.info('it begins now')", 0),
    ],
)
def test_messages_are_found_wherever_they_are_made(source: str, expected: int) -> None:
    tree = ast.parse(source)
    assert len([*errors_of(tree), *endings_of(tree), *findings_of(tree)]) == expected


def test_a_line_is_of_the_most_specific_message() -> None:
    said = [Message(text, whole=True, place="") for text in ("no \0", "no such \0")]
    reason = Message("such file", whole=False, place="")
    assert messages_of("no such file", [*said, reason]) == [said[1], reason]
    assert messages_of("no file", [*said, reason]) == [said[0]]
    assert messages_of("there is no such file", [*said, reason]) == [reason]


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
