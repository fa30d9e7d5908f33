"""What a command says while it works: signs of life, and not what libraries have to say."""

from __future__ import annotations

import logging
import time
import warnings

import pytest

from ggl_audit.cli import progress
from ggl_audit.cli.logs import library_warnings
from ggl_audit.cli.progress import AuditProgress


def warn_often() -> None:
    """As PyTorch does of an LSTM: the same, from many lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for line in range(50):
            warnings.warn_explicit("slow for want of a rule", UserWarning, "layers.py", line)
        warnings.warn("another one", DeprecationWarning, stacklevel=1)
        logging.getLogger("some.library").warning("and %s", "a third")


def test_warnings_are_counted_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with library_warnings(shown=False, told=True) as log:
        warn_often()
    assert capsys.readouterr().err == "3 warnings of libraries; -v shows them\n"
    assert log.kept == {"slow for want of a rule": 50, "another one": 1, "and a third": 1}


def test_each_warning_is_shown_once_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with library_warnings(shown=True, told=True):
        warn_often()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "layers.py:0: UserWarning: slow for want of a rule"
    assert lines[1].endswith("DeprecationWarning: another one")
    assert lines[2:] == ["some.library: warning: and a third"]


def test_nothing_is_said_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with library_warnings(shown=False, told=False):
        warn_often()
    with library_warnings(shown=False, told=True):
        pass
    assert capsys.readouterr().err == ""


def test_afterwards_warnings_are_as_before() -> None:
    usual, handlers = warnings.showwarning, [*logging.getLogger().handlers]
    with pytest.raises(KeyboardInterrupt), library_warnings(shown=False, told=False):
        raise KeyboardInterrupt
    assert warnings.showwarning is usual
    assert logging.getLogger().handlers == handlers


def test_where_there_is_no_terminal_a_line_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.02)
    with AuditProgress(shown=True) as shown:
        time.sleep(0.1)
        shown.start(200)
        shown.stage("candidate matching")
        shown.advance(50)
        time.sleep(0.1)  # one step that takes long, and tells nothing
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading, 0 s so far"
    assert "candidate matching" in lines
    assert lines[-1] == "candidate matching, 0 s so far, 25% of all, about 0 s left"
    assert len(lines) < 20


def test_quiet_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.01)
    with AuditProgress(shown=False) as shown:
        shown.stage("candidate matching")
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_no_line_is_written_once_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.01)
    with AuditProgress(shown=True):
        pass
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min")]
)
def test_durations(seconds: float, told: str) -> None:
    assert progress._duration(seconds) == told
