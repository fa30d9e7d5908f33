"""Has noise the declared strength in the directions that tell images apart?

One direction among thousands of values changes no other test, but what is sent along it may tell
the image for certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.special import chdtr, chdtrc

from ggl_audit.evidence.noise_residuals import Residuals, Violation, more_than_declared
from ggl_audit.messages import Message

DIRECTIONS = 10
"""In which gradients differ most, that are looked at one by one."""

RANK = 1e-10
"""Relative, of the eigenvalue of a direction that is none."""

ALONG = Message(
    "contradiction/along",
    "the noise along {name} has {times:.3g} times the declared standard deviation, over {count:,} "
    "values{more_than_declared}",
    advice="Look for noise that is projected, orthogonalized or scaled along the gradient, its "
    "signs, or the directions that gradients vary along (`the gradient itself`, `the signs of the "
    "gradient`, `direction COUNT of those that the gradients of public images vary along most`): "
    "whoever knows these directions sees the gradient without the noise.",
)


def along_shares(residuals: Residuals, level: float) -> Iterator[Violation]:
    """Noise of another strength along the gradient that it is added to, or along its signs.

    Along a direction that does not depend on it noise is standard normal, so that over releases the
    sum of squares is a chi-squared variable. In all, and in each tensor.
    """
    if residuals.shares is not None:
        yield from _strengths(residuals, _own(residuals), level)


def along_directions(residuals: Residuals, level: float) -> Iterator[Violation]:
    """The same in fixed directions: those in which the gradients of public images differ most."""
    if residuals.shares is not None:
        yield from _strengths(residuals, _principal(residuals), level)


@dataclass(frozen=True)
class Sent:
    """What was sent along k directions.

    Attributes:
        along: (n, k), of the releases that have such directions standard normal values, of the
            others NaN.
        rounding: the most that one of them may be off.
        name: of the directions.
    """

    along: torch.Tensor
    rounding: float
    name: str


def _own(residuals: Residuals) -> list[Sent]:
    """Along each release's own share, and its signs."""
    found = []
    for name, values, share in _parts(residuals):
        whose = "the gradient" if name is None else f"{name} in the gradient"
        for what, rows in ((f"{whose} itself", share), (f"the signs of {whose}", share.sign())):
            sizes = rows.norm(dim=1, keepdim=True)
            units = rows / sizes.clamp(min=torch.finfo(rows.dtype).tiny)
            along = torch.where(sizes > 0, (values * units).sum(1, keepdim=True), torch.nan)
            found.append(Sent(along, _rounding(residuals, name), what))
    return found


def _principal(residuals: Residuals) -> list[Sent]:
    """Along the right singular vectors of all shares, by themselves and together."""
    found = []
    for name, values, share in _parts(residuals):
        once = share[: len(share) // 2] if residuals.paired else share
        eigenvalues, vectors = torch.linalg.eigh(once @ once.T)
        kept = (eigenvalues > RANK * eigenvalues[-1].clamp(min=1e-300)).nonzero().flatten().flip(0)
        if len(kept) == 0:
            continue
        directions = torch.linalg.qr(once.T @ vectors[:, kept] / eigenvalues[kept].sqrt()).Q
        along, off = values @ directions, _rounding(residuals, name)
        whose = "gradients" if name is None else f"gradients of {name}"
        for i in range(min(len(kept), DIRECTIONS)):
            what = f"direction {i + 1} of those that the {whose} of public images vary along most"
            found.append(Sent(along[:, i : i + 1], off, what))
        what = f"all {len(kept)} directions of the {whose} of public images"
        found.append(Sent(along, off, what))
    return found


def _parts(residuals: Residuals) -> Iterator[tuple[str | None, torch.Tensor, torch.Tensor]]:
    assert residuals.shares is not None
    yield None, residuals.flat, residuals.flat_shares
    if len(residuals.values) > 1:
        for name, values in residuals.values.items():
            yield name, values, residuals.shares[name]


def _rounding(residuals: Residuals, name: str | None) -> float:
    """The most that rounding changes what is sent along any direction."""
    names = [*residuals.values] if name is None else [name]
    squares = [residuals.rounding[n] ** 2 * residuals.values[n].shape[1] for n in names]
    return math.sqrt(sum(squares))


def _strengths(residuals: Residuals, sent: list[Sent], level: float) -> Iterator[Violation]:
    """Two-sided tests of sums of squares.

    Whatever is left of the share only makes the sum of squares larger (Anderson 1955); so too much
    is told from the differences of two releases of an image, in which it cancels.
    """
    worst = None
    half = residuals.releases // 2
    for one in sent:
        along = one.along
        known = along[~along.isnan().any(1)]
        sides = [(known, -1)]
        if residuals.paired:
            differences = (along[:half] - along[half : 2 * half]) / math.sqrt(2)
            sides.append((differences[~differences.isnan().any(1)], 1))
        for values, side in sides:
            count = values.numel()
            if count == 0:
                continue
            root, off = float(values.norm()), one.rounding * math.sqrt(2 * len(values))
            if side < 0:
                p_value = float(chdtr(count, (root + off) ** 2))
            else:
                p_value = float(chdtrc(count, max(root - off, 0.0) ** 2))
            away = abs(root**2 - count) / math.sqrt(count)
            if p_value * 2 * len(sent) <= level and (worst is None or away > worst[0]):
                worst = away, one.name, root / math.sqrt(count), count
    if worst is not None:
        _, name, ratio, count = worst
        yield Violation(
            "direction",
            ALONG(
                name=name,
                times=ratio,
                count=count,
                more_than_declared=more_than_declared(ratio),
            ),
        )
