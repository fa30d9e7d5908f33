"""Kills the sample audit at random moments, until it has gone on to its end; nothing may differ.

`python benchmarks/resume.py` runs `digits_sparsified` once undisturbed, then again and again with
the same `--ledger`, each time killed (SIGKILL) after a random while, `--kills` times in all. It
prints the trials that the ledger held after each, and whether the last report is the first one,
pictures included.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parent.parent / "sample_specs" / "digits_sparsified.yaml"


def audit(folder: Path, name: str, *more: str) -> tuple[list[str], Path]:
    """The command of an audit, and where its report will be."""
    report = folder / f"{name}.json"
    command = [sys.executable, "-m", "ggl_audit", "run", str(SAMPLE), "--exit-zero", "-q"]
    return [*command, "--threads", "1", f"--output={report}", *more], report


def content(path: Path) -> dict[str, Any]:
    """All of a report but what it took."""
    report: dict[str, Any] = json.loads(path.read_text())
    del report["cost"]
    for one in report["experiments"]:
        del one["seconds"]
    return report


def main() -> None:
    """Prints what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = folder / "audit.jsonl"
        command, undisturbed = audit(folder, "undisturbed")
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        whole = time.perf_counter() - began
        print(f"undisturbed: {whole:.1f} s")  # noqa: T201
        command, resumed = audit(folder, "resumed", f"--ledger={ledger}")
        killed = 0
        while killed < arguments.kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
            try:
                process.wait(timeout=draw.uniform(0, 0.7 * whole))
                ledger.unlink()  # it has ended by itself: once more from the beginning
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
            lines = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
            print(f"killed {killed} times, {max(0, lines - 2)} trials kept")  # noqa: T201
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        same = content(resumed) == content(undisturbed)
        print("the same report" if same else "ANOTHER REPORT")  # noqa: T201
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
