"""Messages are data: each has a code, its line on the page, and nothing is said without one."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
from pydantic import BaseModel, model_validator

import ggl_audit
from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import (
    AuditError,
    InputError,
    NothingToMeasureError,
    ReasonError,
    SpecError,
    raised,
    reason,
)
from ggl_audit.messages import MESSAGES, Message, Said

for module in pkgutil.walk_packages(ggl_audit.__path__, "ggl_audit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

OURS = dict(MESSAGES)
TOO_LARGE = Message("test/too-large", "has {count:,} rows", "Give {limit} at most.")


class Anything:
    """A value that can be written in any form."""

    def __format__(self, form: str) -> str:
        return "VALUE"

    def __str__(self) -> str:
        return "VALUE"

    __repr__ = __str__


def test_each_can_be_said() -> None:
    for code, message in OURS.items():
        said = message(**dict.fromkeys(message.values, Anything()))
        assert said.code == code
        assert said.text.count("VALUE") >= len(set(re.findall(r"(?<!{){(\w+)", message.text))), code
        assert re.fullmatch(r"\S(.*[^\s.])?", said.text), code
        assert not re.search("[|`\n]", message.text), code
        assert not re.search("[|\n]", message.advice + message.remedy), code


def test_each_says_what_to_do() -> None:
    for code, message in OURS.items():
        assert re.fullmatch(r"[A-Z`{].*[.}]", message.advice or message.remedy), code
        assert re.fullmatch(r"(\S.*[.?}])?", message.remedy), code


def test_a_message_is_said_with_its_values() -> None:
    said = TOO_LARGE(count=12345, limit=7)
    assert said == Said("test/too-large", "has 12,345 rows", "Give 7 at most.")
    assert str(InputError("a.pt", said)) == "a.pt: has 12,345 rows. Give 7 at most."
    assert str(SpecError(("a", 0), said.after("it "))) == "a.0: it has 12,345 rows. Give 7 at most."
    assert str(AuditError(said.followed_by("!").advising(""))) == "has 12,345 rows!."


@pytest.mark.parametrize("values", [{}, {"count": 1}, {"count": 1, "limit": 2, "more": 3}])
def test_a_message_takes_its_values_and_no_others(values: dict[str, int]) -> None:
    with pytest.raises(TypeError, match=r"test/too-large takes \['count', 'limit'\]"):
        TOO_LARGE(**values)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("test/too-large", "is too large"),
        ("Test/x", "x"),
        ("x", "x"),
        ("test/", "x"),
        ("test/attribute", "{path.parent} is no name"),
        ("test/place", "{} is no name"),
        ("test/open", "{ is no value"),
    ],
)
def test_what_is_no_message_is_refused(code: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"test/|section/name|expected '}'"):
        Message(code, text)
    assert code not in MESSAGES or MESSAGES[code] is TOO_LARGE


@pytest.mark.parametrize("error", [AuditError, ReasonError])
def test_no_error_is_made_without_a_message(error: type[Exception]) -> None:
    with pytest.raises(TypeError, match="expected what a message says, found 'in words'"):
        error("in words")
    with pytest.raises(TypeError, match="expected what a message says"):
        SpecError(("a",), TOO_LARGE)  # type: ignore[arg-type]


def test_a_code_comes_out_of_another_process() -> None:
    said = TOO_LARGE(count=1, limit=2)
    for error in (AuditError(said), InputError("a", said), NothingToMeasureError(("a",), said)):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - it is our own
        assert (type(again), again.code, str(again)) == (type(error), said.code, str(error))


class Rows(BaseModel):
    count: int

    @model_validator(mode="after")
    def _not_too_many(self) -> Rows:
        if self.count > 100:
            raise ReasonError(TOO_LARGE(count=self.count, limit=100))
        if self.count < 0:
            raise ValueError("counts are from 0")
        return self


@pytest.mark.parametrize(
    ("declared", "code", "text"),
    [
        ({"count": 1000}, "test/too-large", "has 1,000 rows"),
        ({"count": -1}, "code/refused", "counts are from 0"),
        ({"count": "x"}, "spec/other-value", "input should be a valid integer, .*, found 'x'"),
        ({}, "spec/missing", "missing"),
        ({"count": 1, "cuont": 1}, "spec/unknown-key", "unknown key"),
    ],
)
def test_a_validator_s_message_keeps_its_code(
    declared: dict[str, object], code: str, text: str
) -> None:
    class Strict(Rows, extra="forbid"):
        pass

    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is looked at below
        Strict.model_validate(declared)
    _, said = first_problem(error.value, lambda _: ["count"])  # type: ignore[arg-type]
    assert said.code == code
    assert re.match(text, said.text)


def test_the_words_of_other_code_are_told_as_they_are() -> None:
    assert reason(ValueError("not today")).text == "not today"
    assert raised(KeyError("a")) == "KeyError: 'a'"
    assert raised(ReasonError(TOO_LARGE(count=1, limit=2))) == "has 1 rows"


def test_a_section_of_ours_is_on_the_page() -> None:
    template = (Path(__file__).parent.parent / "docs" / "inputs.template.md").read_text()
    assert {code.partition("/")[0] for code in OURS} == set(re.findall(r"{{ (\w+) }}", template))
