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

from ggl_audit.messages import Message, Said

FEWEST_CANARIES = 5
CLEAR, HALFWAY = 0.9, 0.5
MUCH_LOWER = 0.5
"""A share of the distance reached as declared: another declaration is far better below it."""

WHOLE = "the whole gradient"
NONE, SOME = 1e-10, 1e-7
"""The share of a squared norm that is rounding in single precision, and one that is not."""

ROUNDINGS = 25
"""The roundings of a file's numbers that may be all that a tensor holds."""

REACHED = Message(
    "cause/reached",
    "the loss: the client's reaches what the declared one leaves out, as an auxiliary head",
    advice="Declare the client's whole loss (`model.loss.factory`), auxiliary outputs included.",
)
FROZEN = Message(
    "cause/frozen",
    "the client froze it, or its loss leaves it out",
    advice="Freeze it in the model's code, or declare `capture.unsent`.",
)
BATCH_NORM_MODE = Message(
    "cause/batch-norm-mode",
    "the mode: a bias before batch norm has a gradient in eval mode only",
    advice="Declare the other `model.mode`.",
)
ZEROS = Message(
    "cause/zeros",
    "it holds {something} in {names}, where every canary's gradient holds {nothing}",
    advice="Declare the other `model.mode`, or compare what of the model is frozen with the "
    "client.",
)
COSINES = Message(
    "cause/cosines",
    "in {name} its best picture's gradient has a cosine of {cosine:.2f} with it; all canaries but "
    "one reach {worst:.2f} or more, random gradients {best:.2f} or less",
    advice="Begin with the named tensor: a wrong layer points to its weights or order, all of "
    "them to the image, the loss or the mode.",
)
ORDER = Message(
    "cause/order",
    "the order or layout of the values in {names}",
    advice="Save the tensors by name, in PyTorch's layout: (out, in, height, width).",
)
ANOTHER = Message(
    "cause/another",
    "the weights are of another model or round, the loss, mode or normalization is another, or it "
    "is no gradient of such an image",
    advice="Check these one after the other; give `evidence.truth`, if you hold the private "
    "image, to see each effect in `ggl-audit check`.",
)
SEARCH_MORE = (
    "Raise `evidence.reconstruction_trials` and `attack.evaluations`, or give a better prior; "
    "behind strong noise give `evidence.truth`."
)
TOO_FEW_CANARIES = Message(
    "doubt/too-few-canaries",
    "fewer than {count} canaries were reconstructed",
    advice=SEARCH_MORE,
)
NO_BETTER_THAN_RANDOM = Message(
    "doubt/no-better-than-random",
    "the best pictures of canaries explain their gradients no better than those of random "
    "gradients do",
    advice=SEARCH_MORE,
)


class Likeness(BaseModel):
    """What became of the comparison.

    Attributes:
        outcome: ``like`` the canaries' gradients, ``unlike`` them, ``undecided`` between these, or
            ``hidden`` where even theirs cannot be told from random ones, or there were too few.
        said: the figures.
        place: of the tensor that agrees least: 1 where the worst canary is, but for the one whose
            search failed most, 0 where the best random gradient is.
        cause: what is likely wrong with a capture that is unlike.
        rules_out_larger: it is like, which the gradient as a whole shows, and its norm is not above
            that of every canary, so that no larger gradient was sent than the canaries' are.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Literal["like", "undecided", "unlike", "hidden"]
    said: Said
    place: float | None = None
    cause: Said | None = None
    rules_out_larger: bool = False

    @property
    def detail(self) -> str:
        """The figures in words, as a sentence without a full stop."""
        return self.said.text


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
    pairs = (
        (captured > some, (canaries < NONE).all(0), "something", "nothing", REACHED),
        (captured < NONE, (canaries > some).all(0), "nothing", "something", FROZEN),
    )
    for own, theirs, has, have, cause in pairs:
        different = torch.nonzero(own & theirs).flatten().tolist()
        if different:
            listed = [names[i] for i in different]
            said = ZEROS(something=has, names=", ".join(listed), nothing=have)
            why = BATCH_NORM_MODE if set(listed) <= set(before_norm) else cause
            return Likeness(outcome="unlike", said=said, cause=why())
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
        return Likeness(outcome="hidden", said=TOO_FEW_CANARIES(count=FEWEST_CANARIES))
    succeeded = canaries[losses.argsort()[:-1]]
    worst, best = succeeded.amin(0), nulls.amax(0)
    gap = worst - best
    middle = succeeded.quantile(0.75, dim=0) - succeeded.quantile(0.25, dim=0)
    counted = gap > torch.maximum(best - nulls.amin(0), middle)
    if told is not None:
        counted[:-1] &= told
    if not bool(counted.any()):
        return Likeness(outcome="hidden", said=NO_BETTER_THAN_RANDOM())
    place = torch.where(counted, (captured - best) / gap.clamp(min=1e-9), torch.inf)
    named = [*names, WHOLE]
    lowest = int(place.argmin())
    said = COSINES(
        name=named[lowest],
        cosine=float(captured[lowest]),
        worst=float(worst[lowest]),
        best=float(best[lowest]),
    )
    if bool(place[lowest] >= HALFWAY):
        like = bool(place[lowest] >= CLEAR)
        return Likeness(
            outcome="like" if like else "undecided",
            said=said,
            place=float(place[lowest]),
            rules_out_larger=like and bool(counted[-1]),
        )
    low = [name for name, at in zip(named, place.tolist(), strict=True) if at < HALFWAY]
    right = int(counted.sum()) - len(low)
    tells = WHOLE not in low and right >= len(low)
    cause = ORDER(names=", ".join(low)) if tells else ANOTHER()
    return Likeness(outcome="unlike", said=said, place=float(place[lowest]), cause=cause)
