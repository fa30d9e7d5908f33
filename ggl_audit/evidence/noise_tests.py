"""Is the noise of releases what differential privacy assumes?

It has to be fresh in every release, independent in every value, everywhere, and of the declared
distribution. Tests of all of these share :data:`FALSE_ACCUSATION` equally, and each splits its part
over what it compares; every probability is exact or a bound. So noise as declared is accused with a
probability of 1e-6 at most, and what is too little to tell is not accused either.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ggl_audit.defenses import FALSE_ACCUSATION
from ggl_audit.evidence.noise_dependence import (
    SMALLEST_CORRELATION,
    along_tensors,
    between_releases,
    between_tensors,
    drawn_twice,
    offsets,
    spectra,
    subspaces,
)
from ggl_audit.evidence.noise_directions import along_directions, along_shares
from ggl_audit.evidence.noise_distribution import (
    biases,
    discrete,
    distributions,
    missing,
    parts,
    scales,
    shares,
    signs,
)
from ggl_audit.evidence.noise_residuals import Residuals, Violation

TESTS = 17
"""That share the probability of a false accusation."""

MOST_SAID = 3
NOT_MUCH_WEAKER = 0.7
"""The share of the strongest that the right one has at least, in a small tensor by chance."""


class NoiseTest(BaseModel):
    """What became of the tests of the noise of the client's own code.

    Attributes:
        releases: that were made for it.
        values: of noise in all of them that were tested.
        rounding: of what is sent, relative; copies and grids finer than that are not seen.
        violations: what is not as declared, the most telling first.
    """

    model_config = ConfigDict(frozen=True)

    releases: int
    values: int
    rounding: float
    violations: list[Violation]


def find_violations(residuals: Residuals, probability: float = FALSE_ACCUSATION) -> list[Violation]:
    """Names what is wrong with noise, the most telling first.

    One mistake fails many tests. So those that take something for granted are only asked where the
    tests of that have found nothing: first whether there is noise at all, then whether it is drawn
    anew, then whether it has the declared strength and distribution. Of several correlations the
    strongest is named, as the weaker ones may follow from it.

    Args:
        residuals: what is left of the releases.
        probability: the largest with which noise as declared is accused.
    """
    level = probability / TESTS
    found, bare = missing(residuals, level)
    noisy = residuals.without(bare)
    if not noisy.values:
        return found
    grid = [*discrete(noisy, level)]
    if grid and not bare and found and found[0].strength <= 2 * grid[0].strength:
        found = []  # zero is one of the grid's values
    dependent = _dependence(noisy, level) if noisy.is_normal else []
    if dependent:
        return [*found, *dependent]
    found += grid or [*drawn_twice(noisy, level)]
    if not noisy.exact:
        return found or ([*scales(noisy, level)] if noisy.is_normal else [])
    other = [*shares(noisy, level)]
    if other and not noisy.paired:
        return [*found, *other]
    if other:
        noisy = noisy.differences()
    common = [*biases(noisy, level)] or [*offsets(noisy, level)] or [*spectra(noisy, level)]
    if common or (found and not other):
        return [*found, *other, *common]
    strength = [*scales(noisy, level)]
    shape = [*distributions(noisy, level)]
    own = [*strength, *shape, *([] if strength else parts(noisy, level))]
    own = own or [*along_shares(noisy, level)] or [*along_directions(noisy, level)]
    return [*other, *own]


def same_in_several(residuals: Residuals) -> list[Violation]:
    """The noise that releases have in common, whatever the rest of them is."""
    if not residuals.is_normal:
        return []
    return _leading([*between_releases(residuals, FALSE_ACCUSATION)])


def _dependence(residuals: Residuals, level: float) -> list[Violation]:
    """The strongest correlations, one of each kind, as weaker ones may follow from these."""
    releases = _leading([*between_releases(residuals, level)])
    one = residuals.first() if releases else residuals
    found = [
        *releases,
        *_leading(along_tensors(one, level)),
        *_leading([*between_tensors(one, level)]),
    ]
    if residuals.exact:
        found += signs(residuals, level)
    most = max((violation.strength for violation in found), default=0.0)
    # What is in all releases spans few dimensions too, but is another matter.
    if residuals.exact and most < SMALLEST_CORRELATION and not [*offsets(residuals, level)]:
        found += _leading([*subspaces(residuals, level)])
        most = max((violation.strength for violation in found), default=0.0)
    strong = [one for one in found if one.strength >= SMALLEST_CORRELATION * most]
    return sorted(strong, key=lambda one: -round(one.strength, 1))


def _leading(violations: Sequence[Violation]) -> list[Violation]:
    """The first of those that are not much weaker than the strongest, or none."""
    most = max((violation.strength for violation in violations), default=0.0)
    strong = [one for one in violations if one.strength >= NOT_MUCH_WEAKER * most]
    return strong[:1]
