"""How much of an audit's time limit is left."""

from __future__ import annotations

import math
import time

WRITING = 1.5
"""Seconds that are kept for the report."""


class OutOfTimeError(KeyboardInterrupt):
    """The time limit ends an experiment, as an interrupt does."""


class Clock:
    """Runs from the start of an audit.

    Args:
        limit: seconds, or None for no limit.
        started: by ``time.perf_counter()``; now, if not given.
    """

    def __init__(self, limit: float | None = None, started: float | None = None) -> None:
        self._started = time.perf_counter() if started is None else started
        self._limit = math.inf if limit is None else max(0.0, limit - WRITING)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit < math.inf

    def used(self, share: float) -> bool:
        """Whether more than a share of the time is used up."""
        return self.seconds > share * self._limit

    def reaches(self, seconds: float) -> bool:
        """Whether there are so many seconds left."""
        return self.seconds + seconds <= self._limit

    def check(self) -> None:
        """Ends what is running when the time is used up.

        Raises:
            OutOfTimeError: it is.
        """
        if self.used(1.0):
            raise OutOfTimeError
