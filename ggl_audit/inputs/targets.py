"""What images are to give where that is more than a class: labels are then rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.images import index_rows, read_labels
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

TARGETS_FOR_INDICES = Message(
    "loss/targets-for-indices",
    "given, but the labels of evidence.reference are class indices",
    "Declare capture.labels, or give reference labels of the same kind as the targets.",
)
TARGETS_OF_OTHER_SHAPE = Message(
    "loss/targets-of-other-shape",
    "its rows have the shape {shape}, those of the labels of evidence.reference {expected}",
    advice="Give both in the same shape.",
)
SEVERAL_TARGETS = Message(
    "loss/several-targets",
    "expected one tensor, a row an image, found {count}",
    advice="Save one tensor (images, ...) for `capture.targets`.",
)
NO_ROWS = Message(
    "loss/no-rows",
    "expected a tensor with a row for each captured image",
    advice="Save one tensor (images, ...) for `capture.targets`.",
)
TARGETS_NOT_FINITE = Message(
    "loss/targets-not-finite",
    "holds values that are NaN or infinite",
    advice="Save finite numbers.",
)


@dataclass(frozen=True)
class Targets:
    """The table.

    Attributes:
        rows: (K, ...), those of the reference set first; label k stands for row k.
        captured: the labels of the captured images, in order; none where they are not declared.
    """

    rows: torch.Tensor
    captured: tuple[int, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> Targets:
        """The same on a device, floating point in a dtype."""
        rows = self.rows.to(device)
        return Targets(rows.to(dtype) if rows.is_floating_point() else rows, self.captured)


def read_targets(spec: Spec) -> Targets | None:
    """Reads the targets of the reference set and of the captured images.

    Returns:
        None where labels are class indices.

    Raises:
        SpecError: the two do not belong together.
        InputError: a file is missing or broken.
    """
    reference, captured = spec.evidence.reference, spec.capture.targets
    labels = None if reference is None else read_labels(reference, spec.folder)
    if labels is None and (captured is None or reference is not None):
        if captured is not None:
            raise SpecError(("capture", "targets"), TARGETS_FOR_INDICES())
        return None
    own = None if captured is None else _read_rows(spec.resolve(captured))
    if labels is None:
        assert own is not None
        indexed = index_rows(own)
        return Targets(indexed.rows, tuple(indexed.labels.tolist()))
    indexed = index_rows(labels)
    if own is None:
        return Targets(indexed.rows)
    if own.shape[1:] != indexed.rows.shape[1:]:
        raise SpecError(
            ("capture", "targets"),
            TARGETS_OF_OTHER_SHAPE(
                shape=tuple(own.shape[1:]), expected=tuple(indexed.rows.shape[1:])
            ),
        )
    rows, numbers = indexed.rows, []
    for row in own.to(rows.dtype):
        same = (rows == row).flatten(1).all(1).nonzero() if indexed.shared else torch.empty(0)
        if len(same) == 0:
            rows = torch.cat([rows, row[None]])
        numbers.append(int(same[0]) if len(same) else len(rows) - 1)
    return Targets(rows, tuple(numbers))


def _read_rows(path: Path) -> torch.Tensor:
    tensors = read_tensors(path)
    if len(tensors) != 1:
        raise InputError(path, SEVERAL_TARGETS(count=len(tensors)))
    (rows,) = tensors.values()
    if rows.ndim == 0 or len(rows) == 0:
        raise InputError(path, NO_ROWS())
    if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
        raise InputError(path, TARGETS_NOT_FINITE())
    return rows
