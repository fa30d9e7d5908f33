"""What tensors that are not a model's are, by their names."""

from __future__ import annotations

import re

import torch

OPTIMIZER_STATE = "optimizer state"
KINDS = {
    OPTIMIZER_STATE: re.compile(
        r"exp_avg|momentum|velocity|square_avg|grad_avg|acc_delta|moment|optim|(^|[._])(m|v)[._]?t?$"
    ),
    "metrics": re.compile(r"loss|acc|metric|auc|f1|precision|recall|score|time|error"),
    "counts": re.compile(r"num|count|n_|samples|examples|size|steps?|epochs?|rounds?|iter"),
}


def kind_of(name: str, tensor: torch.Tensor) -> str | None:
    """What clients and tools save under such a name; metrics and counts are single values."""
    for kind, words in KINDS.items():
        if words.search(name.lower()) and (kind == OPTIMIZER_STATE or tensor.numel() <= 1):
            return kind
    return None
