"""How many threads this process computes with, decided before the libraries that start them load.

By default PyTorch takes as many threads as it sees cores, and one that waits for the others does
nothing but look whether they are done. Beside another busy process a thread that is not running is
waited for by all others, again and again, so that two audits on two cores took longer than twenty
after each other. The number is decided by what this process may use, and never by how busy the
machine is: the bits of a result depend on it.

Nothing here imports PyTorch or NumPy.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ggl_audit.errors import AuditError
from ggl_audit.messages import Message

ASKED = "OMP_NUM_THREADS"

WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a thread looks before it sleeps: GNU's OpenMP (turns), LLVM's and Intel's (ms)."""

POLICY = "OMP_WAIT_POLICY"
"""OpenMP's own name for the same choice, for all of them."""

TOO_MANY_THREADS = Message(
    "spec/too-many-threads",
    "--threads {asked}, but this process may use {allowed}",
    "More threads than processors only wait for each other.",
    advice="Ask for no more threads than the process may use (its affinity and its container's "
    "quota).",
)


def limit_threads(asked: int | None = None) -> None:
    """Sets the environment that OpenMP, MKL and OpenBLAS read when they are loaded.

    Args:
        asked: how many threads; else as many as ``OMP_NUM_THREADS`` says, but not more than this
            process may use; else one for each core that it may use.

    Raises:
        AuditError: more are asked for than this process may use.
    """
    allowed = allowed_threads()
    if asked is not None and asked > allowed:
        raise AuditError(TOO_MANY_THREADS(asked=asked, allowed=allowed))
    threads = asked or min(_given() or cores(), allowed)
    os.environ[ASKED] = str(threads)
    if POLICY not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    if asked is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def allowed_threads(root: Path = Path("/")) -> int:
    """The processors that this process may use at a time, by its affinity and its control groups.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return max(1, math.floor(min(len(_processors()), *_quotas(root))))


def cores(root: Path = Path("/")) -> int:
    """The cores among the processors of this process: two threads of one core share its units."""
    topology = root / "sys/devices/system/cpu"
    siblings = (topology / f"cpu{n}/topology/thread_siblings_list" for n in _processors())
    return len({_read(file) or str(file) for file in siblings})


def _processors() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _given() -> int | None:
    """What ``OMP_NUM_THREADS`` says for the outermost level, if that is a number."""
    first = os.environ.get(ASKED, "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) > 0 else None


def _quotas(root: Path) -> Iterator[float]:
    """How many processors each control group above this process allows it; infinity first."""
    yield math.inf
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        names = [name for name in own.split("/") if name not in ("", "..")]
        folders = [Path(*names[:depth]) for depth in range(len(names) + 1)]
        # A container sees its own group as the root, and may still be told its name outside.
        if not controllers:
            for folder in folders:
                yield _share(*_read(mounted / folder / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for folder in folders:
                files = [mounted / "cpu" / folder / f"cpu.cfs_{n}_us" for n in ("quota", "period")]
                yield _share(*map(_read, files))


def _share(quota: str = "", period: str = "") -> float:
    """``max`` and ``-1`` are no limit."""
    limited = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if limited else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
