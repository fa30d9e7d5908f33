"""A client's randomness, decided by the seed and what it is for."""

from __future__ import annotations

import torch

from ggl_audit.basics.randomness import stream
from ggl_audit.defenses import Context


def client_context(seed: int, purpose: str, device: torch.device) -> Context:
    """A client's randomness for one purpose."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(stream(seed, purpose).integers(2**63)))
    return Context(generator)
