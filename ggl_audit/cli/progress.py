"""Progress on stderr, with the time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


class AuditProgress:
    """A progress bar on a terminal; a line for each stage elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
            speed_estimate_period=10,
        )
        self._task: TaskID = self._bar.add_task("loading", total=None)

    def __enter__(self) -> AuditProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, evaluations: int) -> None:
        """The audit begins; it will evaluate this many candidates."""
        self._bar.update(self._task, total=evaluations)

    def stage(self, name: str) -> None:
        """A part of the audit begins."""
        self._bar.update(self._task, description=name)
        if not self._console.is_terminal:
            self._console.print(name)

    def advance(self, evaluations: int) -> None:
        """This many candidates were evaluated."""
        self._bar.advance(self._task, evaluations)
