"""Repeating what an accelerator did without telling it each step again.

A step of a descent on a small model is thousands of calls that take longer to make than to carry
out. A CUDA graph holds them all, and is one call (Gray, Getting Started with CUDA Graphs, 2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

ALONE = 2
"""Calls for inputs of a shape before one is recorded: libraries choose their ways in these."""

Shapes = tuple[Any, ...]


@dataclass(frozen=True)
class Recording:
    """One call, ready to be repeated.

    Attributes:
        graph: of all that the accelerator did.
        given: the tensors that it reads.
        returned: what it writes.
    """

    graph: torch.cuda.CUDAGraph
    given: list[torch.Tensor]
    returned: Any


class Replayed:
    """A function of tensors whose steps depend on nothing but their shapes.

    On an accelerator that can record, its calls are recorded for each shape of what it is given;
    one that cannot be, as something in it looks at a value, is called as it is. Elsewhere it is the
    function itself.

    Args:
        function: takes and returns trees of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls: dict[Shapes, int] = {}
        self._recorded: dict[Shapes, Recording | None] = {}

    def __call__(self, *given: Any) -> Any:
        """Calls it, or repeats it with these tensors."""
        leaves, tree = tree_flatten(given)
        if not leaves or leaves[0].device.type != "cuda":
            return self._function(*given)
        shapes = (str(tree), *((leaf.shape, leaf.dtype) for leaf in leaves))
        self._calls[shapes] = self._calls.get(shapes, 0) + 1
        if self._calls[shapes] <= ALONE:
            return self._function(*given)
        if shapes not in self._recorded:
            # What an earlier shape holds is given back, as there is one chunk of memory for all.
            self._recorded.clear()
            self._recorded[shapes] = self._record(leaves, given)
        recording = self._recorded[shapes]
        if recording is None:
            return self._function(*given)
        for own, leaf in zip(recording.given, leaves, strict=True):
            own.copy_(leaf)
        recording.graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, recording.returned)

    def _record(self, leaves: list[torch.Tensor], given: Any) -> Recording | None:
        """A recording of a call; None where it cannot be recorded."""
        own = {id(leaf): leaf.detach().clone() for leaf in leaves}
        mine = tree_map_only(torch.Tensor, lambda leaf: own[id(leaf)], given)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                returned = self._function(*mine)
        except Exception as error:
            # The function calls the user's own model; what is wrong with it shows without this.
            torch.cuda.synchronize()
            warnings.warn(f"a step is not recorded: {error}", stacklevel=2)
            return None
        return Recording(graph, [own[id(leaf)] for leaf in leaves], returned)
