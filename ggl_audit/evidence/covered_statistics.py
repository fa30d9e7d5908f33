"""Is the noise that is said to be over everything also on the running statistics?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import chdtri

from ggl_audit.basics.gradient import Gradient, flat
from ggl_audit.defenses import FALSE_ACCUSATION, Check, Pipeline
from ggl_audit.inputs.fitting import COUNTER
from ggl_audit.messages import Message

OVER_EVERYTHING = "what the clip and the noise are over"
WHOLE = 1e-4
"""The rounding of a count of batches, as single precision leaves it in a file."""

SENT_WITHOUT_NOISE = (
    "The statistics were sent without the noise that `over: everything` declares: declare `over: "
    "parameters`, or mend the client."
)
WHOLE_COUNTS = Message(
    "contradiction/whole-counts",
    "all counts of batches are whole numbers, which noise of standard deviation {std:g} would not "
    "leave",
    advice=SENT_WITHOUT_NOISE,
)
STATISTICS_WITHOUT_NOISE = Message(
    "contradiction/statistics-without-noise",
    "{name} is at a distance of {distance:.4g} from what public images give, and noise of "
    "standard deviation {std:g} on {count} values keeps at least {least:.4g}",
    advice=SENT_WITHOUT_NOISE,
)
STATISTICS_TOO_SMALL = Message(
    "contradiction/statistics-too-small",
    "{name} may have been sent without noise, as it is too small to show any",
    advice=SENT_WITHOUT_NOISE,
)
STATISTICS_NOISED = Message(
    "check/statistics-noised",
    "{count} tensors beside the parameters are noised",
    advice="Nothing.",
)


def check_covered(
    defense: Pipeline, names: Sequence[str], observed: Gradient, usual: Sequence[Gradient]
) -> Check | None:
    """Looks for the declared noise in running statistics and counts of batches.

    Noise leaves no count whole. And around any values that do not depend on it, it is no nearer
    than around zero (Anderson, Proceedings of the AMS 1955), where its squared norm is a
    chi-squared variable; what public images make of the statistics are such values.

    Args:
        defense: the declared steps, over everything.
        names: of the statistics and counts in the release.
        observed: the release.
        usual: what releases of public images hold, without noise: of each as it is computed, and
            after the steps.

    Returns:
        None where nothing is noised, or it cannot be told.
    """
    noise = defense.randomness.total_noise()
    if (
        noise is None
        or noise.distribution != "gaussian"
        or not defense.randomness.leaves_only_noise()
    ):
        return None
    counts = [observed[name] for name in names if name.rpartition(".")[2] == COUNTER]
    by_chance = (2 * WHOLE / (noise.std * math.sqrt(2 * math.pi))) ** len(counts)
    whole = all(abs(float(count) - round(float(count))) <= WHOLE for count in counts)
    if counts and whole and by_chance <= FALSE_ACCUSATION / 2:
        return Check(OVER_EVERYTHING, "contradicts", WHOLE_COUNTS(std=noise.std))
    parts = [{name: observed[name] - one[name] for name in names} for one in usual]
    tried = [{"the running statistics": flat(part), **part} for part in parts]
    confidence = 1 - FALSE_ACCUSATION / 2 / sum(map(len, tried))
    for name, away in (pair for one in tried for pair in one.items()):
        least = noise.std * math.sqrt(chdtri(away.numel(), confidence))
        if float(away.norm()) < least:
            said = STATISTICS_WITHOUT_NOISE(
                name=name,
                distance=float(away.norm()),
                std=noise.std,
                count=away.numel(),
                least=least,
            )
            return Check(OVER_EVERYTHING, "contradicts", said)
    for name in names:
        if name.rpartition(".")[2] == COUNTER:
            continue
        values = torch.stack([one[name].flatten() for one in usual[::2]])
        apart = torch.cdist(values, values).fill_diagonal_(torch.inf).amin(1).max()
        if not float(apart) < noise.std * math.sqrt(chdtri(values.shape[1], confidence)):
            return Check(OVER_EVERYTHING, "hidden", STATISTICS_TOO_SMALL(name=name))
    return Check(OVER_EVERYTHING, "agrees", STATISTICS_NOISED(count=len(names)))
