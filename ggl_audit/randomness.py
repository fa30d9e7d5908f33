"""Streams of randomness: independent for every seed and purpose, the same in every run."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from ggl_audit.defenses import Context


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of randomness for one purpose."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def client_context(seed: int, purpose: str, device: torch.device) -> Context:
    """A client's randomness for one purpose."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(stream(seed, purpose).integers(2**63)))
    return Context(generator)
