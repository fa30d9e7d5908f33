"""Progress on stderr, with the time left."""

from __future__ import annotations

import threading
import time
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

SILENT_SECONDS = 30.0
"""After so long a line says that it goes on, where there is no bar to see."""


class AuditProgress:
    """A progress bar on a terminal; elsewhere a line for each stage, and one every half minute."""

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
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._go_on, daemon=True)
        self._is_silent = shown and not self._console.is_terminal

    def __enter__(self) -> AuditProgress:
        self._bar.start()
        if self._is_silent:
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._bar.stop()
        if self._is_silent:
            self._lines.join()

    def start(self, evaluations: int) -> None:
        """The audit begins; it will evaluate this many candidates."""
        self._bar.update(self._task, total=evaluations)
        self._began = time.monotonic()

    def stage(self, name: str) -> None:
        """A part of the audit begins."""
        self._bar.update(self._task, description=name)
        if not self._console.is_terminal:
            self._console.print(name)

    def advance(self, evaluations: int) -> None:
        """This many candidates were evaluated."""
        self._bar.advance(self._task, evaluations)

    def say(self, sentence: str) -> None:
        """Something happened that a user should know of."""
        self._console.print(sentence, soft_wrap=True, markup=False, highlight=False)

    def _go_on(self) -> None:
        # A thread of its own, as nothing else is heard of while one step takes minutes.
        while not self._ended.wait(SILENT_SECONDS):
            task = self._bar.tasks[0]
            seconds = time.monotonic() - self._began
            line = f"{task.description}, {_duration(seconds)} so far"
            if task.total and task.completed:
                share = min(task.completed / task.total, 1.0)
                line += f", {share:.0%} of all, about {_duration(seconds / share - seconds)} left"
            self._console.print(line, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min"
