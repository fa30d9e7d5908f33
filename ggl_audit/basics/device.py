"""The device that an audit computes on: this machine's processor, or an accelerator beside it."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from ggl_audit.errors import SpecError
from ggl_audit.messages import Message
from ggl_audit.spec import MEMORY_OF_A_PROCESSOR

CPU = torch.device("cpu")

SHARE_OF_MEMORY = 8
"""Unless told, candidates' gradients may take one part of so many of an accelerator's memory."""

REPEATABLE_PRODUCTS = ":4096:8"
"""For ``CUBLAS_WORKSPACE_CONFIG``: with buffers of a fixed size, sums are in a fixed order."""

UNKNOWN_DEVICE = Message(
    "spec/unknown-device",
    "unknown device {name!r}; expected auto, cpu, cuda, xpu or mps",
    advice="Give one of these as `device`; `cuda:1` is the second of several.",
)
NO_DEVICE = Message(
    "spec/no-device",
    "there is no {name} here",
    "`--device auto` takes a GPU if there is one.",
    advice="Use `--device auto`, which takes a GPU if PyTorch finds one.",
)


def choose_device(name: str) -> torch.device:
    """Resolves ``auto``, ``cpu`` or an accelerator of this machine, such as ``cuda`` or ``cuda:1``.

    Raises:
        SpecError: the name is unknown, or there is no such device here.
    """
    found = accelerator()
    if name == "auto":
        return found or CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(("device",), UNKNOWN_DEVICE(name=name)) from None
    if device.type == "cpu":
        return CPU
    if found is None or device.type != found.type or not _is_there(device):
        raise SpecError(("device",), NO_DEVICE(name=name))
    return device


def accelerator() -> torch.device | None:
    """The kind of accelerator that PyTorch finds here; None where there is none."""
    found = torch.accelerator.current_accelerator()
    return found if found is not None and torch.accelerator.is_available() else None


def settle(device: torch.device) -> None:
    """Has a device give the same bits for the same work, in float32 throughout.

    Convolutions take TensorFloat-32 by default, whose 10 bits of a fraction are fewer than what a
    capture is checked by.
    """
    if device.type != "cuda":
        return
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    deterministic: Any = torch.utils.deterministic
    cudnn.benchmark = False
    cudnn.deterministic = True
    if hasattr(products, "fp32_precision"):
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        products.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = products.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", REPEATABLE_PRODUCTS)
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=True)


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """What long sums are taken in: float64, or float32 where a device has no more, as Apple's."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the :func:`widest_float` of its device, to take long sums in."""
    return tensor.to(widest_float(tensor.device))


def lacking_operator(error: BaseException) -> str:
    """What PyTorch says where a device lacks an operator; empty if an error is about another thing.

    Args:
        error: what was raised, maybe for people in place of it.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, NotImplementedError):
        found = found.__cause__ or found.__context__
    words = "" if found is None else str(found).strip().partition("\n")[0]
    return words.partition(". ")[0].rstrip(".")


def usual_memory(device: torch.device) -> int:
    """The MiB that candidates' gradients may take at a time unless told, on a device."""
    if device.type == "cpu":
        return MEMORY_OF_A_PROCESSOR
    properties = getattr(_module(device), "get_device_properties", None)
    total = getattr(properties(device), "total_memory", 0) if properties else 0
    return max(MEMORY_OF_A_PROCESSOR, int(total) // SHARE_OF_MEMORY // 2**20)


def name_of(device: torch.device) -> str:
    """What a device calls itself."""
    named = getattr(_module(device), "get_device_name", None)
    return str(named(device)) if named and device.type != "cpu" else device.type


def most_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held on an accelerator; None where it does not count."""
    counted = getattr(_module(device), "max_memory_allocated", None)
    return int(counted(device)) if counted and device.type != "cpu" else None


def random_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that draws on a device where none is named."""
    state: torch.Tensor = _module(device).get_rng_state(*_index(device))
    return state


def restore_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Goes back to a :func:`random_state`."""
    _module(device).set_rng_state(state, *_index(device))


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds the generator that draws on a device where none is named."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        _module(device).manual_seed(seed)


def _module(device: torch.device) -> ModuleType:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)


def _is_there(device: torch.device) -> bool:
    return (device.index or 0) < torch.accelerator.device_count()
