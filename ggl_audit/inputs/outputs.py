"""What a model returns: one tensor, or several of which one is the output that labels are read of.

Several come as a tuple, a named tuple, a dict, or an object with attributes, as image models of the
transformers library return one with ``logits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ggl_audit.errors import ReasonError
from ggl_audit.messages import Message

LOGITS = "logits"
MOST_SHOWN = 8

Place = int | str
"""Where one of several is: a key or an attribute, or a place from 0."""

NOT_CUT = Message(
    "model/not-cut",
    "{returned} cannot be cut into those of single images",
    advice="Return a tuple or a dict of tensors, as the loss of a single image is needed.",
)


def choose(returned: Any, place: Place | None) -> Any:
    """The one that a place tells; without one, all of it.

    Raises:
        LookupError: there is nothing of that name, or in that place.
    """
    if place is None:
        return returned
    if isinstance(returned, Mapping):
        if place in returned:
            return returned[place]
        if isinstance(place, int):
            return list(returned.values())[place]
    elif isinstance(place, str) and not isinstance(returned, torch.Tensor):
        if hasattr(returned, place):
            return getattr(returned, place)
    elif isinstance(returned, (tuple, list)) and isinstance(place, int):
        return returned[place]
    raise LookupError(place)


def candidates(returned: Any, images: int) -> list[Place | None]:
    """What may be the output: what is called logits, else each tensor with a row for each image.

    Args:
        returned: by the model.
        images: how many it was given.

    Returns:
        Places; None where a single tensor was returned.
    """
    if isinstance(returned, torch.Tensor):
        return [None] if _has_rows(returned, images) else []
    try:
        if _has_rows(choose(returned, LOGITS), images):
            return [LOGITS]
    except LookupError:
        pass
    return [place for place, part in _parts(returned).items() if _has_rows(part, images)]


def described(returned: Any) -> str:
    """In words: ``a tensor (2, 10)``, ``a dict of 'logits' (2, 10), 'aux' (2, 10)``."""
    kind = type(returned).__name__
    if isinstance(returned, torch.Tensor):
        return f"a tensor {tuple(returned.shape)}"
    parts = _parts(returned)
    if not parts:
        return f"a {kind}"
    shown = [f"{name!r} {_shown(part)}" for name, part in parts.items()]
    more = [f"{len(shown) - MOST_SHOWN} more"] if len(shown) > MOST_SHOWN else []
    return f"a {kind} of {', '.join(shown[:MOST_SHOWN] + more)}"


def first_rows(returned: Any, count: int, images: int) -> Any:
    """What was returned for the first images.

    Args:
        returned: tensors, in tuples, lists and dicts.
        count: of the first images.
        images: how many the model was given.

    Raises:
        TypeError: it is of another kind, and cannot be cut.
    """
    if not all(
        isinstance(leaf, torch.Tensor | None | float | str) for leaf in tree_leaves(returned)
    ):
        raise ReasonError(NOT_CUT(returned=described(returned)))
    return tree_map_only(
        torch.Tensor, lambda part: part[:count] if _has_rows(part, images) else part, returned
    )


def _has_rows(part: Any, images: int) -> bool:
    return isinstance(part, torch.Tensor) and part.ndim > 0 and len(part) == images


def _parts(returned: Any) -> dict[Place, Any]:
    """What was returned, by place."""
    if isinstance(returned, torch.Tensor):
        return {}
    if isinstance(returned, Mapping):
        return {name: part for name, part in returned.items() if isinstance(name, int | str)}
    if isinstance(returned, (tuple, list)):
        names = getattr(returned, "_fields", range(len(returned)))
        return dict(zip(names, returned, strict=True))
    return dict(getattr(returned, "__dict__", {}))


def _shown(part: Any) -> str:
    return str(tuple(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__
