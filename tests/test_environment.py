"""The machine that an audit runs on."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

HEAP_AFTER_A_CHUNK = """
import ctypes, sys, torch
from ggl_audit.basics.environment import keep_freed_memory

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("heap", *"bcdefghij")]

statistics = ctypes.CDLL(None).mallinfo2
statistics.restype = Statistics
if sys.argv[1] == "kept":
    keep_freed_memory()
before = statistics().heap
chunk = torch.ones(30 * 2**18)
del chunk
print(statistics().heap - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="the C library is not glibc 2.33 or later",
)
def test_the_memory_of_a_chunk_is_kept_for_the_next() -> None:
    program = [sys.executable, "-c", HEAP_AFTER_A_CHUNK]
    assert int(subprocess.check_output([*program, "returned"])) < 2**20
    assert int(subprocess.check_output([*program, "kept"])) > 20 * 2**20
