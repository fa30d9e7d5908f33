"""The machine that an audit runs on: versions, memory."""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy
import torch

from ggl_audit.basics.device import most_memory, name_of

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What mallopt(3) sets: the free memory that goes back, and what is not taken of a heap."""

MOST_IN_A_HEAP = 32 * 2**20
"""Bytes; glibc takes no more for the second."""


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, where its C library is glibc.

    Candidates are compared in chunks. glibc returns a chunk's memory and asks for the next one's,
    whose pages the system has to clear: as much as 40 % of the time that a comparison takes.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_MMAP_THRESHOLD, MOST_IN_A_HEAP)


def describe(device: torch.device) -> dict[str, str]:
    """What a reader needs to repeat the figures: versions, platform, device, threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": name_of(device),
        "threads": str(torch.get_num_threads()),
    }


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory held so far: on the accelerator, or by this process or one of its workers.

    None where that is unknown.
    """
    if device.type != "cpu":
        return most_memory(device)
    if sys.platform == "win32":
        return None
    import resource

    # Of the largest process, where several have worked.
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(one).ru_maxrss for one in who)
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised as there is no more memory, of the GPU or of this process."""
    # On a CPU it is "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
