"""What rates say: which thresholds they are beyond, and whether more trials could change that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ggl_audit.evidence.bounds import Rate, ReconstructionRate, measure_rate, paired_p_value

NO_LEAKAGE = 0.05
LITTLE_LEAKAGE = 0.25
PARTLY_RECONSTRUCTED = 0.05
RECONSTRUCTED = 0.5
SIGNIFICANCE = 0.025


def reconstructed(floor: ReconstructionRate | None) -> Literal["D", "F"] | None:
    """Whether private images are partly (D) or mostly (F) reconstructed.

    The rate's lower end must be above the threshold, and the attack must beat its null control in
    the exact paired test at 2.5 %.
    """
    if floor is None or floor.null_p_value is None or floor.null_p_value > SIGNIFICANCE:
        return None
    if floor.advantage_lower > RECONSTRUCTED:
        return "F"
    return "D" if floor.advantage_lower > PARTLY_RECONSTRUCTED else None


def bounded(ceiling: Rate) -> Literal["A", "B", "above", "unclear"]:
    """Whether a ceiling bounds the leakage (A, B), is above chance, or neither."""
    if ceiling.advantage_upper <= NO_LEAKAGE:
        return "A"
    if ceiling.advantage_upper <= LITTLE_LEAKAGE:
        return "B"
    return "above" if ceiling.advantage_lower > 0 else "unclear"


def strongest(floors: Mapping[str, ReconstructionRate]) -> str | None:
    """The attack that shows most, or None where none was made.

    Args:
        floors: of each attack.
    """
    grades = {name: reconstructed(floor) or "" for name, floor in floors.items()}
    return max(
        floors,
        key=lambda name: (grades[name], floors[name].successes, floors[name].psnr_db),
        default=None,
    )


def fewest_significant(attacks: int = 1) -> int:
    """The fewest trials that beat the null control, if all of them do, for the best of attacks."""
    trials = 1
    while paired_p_value(trials, 0, attacks) > SIGNIFICANCE:
        trials += 1
    return trials


def ceiling_is_settled(successes: int, trials: int, planned: int, chance: float) -> bool:
    """Whether no outcome of the trials that are left can change what the ceiling says."""
    ends = (measure_rate(s, planned, chance) for s in (successes, successes + planned - trials))
    return len({bounded(rate) for rate in ends}) == 1


def floor_is_settled(
    beyond: int, only_null: int, trials: int, planned: int, chance: float, attacks: int = 1
) -> bool:
    """Whether no outcome of the trials that are left can change what the floor says.

    Args:
        beyond: canaries that the attack identified and the null control did not.
        only_null: the reverse.
        trials: done so far.
        planned: in all.
        chance: of guessing.
        attacks: from how many the best is picked.
    """
    left = planned - trials
    ends = []
    for hits, nulls in ((beyond + left, only_null), (beyond, only_null + left)):
        p_value = paired_p_value(hits, nulls, attacks)
        measured = dict(measure_rate(hits, planned, chance, None, attacks))
        ends.append(ReconstructionRate(**measured, psnr_db=0, null_p_value=p_value))
    return reconstructed(ends[0]) == reconstructed(ends[1])
