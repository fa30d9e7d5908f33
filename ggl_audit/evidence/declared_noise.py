"""Is the noise in a capture what was declared?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, stack
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.evidence.noise_residuals import Residuals, Violation, grain_of, residuals_of
from ggl_audit.evidence.noise_tests import MOST_SAID, find_violations, same_in_several
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message
from ggl_audit.spec import CaptureSpec

DECLARED_NOISE = "the declared noise"
MOST_LABELS = 20
SINGLE = torch.finfo(torch.float32).eps

SHARED_NOISE = Message(
    "contradiction/shared-noise",
    "of the captures of the round, {detail}",
    advice="Seed the generator once, from the system, and never again; draw anew for each "
    "release. Noise that is meant to correlate between rounds (DP-FTRL, matrix factorization) "
    "needs an accounting of its own, which is not made here.",
)
NOISE_AGREES = Message(
    "check/noise-agrees",
    "{count:,} values of it are as fresh and independent as declared{as_far_as_it_shows}",
    advice="Nothing; with `evidence.truth` the noise itself is tested.",
)


def check_noise(
    defense: Pipeline,
    observed: Gradient,
    model: ClientModel,
    capture: CaptureSpec,
    rounding: float,
) -> list[Check]:
    """Tests of a capture what needs no private image.

    Args:
        defense: the declared steps.
        observed: the capture.
        model: the client's model.
        capture: what it was declared to be.
        rounding: of the file's numbers, relative.

    Returns:
        Nothing where no noise can be seen: none is declared or of several kinds, steps follow it,
        or rounding hides it.
    """
    residuals = _residuals(defense, [observed], model, capture, rounding)
    if residuals is None:
        return []
    return [_judged(find_violations(residuals), residuals)]


def check_noise_beside(
    matching: Matching,
    observed: Gradient,
    truths: torch.Tensor,
    labels: torch.Tensor,
    capture: CaptureSpec,
    rounding: float,
    fits: bool,
) -> list[Check]:
    """The same, and all that can be told beside the private images.

    Args:
        matching: of the client's model, whose declared steps leave only noise.
        observed: the capture.
        truths: (k, channels, height, width), client by client.
        labels: (n, k), of which one row is right: noise is only accused if it is with each.
        capture: what it was declared to be.
        rounding: of the file's numbers, relative.
        fits: whether the images are those of the capture, as far as what is left says.
    """
    found: list[tuple[list[Violation], Residuals]] = []
    for row in labels:
        images = truths if len(truths) > 1 else truths[0]
        own = row if len(truths) > 1 else row[0]
        replicas = matching.replicas(images[None], own[None], stack([observed]))
        residuals = _residuals(
            matching.defense, [observed], matching.model, capture, rounding, replicas, len(truths)
        )
        if residuals is None:
            return []
        residuals = replace(residuals, exact=fits)
        found.append((find_violations(residuals), residuals))
        if not found[-1][0]:
            break
    return [_judged(*min(found, key=lambda one: len(one[0])))]


def check_shared_noise(
    defense: Pipeline,
    captures: Sequence[Gradient],
    model: ClientModel,
    capture: CaptureSpec,
    rounding: float,
) -> list[Check]:
    """Looks for noise that several captures of a round have in common.

    Args:
        defense: the declared steps.
        captures: of different clients.
        model: the clients' model.
        capture: what each was declared to be.
        rounding: of the files' numbers, relative; the largest.

    Returns:
        Nothing where there is none, or where it could not be seen.
    """
    residuals = _residuals(defense, captures, model, capture, rounding)
    violations = [] if residuals is None else same_in_several(residuals)
    return [
        Check(DECLARED_NOISE, "contradicts", SHARED_NOISE(detail=one.detail)) for one in violations
    ]


def _residuals(
    defense: Pipeline,
    captures: Sequence[Gradient],
    model: ClientModel,
    capture: CaptureSpec,
    rounding: float,
    replicas: Gradient | None = None,
    images: int = 1,
) -> Residuals | None:
    noise = defense.randomness.total_noise()
    if noise is None or not defense.randomness.ends_in_noise():
        return None
    captures = [defense.clear.parted(one)[0] for one in captures]
    if replicas is not None:
        replicas, _ = defense.clear.parted(replicas)
    floors = None
    rounding = max(rounding, *(grain_of([*one.values()]) for one in captures))
    if capture.kind == "update":  # a difference has the rounding of the weights
        weights = {**model.state, **model.parameters}
        floors = {n: 2 * SINGLE * float(weights[n].abs().max()) for n in captures[0]}
    if capture.kind == "moments":
        rounding *= 2 / (1 - capture.beta1)
    return residuals_of(
        stack(captures), noise, replicas, images=images, grain=rounding, floors=floors
    )


def _judged(violations: Sequence[Violation], residuals: Residuals) -> Check:
    if violations:
        first, *others = violations[:MOST_SAID]
        said = first.said.followed_by("".join(f"; {other.detail}" for other in others))
        return Check(DECLARED_NOISE, "contradicts", said)
    beside = "" if residuals.exact else ", as far as it shows beside an unknown gradient"
    agreed = NOISE_AGREES(count=residuals.count, as_far_as_it_shows=beside)
    return Check(DECLARED_NOISE, "agrees", agreed)
