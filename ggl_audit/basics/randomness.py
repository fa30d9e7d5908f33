"""Streams of randomness: independent for every seed and purpose, the same in every run."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of randomness for one purpose."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
