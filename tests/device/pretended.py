"""An accelerator that is not there: tensors on it are held by the CPU, and mixed with none of it.

PyTorch lets a backend be written in Python. This one computes everything as the CPU does and holds
the values apart, so that what only a GPU would refuse is refused without one: a tensor made without
a device, a generator of another one, an array taken from it without a copy, and, where it is told
so, float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretended"
EXISTS = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

LACKING: set[str] = set()
"""Operators that the device is without."""

ACROSS = {"copy_", "_to_copy", "set_"}
"""Operators that take tensors of two devices."""


class Held(torch.Tensor):
    """A tensor of the device; ``values`` has what it holds, on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Held:
        held = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        held.values = values
        return held

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(operator, args, kwargs or {}, lacks_float64=False)

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Generator(torch.Generator):
    """A generator of the device: one of the CPU, by another name."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.named = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.named


def computed(operator: Any, args: Any, kwargs: dict[str, Any], *, lacks_float64: bool) -> Any:
    """What an operator returns, once it is clear that it takes no more than one device."""
    name = operator.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, Held)]
    there = bool(held)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
    elif there and name not in ACROSS and "index" not in name:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Held) and tensor.ndim]
        if strangers:
            raise RuntimeError(f"{operator}: tensors on two devices, {NAME} and cpu")
    if name == "index_put_" and any(isinstance(tensor, Held) for tensor in tensors) != isinstance(
        args[0], Held
    ):
        raise RuntimeError(f"{operator}: tensors on two devices, {NAME} and cpu")
    if there and name in LACKING:
        raise NotImplementedError(f"The operator 'aten::{name}' is not implemented for {NAME}.")
    args, kwargs = tree_map_only(Held, lambda tensor: tensor.values, (args, kwargs))
    returned = operator(*args, **kwargs)
    if name == "_local_scalar_dense":
        return returned
    if operator._schema.is_mutable and isinstance(args[0], torch.Tensor) and name.endswith("_"):
        return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    if not there:
        return returned
    made = tree_map_only(torch.Tensor, Held, returned)
    if lacks_float64 and any(
        isinstance(leaf, Held) and leaf.dtype in (torch.float64, torch.complex128)
        for leaf in tree_leaves(made)
    ):
        raise TypeError(f"{operator}: {NAME} has no float64")
    return made


class Arguments(TorchFunctionMode):
    """Sees to what PyTorch does before it asks a backend: from lists, and with a generator."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        generator = kwargs.get("generator")
        if generator is not None:
            where = args[0].device if isinstance(args[0], torch.Tensor) else device
            if generator.device.type != where.type:
                raise RuntimeError(f"a generator of {generator.device} for a tensor of {where}")
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        if function is torch.Tensor.new_tensor and isinstance(args[0], Held):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(NAME)
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and device.type == NAME:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **{**kwargs, "device": "cpu"}).to(device)
        return function(*args, **kwargs)


def _indices(given: Any) -> Any:
    """Lists and arrays as tensors, which PyTorch makes of them by ways of its own."""
    if isinstance(given, tuple):
        return tuple(map(_indices, given))
    if isinstance(given, (list, np.ndarray)):
        return torch.tensor(given, dtype=None if len(given) else torch.long)
    return given


class Pretended(TorchDispatchMode):
    """While it is entered, there is such a device.

    Args:
        lacks_float64: as Apple's do.
    """

    def __init__(self, *, lacks_float64: bool) -> None:
        super().__init__()
        self._lacks_float64 = lacks_float64
        self._arguments = Arguments()

    def __enter__(self) -> Pretended:
        self._arguments.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._arguments.__exit__(*raised)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(operator, args, kwargs or {}, lacks_float64=self._lacks_float64)


class Module:
    """What ``torch.pretended`` is; what draws without a generator draws as the CPU does."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed


def begin() -> Callable[..., torch.Generator]:
    """Registers the device, once in a process; returns what makes its generators."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    return Generator
