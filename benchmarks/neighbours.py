"""How long an audit takes alone, and beside another one, by how its threads wait for each other.

`python benchmarks/neighbours.py` runs the sample audit alone and beside a second one that never
ends, once for each setting, in turns, and prints seconds and their ratio. A setting is what stands
in the environment; the other audit has the same. Nothing else may run on the machine, and each
audit is stopped after `--most` seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent

SETTINGS: dict[str, dict[str, str]] = {
    "as PyTorch comes": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own default
    "as this tool chooses": {},
    "spin count 30,000": {"GOMP_SPINCOUNT": "30000"},
    "spin count 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin count 3,000": {"GOMP_SPINCOUNT": "3000"},
    "no spinning": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
DECIDED_BY = ("OMP_", "GOMP_", "MKL_", "KMP_")


def environment(setting: str) -> dict[str, str]:
    """The environment with nothing about threads but what a setting says."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(DECIDED_BY)}
    return {**own, **SETTINGS[setting]}


def start(setting: str, spec: Path, *more: str) -> subprocess.Popen[bytes]:
    """Starts an audit that prints its verdict to nobody."""
    command = [sys.executable, "-m", "ggl_audit", "run", str(spec), "-q", "--device=cpu", *more]
    return subprocess.Popen(  # noqa: S603
        command, env=environment(setting), cwd=ROOT, stdout=subprocess.DEVNULL
    )


@contextmanager
def neighbour(setting: str, spec: Path) -> Iterator[None]:
    """Another audit on the same machine, for as long as this lasts."""
    endless = start(setting, spec, "--set=attack.evaluations=1000000")
    try:
        time.sleep(8)  # it loads, and begins to search
        yield
        assert endless.poll() is None, "the other audit ended first"
    finally:
        endless.kill()
        endless.wait()


def seconds(setting: str, spec: Path, most: float) -> float:
    """What an audit takes, or ``most`` where it is stopped."""
    started = time.perf_counter()
    audit = start(setting, spec)
    try:
        assert audit.wait(most) in (0, 1, 3)
    except subprocess.TimeoutExpired:
        return most
    finally:
        audit.kill()
        audit.wait()
    return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", type=Path, default=ROOT / "sample_specs/digits_sparsified.yaml")
    parser.add_argument("--turns", type=int, default=3, help="of each, the median of which is told")
    parser.add_argument("--most", type=float, default=150.0, help="seconds of one audit")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    spec, most = arguments.spec.resolve(), arguments.most
    taken: dict[str, tuple[list[float], list[float]]] = {s: ([], []) for s in arguments.settings}
    for _ in range(arguments.turns):
        for setting, (alone, beside) in taken.items():
            alone.append(seconds(setting, spec, most))
            with neighbour(setting, spec):
                beside.append(seconds(setting, spec, most))
    print(f"{os.cpu_count()} processors; {spec.name}, median of {arguments.turns}")  # noqa: T201
    print(f"{'':24}{'alone':>10}{'beside':>10}{'ratio':>8}{'alone, to the first':>22}")  # noqa: T201
    first = statistics.median(next(iter(taken.values()))[0])
    for setting, (alone, beside) in taken.items():
        one, two = statistics.median(alone), statistics.median(beside)
        over = ">" if two >= most else " "
        figures = f"{one:8.1f} s{over:>2}{two:6.1f} s{two / one:8.2f}{one / first:22.2f}"
        print(f"{setting:24}{figures}")  # noqa: T201


if __name__ == "__main__":
    main()
