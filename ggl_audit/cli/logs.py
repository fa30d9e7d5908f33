"""What libraries warn of: kept in a log, each warning once, and on the terminal where asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer


class WarningLog(logging.Handler):
    """Keeps what is warned of, by Python's warnings and by its logging.

    Args:
        shown: whether each is also written to stderr when it is first met.
    """

    def __init__(self, *, shown: bool) -> None:
        super().__init__(logging.WARNING)
        self._shown = shown
        self.kept: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record of a library's own log."""
        self._keep(record.getMessage(), f"{record.name}: {record.levelname.lower()}")

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        _file: TextIO | None = None,
        _line: str | None = None,
    ) -> None:
        """Keeps a warning; in place of ``warnings.showwarning``."""
        self._keep(str(message), f"{Path(filename).name}:{lineno}: {category.__name__}")

    def _keep(self, text: str, place: str) -> None:
        # By the text alone: the same is warned of from many lines.
        self.kept[text] = self.kept.get(text, 0) + 1
        if self._shown and self.kept[text] == 1:
            typer.echo(f"{place}: {text}", err=True)


@contextmanager
def library_warnings(*, shown: bool, told: bool) -> Iterator[WarningLog]:
    """Takes the warnings of libraries from the terminal into a log, while this lasts.

    Args:
        shown: each, once.
        told: in one line at the end how many there were.
    """
    log, root = WarningLog(shown=shown), logging.getLogger()
    usual: Any = warnings.showwarning
    warnings.showwarning = log.warn  # type: ignore[assignment]
    root.addHandler(log)
    try:
        yield log
    finally:
        root.removeHandler(log)
        warnings.showwarning = usual
        count = len(log.kept)
        if count and told and not shown:
            plural = "" if count == 1 else "s"
            typer.echo(f"{count} warning{plural} of libraries; -v shows them", err=True)
