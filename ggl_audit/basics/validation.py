"""What pydantic found wrong, as one problem in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationError

from ggl_audit.errors import Key, nearest, reason
from ggl_audit.messages import Message, Said

UNKNOWN_KEY = Message(
    "spec/unknown-key",
    "unknown key",
    "{nearest}",
    advice="Correct the key; the message names the nearest known ones, and `ggl-audit schema spec` "
    "lists all.",
)
MISSING = Message(
    "spec/missing", "missing", advice="Add the key, or give its flag or `--set KEY=VALUE`."
)
OTHER_VALUE = Message(
    "spec/other-value",
    "{expected}, found {value!r:.80}",
    advice="Give a value of the type and range that the message asks for.",
)


def first_problem(
    error: ValidationError, known: Callable[[Key], Iterable[str]]
) -> tuple[Key, Said]:
    """Picks the problem that a user should mend first.

    A misspelt key is also a missing one; the misspelling is the better thing to say.

    Args:
        error: one or more problems.
        known: the keys that a section has, by the key of the section.

    Returns:
        The key, and what is wrong with it.
    """
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return key, UNKNOWN_KEY(nearest=nearest(str(key[-1]), known(key[:-1])))
    if problem["type"] == "missing":
        return key, MISSING()
    if problem["type"] == "value_error":
        return key, reason(problem["ctx"]["error"])
    message = problem["msg"]
    expected = f"{message[0].lower()}{message[1:]}"
    return key, OTHER_VALUE(expected=expected, value=problem["input"])
