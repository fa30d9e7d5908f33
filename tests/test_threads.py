"""Threads: as many as this process may use, decided before PyTorch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggl_audit.basics.threads import WAITING, allowed_threads, cores, limit_threads
from ggl_audit.errors import AuditError

DECIDED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *WAITING)

AFTER_LOADING = f"""
import json, os, sys
from ggl_audit.basics.threads import limit_threads
limit_threads(*map(int, sys.argv[1:]))
assert "torch" not in sys.modules and "numpy" not in sys.modules
import torch
print(json.dumps([torch.get_num_threads(), {{n: os.environ.get(n) for n in {DECIDED}}}]))
"""


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors and an environment that says nothing."""
    monkeypatch.setattr("ggl_audit.basics.threads._processors", lambda: set(range(8)))
    monkeypatch.setattr("ggl_audit.basics.threads.cores", lambda: 4)
    monkeypatch.setattr("ggl_audit.basics.threads._quotas", lambda _: [float("inf")])
    for name in DECIDED:
        monkeypatch.setenv(name, "")  # what is put there is taken away again
        monkeypatch.delenv(name)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V1 = "sys/fs/cgroup/cpu"

QUOTAS = {
    "none": ({}, 8),
    "version 2": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
    "no limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
    "half a processor": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "a part of one": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
    "of a group above": (
        {
            "proc/self/cgroup": "0::/a.slice/b.scope",
            "sys/fs/cgroup/a.slice/cpu.max": "200000 100000",
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "600000 100000",
        },
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "12:memory:/x\n4:cpu,cpuacct:/docker/one\n0::/",
            f"{V1}/docker/one/cpu.cfs_quota_us": "400000",
            f"{V1}/docker/one/cpu.cfs_period_us": "100000",
            f"{V1}/cpu.cfs_quota_us": "-1",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "in a container that is told its name outside": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123",
            f"{V1}/cpu.cfs_quota_us": "200000",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "a name above the root": (
        {"proc/self/cgroup": "0::/../../x", "sys/fs/cgroup/cpu.max": "200000 100000"},
        2,
    ),
    "nonsense": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "much"}, 8),
    "no period": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 0"}, 8),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_a_container_is_kept_to_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("ggl_audit.basics.threads._processors", lambda: set(range(8)))
    files, expected = QUOTAS[name]
    assert allowed_threads(machine(tmp_path, files)) == expected


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggl_audit.basics.threads._processors", lambda: {0, 1, 4})
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(n): f"{n % 4},{n % 4 + 4}" for n in range(8)}
    assert cores(machine(tmp_path, files)) == 2
    assert cores(tmp_path / "elsewhere") == 3


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [
        (None, None, 4),
        (None, "2", 2),
        (None, "3,1", 3),
        (None, "64", 8),
        (None, "many", 4),
        (None, "0", 4),
        (6, None, 6),
        (1, "2", 1),
    ],
)
def test_what_was_asked_for_counts(
    eight: None,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    given: str | None,
    expected: int,
) -> None:
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    limit_threads(asked)
    assert os.environ["OMP_NUM_THREADS"] == str(expected)
    assert {name: os.environ[name] for name in WAITING} == WAITING


def test_more_than_may_be_used_is_refused(eight: None) -> None:
    with pytest.raises(AuditError, match="--threads 9, but this process may use 8"):
        limit_threads(9)
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_the_user_s_choice_if_made(
    eight: None, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    limit_threads()
    kept = {} if "OMP_WAIT_POLICY" in own else {**WAITING, **own}
    assert {name: os.environ[name] for name in WAITING if name in os.environ} == kept


@pytest.mark.parametrize("arguments", [[], ["1"]])
def test_pytorch_computes_with_as_many(arguments: list[str]) -> None:
    own = {n: v for n, v in os.environ.items() if n not in (*DECIDED, "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", AFTER_LOADING, *arguments]
    told = subprocess.check_output(command, env=own, text=True)
    threads, environment = json.loads(told)
    assert threads == (1 if arguments else min(cores(), allowed_threads()))
    assert environment == {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": None, **WAITING}
