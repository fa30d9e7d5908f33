"""What only an accelerator would refuse, found without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import pretended
from tests.device.conftest import NAMED

ROOT = Path(__file__).parent.parent.parent

MIXED = """
import torch
from tests.device import pretended

torch.Generator = pretended.begin()
device = torch.device("pretended")
with pretended.Pretended(lacks_float64=LACKS):
    there = torch.rand(3, device=device)
    for refused in (
        lambda: there + torch.rand(3),
        lambda: there.numpy(),
        lambda: torch.rand(3, generator=torch.Generator(device), device="cpu"),
        lambda: torch.rand(3, generator=torch.Generator("cpu"), device=device),
        lambda: there.double() if LACKS else there[:2].copy_(there).index_add_(
            0, torch.tensor([0]), there),
    ):
        try:
            refused()
        except (RuntimeError, TypeError):
            print("refused")
    assert torch.equal((2 * there).cpu(), 2 * there.cpu())
"""

needs_one = pytest.mark.skipif(
    not pretended.EXISTS, reason="this PyTorch cannot be given a backend in Python"
)


def run(*command: str, device: str = "") -> str:
    """Runs a program by itself, as a process that has such a device has it to its end."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "GGL_AUDIT_TEST_DEVICE": device, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_one
@pytest.mark.parametrize("lacks_float64", [False, True])
def test_two_devices_are_not_mixed(lacks_float64: bool) -> None:
    assert run("-c", MIXED.replace("LACKS", str(lacks_float64))).count("refused") == 5


@needs_one
@pytest.mark.skipif(bool(NAMED), reason="these run on the device that is named")
@pytest.mark.parametrize(
    ("device", "tests"),
    [("pretended", "tests/device"), ("pretended32", "tests/device/test_numbers.py")],
)
def test_nothing_mixes_devices(device: str, tests: str) -> None:
    command = ("-m", "pytest", "-o", "addopts=--strict-markers", "-q", "-m", "device", tests)
    said = run(*command, device=device).strip().splitlines()[-1]
    assert " passed" in said
    assert "failed" not in said
