"""Counting within classes."""

from __future__ import annotations

import torch


def place_in_class(labels: torch.Tensor) -> torch.Tensor:
    """How many images of the same class come before each one.

    Args:
        labels: (n,), int64 from 0.

    Returns:
        (n,), int64: 0 for the first of each class.
    """
    counts = torch.bincount(labels)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.empty_like(labels)
    places[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device) - before
    return places
