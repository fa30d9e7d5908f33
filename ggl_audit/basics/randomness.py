"""Streams of randomness: independent for every seed, purpose and trial, the same in every run."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, trial: int | None = None) -> np.random.Generator:
    """A stream of randomness for one purpose, or for one trial of it."""
    words = [seed, zlib.crc32(purpose.encode())]
    return np.random.default_rng(words if trial is None else [*words, trial])
