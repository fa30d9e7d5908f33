"""A client's randomness, decided by the seed, what it is for, and the trial."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ggl_audit.basics.randomness import stream
from ggl_audit.defenses import Context


def client_context(
    seed: int, purpose: str, device: torch.device, trial: int | None = None
) -> Context:
    """A client's randomness for one purpose, or for one trial of it."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(stream(seed, purpose, trial).integers(2**63)))
    return Context(generator)


def client_contexts(
    seed: int, purpose: str, device: torch.device, trials: Iterable[int]
) -> list[Context]:
    """A client's randomness in each of several trials, which does not depend on the others."""
    return [client_context(seed, purpose, device, trial) for trial in trials]
