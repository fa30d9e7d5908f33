"""The machine that an audit runs on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS_OF_CHUNKS = """
import resource, sys, torch
from ggl_audit.environment import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def chunk():
    return [torch.ones(2**21) for _ in range(4)]

for _ in range(5):
    chunk()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    chunk()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_chunks_take_the_memory_that_the_ones_before_have_freed() -> None:
    program = [sys.executable, "-c", FAULTS_OF_CHUNKS]
    returned = int(subprocess.check_output([*program, "returned"]))  # noqa: S603
    kept = int(subprocess.check_output([*program, "kept"]))  # noqa: S603
    assert kept < returned / 20
