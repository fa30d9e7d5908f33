"""Is the captured gradient like the canaries', so that their rates speak for it?

Where the private image is not held, nothing says directly that the capture belongs to the declared
model. But the attack's best picture has a gradient too. If the capture is what was declared, that
gradient agrees with it about as well as those of the canaries' pictures agree with theirs; if it is
of another model, mode, normalization or order, some tensors agree no better than for a random
gradient, for which the null control's searches are the measure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

FEWEST_CANARIES = 5
CLEAR, HALFWAY = 0.9, 0.5
MUCH_LOWER = 0.5
"""A share of the distance reached as declared: another declaration is far better below it."""

WHOLE = "the whole gradient"
NONE, SOME = 1e-10, 1e-7
"""The share of a squared norm that is rounding in single precision, and one that is not."""

ROUNDINGS = 25
"""The roundings of a file's numbers that may be all that a tensor holds."""


class Likeness(BaseModel):
    """What became of the comparison.

    Attributes:
        outcome: ``like`` the canaries' gradients, ``unlike`` them, ``undecided`` between these, or
            ``hidden`` where even theirs cannot be told from random ones, or there were too few.
        detail: the figures, as a sentence without a full stop.
        place: of the tensor that agrees least: 1 where the worst canary is, but for the one whose
            search failed most, 0 where the best random gradient is.
        cause: what is likely wrong with a capture that is unlike.
        rules_out_larger: it is like, which the gradient as a whole shows, and its norm is not above
            that of every canary, so that no larger gradient was sent than the canaries' are.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Literal["like", "undecided", "unlike", "hidden"]
    detail: str
    place: float | None = None
    cause: str | None = None
    rules_out_larger: bool = False


def judge_zeros(
    captured: torch.Tensor,
    canaries: torch.Tensor,
    names: Sequence[str],
    before_norm: Collection[str] = (),
    rounding: float = 0.0,
) -> Likeness | None:
    """Finds a tensor that holds nothing in all canaries and something in the capture, or reversed.

    What is zero up to rounding is so for a reason in the model's structure: a bias before batch
    norm has no gradient in train mode and has one in eval mode; a head that the declared loss does
    not ask has none at all.

    Args:
        captured: (k,), the share of each tensor in the squared norm of the capture.
        canaries: (n, k), the same for the canaries.
        names: of the k tensors.
        before_norm: the tensors that may be biases before batch norm.
        rounding: of the capture's numbers, relative.

    Returns:
        None where there is no such tensor.
    """
    if len(canaries) < FEWEST_CANARIES:
        return None
    some = max(SOME, (ROUNDINGS * rounding) ** 2)
    reached = (
        "the loss: the client's reaches what the declared one leaves out, as an auxiliary head"
    )
    frozen = "the client froze it, or its loss leaves it out"
    pairs = (
        (captured > some, (canaries < NONE).all(0), "something", "nothing", reached),
        (captured < NONE, (canaries > some).all(0), "nothing", "something", frozen),
    )
    for own, theirs, has, have, cause in pairs:
        different = torch.nonzero(own & theirs).flatten().tolist()
        if different:
            listed = [names[i] for i in different]
            return Likeness(
                outcome="unlike",
                detail=f"it holds {has} in {', '.join(listed)}, where every canary's gradient "
                f"holds {have}",
                cause="the mode: a bias before batch norm has a gradient in eval mode only"
                if set(listed) <= set(before_norm)
                else cause,
            )
    return None


def judge(
    captured: torch.Tensor,
    canaries: torch.Tensor,
    losses: torch.Tensor,
    nulls: torch.Tensor,
    names: Sequence[str],
    told: torch.Tensor | None = None,
) -> Likeness:
    """Places the capture between the canaries and the null control, tensor by tensor.

    The canary whose search ended worst is left out, as it may tell of the search alone. A tensor
    counts if the others' agreements are above the nulls' by more than the nulls spread, and than
    the middle half of the canaries. There the capture is at 1 where the worst canary is and at 0
    where the best null is; it is unlike if any tensor is below one half. If the capture is
    exchangeable with n canaries, a tensor falls below all but one of them with a probability of
    2/(n+1) at most, and below one half less often.
    Between one half and 0.9 it is undecided: values in another order agree about as well where all
    have much in common. Above one half it is only said to be unlike if another declaration explains
    it better, which the caller tries.

    Args:
        captured: (k,), the cosine between the capture and the best picture's replica, for each of
            k - 1 tensors and for the whole gradient.
        canaries: (n, k), the same for the canaries.
        losses: (n,), the distances that the canaries' searches reached.
        nulls: (m, k), the same as ``canaries`` for random gradients of the same norms.
        names: of the k - 1 tensors.
        told: (k - 1,), whether a tensor holds more than rounding; all do unless given.
    """
    if len(canaries) < FEWEST_CANARIES:
        return Likeness(
            outcome="hidden",
            detail=f"fewer than {FEWEST_CANARIES} canaries were reconstructed",
        )
    succeeded = canaries[losses.argsort()[:-1]]
    worst, best = succeeded.amin(0), nulls.amax(0)
    gap = worst - best
    middle = succeeded.quantile(0.75, dim=0) - succeeded.quantile(0.25, dim=0)
    counted = gap > torch.maximum(best - nulls.amin(0), middle)
    if told is not None:
        counted[:-1] &= told
    if not bool(counted.any()):
        return Likeness(
            outcome="hidden",
            detail="the best pictures of canaries explain their gradients no better than those of "
            "random gradients do",
        )
    place = torch.where(counted, (captured - best) / gap.clamp(min=1e-9), torch.inf)
    named = [*names, WHOLE]
    lowest = int(place.argmin())
    detail = (
        f"in {named[lowest]} its best picture's gradient has a cosine of {captured[lowest]:.2f} "
        f"with it; all canaries but one reach {worst[lowest]:.2f} or more, random gradients "
        f"{best[lowest]:.2f} "
        "or less"
    )
    if bool(place[lowest] >= HALFWAY):
        like = bool(place[lowest] >= CLEAR)
        return Likeness(
            outcome="like" if like else "undecided",
            detail=detail,
            place=float(place[lowest]),
            rules_out_larger=like and bool(counted[-1]),
        )
    low = [name for name, at in zip(named, place.tolist(), strict=True) if at < HALFWAY]
    right = int(counted.sum()) - len(low)
    if WHOLE not in low and right >= len(low):
        cause = f"the order or layout of the values in {', '.join(low)}"
    else:
        cause = (
            "the weights are of another model or round, the loss, mode or normalization is "
            "another, or it is no gradient of such an image"
        )
    return Likeness(outcome="unlike", detail=detail, place=float(place[lowest]), cause=cause)
