"""The captured gradient placed among the canaries', from what the trials have left behind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case
from ggl_audit.evidence.likeness import (
    CLEAR,
    HALFWAY,
    MUCH_LOWER,
    NONE,
    Likeness,
    judge,
    judge_zeros,
)
from ggl_audit.experiments.capture import Attacked
from ggl_audit.experiments.reconstruction import Reconstructed
from ggl_audit.inputs.model import has_batch_norm
from ggl_audit.messages import Said


class Premises(BaseModel):
    """What has to be known of a capture, besides the trials, to place it.

    Attributes:
        before_norm: the tensors that may be biases before batch norm.
        rounding: of the capture's numbers, relative.
        empties_tensors: whether a declared step may leave nothing of a tensor for one image and
            something for another, so that zeros tell nothing.
    """

    model_config = ConfigDict(frozen=True)

    before_norm: list[str]
    rounding: float
    empties_tensors: bool


def premises_of(case: Case, capture: Capture) -> Premises:
    """What is known of a capture."""
    biases = [name for name, tensor in capture.observed.items() if tensor.ndim == 1]
    return Premises(
        before_norm=biases if has_batch_norm(case.model.module) else [],
        rounding=capture.fitted.rounding,
        empties_tensors=case.defense.effect.empties_tensors(),
    )


class Explanation(BaseModel):
    """How well another declaration explains a capture.

    Attributes:
        cause: what the declaration differs in from that of the spec.
        losses: that independent searches reached under it.
        agreements: of their pictures, (searches, k).
        tensors: the names of k - 1 tensors.
    """

    model_config = ConfigDict(frozen=True)

    cause: Said
    losses: list[float]
    agreements: list[list[float]]
    tensors: list[str]


def place(
    premises: Premises,
    attacked: Attacked,
    canaries: Sequence[Reconstructed],
    others: Sequence[Explanation] = (),
) -> Likeness:
    """Judges a capture, and names the other declaration that explains it better, if one does.

    Args:
        premises: what is known of the capture.
        attacked: what came of the attacks on it.
        canaries: what came of those on canaries, one at least.
        others: the other declarations that were tried.
    """
    likeness = _judged(attacked.agreements, attacked.tensors, canaries)
    if attacked.norm > max(one.norm for one in canaries):
        likeness = likeness.model_copy(update={"rules_out_larger": False})
    if not premises.empties_tensors:
        zeros = judge_zeros(
            torch.tensor(attacked.shares, dtype=torch.float64),
            torch.tensor([one.shares for one in canaries], dtype=torch.float64),
            attacked.tensors,
            premises.before_norm,
            premises.rounding,
        )
        likeness = zeros or likeness
    better = _best(others, likeness, min(attacked.losses), canaries)
    if better is None or not is_in_question(likeness, attacked, canaries):
        return likeness
    return likeness.model_copy(
        update={"outcome": "unlike", "cause": better, "rules_out_larger": False}
    )


def is_in_question(
    likeness: Likeness, attacked: Attacked, canaries: Sequence[Reconstructed]
) -> bool:
    """Whether it is worth asking what else the capture may be of."""
    if likeness.outcome == "hidden":
        return False
    placed = likeness.place is not None and likeness.place >= CLEAR
    losses = torch.tensor([one.loss for one in canaries])
    return not (placed and min(attacked.losses) <= float(losses.median()))


def _best(
    others: Sequence[Explanation],
    likeness: Likeness,
    loss: float,
    canaries: Sequence[Reconstructed],
) -> Said | None:
    """The other declaration that explains the capture best, if any does so better; in words.

    What is lower at all counts where the capture is unlike the canaries, else what is much lower.
    """
    unlike = likeness.outcome == "unlike"
    least_place, lowest = (HALFWAY, loss) if unlike else (CLEAR, MUCH_LOWER * loss)
    better = None
    for other in others:
        placed = _judged(other.agreements, other.tensors, canaries).place
        reached = min(other.losses)
        if placed is not None and placed >= least_place and reached < lowest:
            lowest = reached
            better = other.cause.followed_by(
                f", with which it is like them, at a matching distance of {lowest:.2g} in place of "
                f"{loss:.2g}"
            )
    return better


def _judged(
    agreements: Sequence[Sequence[float]],
    tensors: Sequence[str],
    canaries: Sequence[Reconstructed],
) -> Likeness:
    """By the picture that places the capture highest: a single search may fail."""
    theirs = torch.tensor([one.agreements for one in canaries])
    nulls = torch.tensor([one.null_agreements for one in canaries])
    losses = torch.tensor([one.loss for one in canaries])
    told = (torch.tensor([one.shares for one in canaries], dtype=torch.float64) > NONE).any(0)
    judged = [judge(row, theirs, losses, nulls, tensors, told) for row in torch.tensor(agreements)]
    return max(judged, key=lambda one: -math.inf if one.place is None else one.place)
