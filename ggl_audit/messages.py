"""What the program can say of what was brought to it, as data.

docs/inputs.md is made of these messages by docs/make.py. Each is declared beside what says it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

CODE = re.compile(r"[a-z]+(-[a-z]+)*/[a-z0-9]+(-[a-z0-9]+)*")

MESSAGES: dict[str, Message] = {}
"""All that have been declared so far, by code."""


@dataclass(frozen=True)
class Said:
    """A message about one case, with its figures and names.

    Attributes:
        code: of the message.
        text: what was wrong and what was expected, as a sentence without a full stop.
        remedy: what to do about it, or an empty string.
    """

    code: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return self.text

    def after(self, beginning: str) -> Said:
        """The same, after words that say what it is about."""
        return Said(self.code, beginning + self.text, self.remedy)

    def followed_by(self, more: str) -> Said:
        """The same, with more words after it."""
        return Said(self.code, self.text + more, self.remedy)

    def advising(self, remedy: str) -> Said:
        """The same, with something else to do about it."""
        return Said(self.code, self.text, remedy)


@dataclass(frozen=True)
class Message:
    """Something that can be said, called with its values: ``NO_FOLDER(folder=path.parent)``.

    Attributes:
        code: ``section/name``, stable over versions; no two messages have the same. The section is
            the one of docs/inputs.md.
        text: what was wrong and what was expected, with ``{values}`` as :meth:`str.format` writes
            them.
        remedy: what to do about it, which is told with the text, with values too.
        advice: what to do about it, in Markdown, where the page says more than the remedy.
    """

    code: str
    text: str
    remedy: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        if not CODE.fullmatch(self.code):
            raise ValueError(f"{self.code!r} is not section/name")
        if MESSAGES.get(self.code, self) != self:
            raise ValueError(f"two messages have the code {self.code}")
        odd = [name for name in self.values if not name.isidentifier()]
        if odd:
            raise ValueError(f"{self.code}: {odd[0]!r} is no name of a value")
        MESSAGES[self.code] = self

    @property
    def values(self) -> frozenset[str]:
        """The names of the values that it takes."""
        parts = Formatter().parse(self.text + self.remedy)
        return frozenset(name for _, name, _, _ in parts if name is not None)

    def __call__(self, **values: object) -> Said:
        """Says it of one case.

        Raises:
            TypeError: the values are not those that it takes.
        """
        if values.keys() != self.values:
            raise TypeError(f"{self.code} takes {sorted(self.values)}, not {sorted(values)}")
        return Said(self.code, self.text.format(**values), self.remedy.format(**values))
