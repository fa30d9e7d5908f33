"""One observation over a case: what was captured, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses import Check
from ggl_audit.inputs.capture import FittedGradient
from ggl_audit.messages import Said


@dataclass(frozen=True)
class Capture:
    """A captured gradient, observed and checked.

    Attributes:
        file: as the spec names it.
        fitted: the capture as it was read.
        observed: the captured gradient as the attacker sees it, defended.
        checks: the capture against each declared step.
        labels: of the images that the capture is made of.
        inferred: whether the labels are inferred from the capture, and not declared.
        labels_in_doubt: why inferred ones may be wrong, none or one; part of the case's ``doubts``.
        truths: (k, channels, height, width), the images that the capture is made of, client by
            client; (0, ...) where the auditor does not hold them.
        truth_labels: of these; None where it is not known which label belongs to which image.
        prior_saw_truth: whether the prior was trained on any of them.
    """

    file: str
    fitted: FittedGradient
    observed: Gradient
    checks: list[Check]
    labels: list[int]
    inferred: bool
    labels_in_doubt: list[Said]
    truths: torch.Tensor
    truth_labels: list[int] | None
    prior_saw_truth: bool

    def repeated_labels(self, count: int) -> torch.Tensor:
        """The labels for so many searches, (count, k)."""
        device = next(iter(self.observed.values())).device
        return torch.tensor(self.labels, device=device).expand(count, -1)

    def contradicted(self) -> set[str]:
        """The steps that the capture contradicts, without their parameters."""
        return {c.step.partition("(")[0] for c in self.checks if c.outcome == "contradicts"}
