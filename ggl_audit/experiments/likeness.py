"""The captured gradient among the canaries', and what else it may be of."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from ggl_audit.basics.gradient import Gradient, norm, shares, stack, take
from ggl_audit.case.setting import Setting
from ggl_audit.evidence.likeness import (
    CLEAR,
    HALFWAY,
    MUCH_LOWER,
    NONE,
    Likeness,
    judge,
    judge_zeros,
)
from ggl_audit.experiments.alternatives import (
    other_layouts,
    other_models,
    other_signs,
    other_trainings,
)
from ggl_audit.experiments.attacks import Advance, captured_labels, run_search
from ggl_audit.experiments.capture import CAPTURED, SEARCHES_COMPARED
from ggl_audit.experiments.measurements import Measurements
from ggl_audit.inputs.model import has_batch_norm


@dataclass(frozen=True)
class _Canaries:
    """What became of the canaries, beside which a capture is judged.

    Attributes:
        agreements: (n, k), of their pictures with their k - 1 tensors and the whole.
        nulls: (n, k), of their null control.
        losses: (n,), the matching distances that were reached.
        told: (k - 1,), whether a tensor of theirs holds more than rounding.
    """

    agreements: torch.Tensor
    nulls: torch.Tensor
    losses: torch.Tensor
    told: torch.Tensor

    def judge(self, setting: Setting, images: torch.Tensor) -> Likeness:
        """Of the picture that places the capture highest: a single search may fail."""
        count, names = len(images), list(setting.observed)
        matching = setting.matching()
        labels = captured_labels(setting, count)
        found = matching.agreement(images, labels, stack([setting.observed] * count))
        canaries = (self.agreements, self.losses, self.nulls)
        judged = [judge(row, *canaries, names, self.told) for row in found]
        return max(judged, key=lambda one: -math.inf if one.place is None else one.place)


def place_capture(
    setting: Setting,
    measured: Measurements,
    agreements: torch.Tensor,
    gradients: Gradient,
    advance: Advance,
) -> Likeness:
    """Judges the capture, and where it is unlike the canaries, or may be, looks for the cause.

    Args:
        setting: what was handed in.
        measured: holds the pictures of the capture.
        agreements: (2, n, k), of the canaries and of their null control.
        gradients: of the canaries, k - 1 tensors with a leading dimension n.
        advance: told of the candidates that are evaluated.

    Raises:
        KeyboardInterrupt: interrupted.
    """
    assert measured.repeated is not None
    losses = torch.tensor(measured.canary_losses, device=agreements.device)
    their_shares = shares(gradients)
    told = (their_shares > NONE).any(0)
    canaries = _Canaries(agreements[0], agreements[1], losses, told)
    likeness = canaries.judge(setting, measured.repeated)
    largest = max(float(norm(take(gradients, i))) for i in range(len(losses)))
    if float(norm(setting.observed)) > largest:
        likeness = likeness.model_copy(update={"rules_out_larger": False})
    if not setting.defense.effect.empties_tensors():
        own_shares = shares(stack([setting.observed]))[0]
        names, rounding = list(setting.observed), setting.captured.rounding
        before_norm = (
            [name for name, tensor in setting.observed.items() if tensor.ndim == 1]
            if has_batch_norm(setting.model.module)
            else []
        )
        zeros = judge_zeros(own_shares, their_shares, names, before_norm, rounding)
        likeness = zeros or likeness
    is_placed = likeness.place is not None and likeness.place >= CLEAR
    is_explained = min(measured.repeated_losses) <= float(losses.median())
    if likeness.outcome == "hidden" or (is_placed and is_explained):
        return likeness
    cause = _better_cause(setting, measured, canaries, likeness.outcome, advance)
    if cause is None:
        return likeness
    found = {"outcome": "unlike", "cause": cause, "rules_out_larger": False}
    return likeness.model_copy(update=found)


def _better_cause(
    setting: Setting, measured: Measurements, canaries: _Canaries, outcome: str, advance: Advance
) -> str | None:
    """The other declaration that explains the capture best, if any does so better; in words.

    What is lower at all counts where the capture is unlike the canaries, else what is much lower.
    """
    loss = min(measured.repeated_losses)
    unlike = outcome == "unlike"
    least_place, lowest = (HALFWAY, loss) if unlike else (CLEAR, MUCH_LOWER * loss)
    better_cause = None
    # Values in another order are told by the agreement of their own tensors.
    layouts = other_layouts(setting) if outcome in ("unlike", "undecided") else ()
    others = (other_signs(setting), other_models(setting), other_trainings(setting), layouts)
    for cause, other in itertools.chain(*others):
        if not measured.clock.reaches(SEARCHES_COMPARED * measured.seconds_each):
            break
        observed = stack([other.observed] * SEARCHES_COMPARED)
        labels = captured_labels(other, SEARCHES_COMPARED)
        # The capture's own stream, so that a declaration which is the same in effect does the same.
        result, images = run_search(other, other.defense, observed, labels, CAPTURED, advance)
        if not result.complete:
            raise KeyboardInterrupt
        place, loss_elsewhere = canaries.judge(other, images).place, float(result.losses.min())
        if place is not None and place >= least_place and loss_elsewhere < lowest:
            lowest = loss_elsewhere
            better_cause = (
                f"{cause}, with which it is like them, at a matching distance of {lowest:.2g} in "
                f"place of {loss:.2g}"
            )
    return better_cause
