"""What pydantic found wrong, as one problem in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationError

from ggl_audit.errors import Key, nearest


def first_problem(
    error: ValidationError, known: Callable[[Key], Iterable[str]]
) -> tuple[Key, str, str]:
    """Picks the problem that a user should mend first.

    A misspelt key is also a missing one; the misspelling is the better thing to say.

    Args:
        error: one or more problems.
        known: the keys that a section has, by the key of the section.

    Returns:
        The key, the problem, and a remedy or an empty string.
    """
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return key, "unknown key", nearest(str(key[-1]), known(key[:-1]))
    if problem["type"] == "missing":
        return key, "missing", ""
    if problem["type"] == "value_error":
        return key, str(problem["ctx"]["error"]), ""
    message = problem["msg"]
    return key, f"{message[0].lower()}{message[1:]}, found {problem['input']!r:.80}", ""
