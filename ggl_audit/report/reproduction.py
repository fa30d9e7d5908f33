"""Compares a report with another run of the same declaration, figure by figure."""

from __future__ import annotations

from dataclasses import dataclass

from ggl_audit.evidence.bounds import Rate
from ggl_audit.report.model import Report
from ggl_audit.report.wording import RateRow, rate_rows

COUNTED, SEARCHED = 0.01, 0.1
"""The share of trials that may differ on another machine: where candidates are compared, only
those that are level but for rounding; where pictures are searched for, those whose search took
another way. Seven samples on other processors: none of 200, and up to 2 of 20."""


@dataclass(frozen=True)
class Reproduction:
    """What became of a report's figures.

    Attributes:
        same: sentences on what is the same.
        within: on what differs by no more than another machine may.
        different: on what differs by more.
        surroundings: on what the two runs were made with, where that differs.
    """

    same: list[str]
    within: list[str]
    different: list[str]
    surroundings: list[str]

    @property
    def holds(self) -> bool:
        """Whether the report's figures can be stood by."""
        return not self.different


def compare_runs(first: Report, again: Report) -> Reproduction:
    """Compares a report with that of another run.

    Args:
        first: as it was handed in.
        again: of the same declaration and the same inputs, here.
    """
    found = Reproduction([], [], [], _surroundings(first, again))
    _sort_verdict(found, first, again)
    rows = [{row.name: row for row in rate_rows(report)} for report in (first, again)]
    for name in [*rows[0], *(name for name in rows[1] if name not in rows[0])]:
        missing = RateRow(name, "", None, "not measured")
        _sort_rate(found, rows[0].get(name, missing), rows[1].get(name, missing))
    pictures = (report.captured.by_attack for report in (first, again))
    if len({str(one) for one in pictures}) == 1:
        found.same.append("the reconstructions are the same, pixel by pixel")
    else:
        found.within.append("the reconstructions are not the same, pixel by pixel")
    ids = [[finding.id for finding in report.findings] for report in (first, again)]
    if ids[0] == ids[1]:
        found.same.append(f"the findings: {' '.join(ids[0]) or 'none'}")
    else:
        shown = [" ".join(one) or "none" for one in ids]
        found.different.append(f"the findings: {shown[0]} there, {shown[1]} here")
    return found


def _sort_verdict(found: Reproduction, first: Report, again: Report) -> None:
    grades = first.verdict.grade, again.verdict.grade
    if grades[0] == grades[1]:
        found.same.append(f"the grade: {grades[0]}")
    else:
        found.different.append(f"the grade: {grades[0]} there, {grades[1]} here")
    codes = first.verdict.exit_code, again.verdict.exit_code
    if codes[0] != codes[1]:
        found.different.append(f"the exit code: {codes[0]} there, {codes[1]} here")


def _sort_rate(found: Reproduction, one: RateRow, other: RateRow) -> None:
    if one.rate is None and other.rate is None:
        return
    if one.rate is None or other.rate is None:
        found.different.append(f"{one.name}: {_shown(one.rate)} there, {_shown(other.rate)} here")
        return
    if _figures(one.rate) == _figures(other.rate):
        found.same.append(f"{one.name}: {_shown(one.rate)}")
        return
    said = f"{one.name}: {_shown(one.rate)} there, {_shown(other.rate)} here"
    near = _is_near(one.rate, other.rate, SEARCHED if one.psnr_db is not None else COUNTED)
    (found.within if near else found.different).append(said)


def _is_near(one: Rate, other: Rate, share: float) -> bool:
    """Whether rates are as near as those of the same trials on another machine."""
    if one.trials != other.trials:  # of a time limit, which is no declaration of trials
        return one.lower <= other.upper and other.lower <= one.upper
    return abs(one.successes - other.successes) <= max(1, round(share * one.trials))


def _figures(rate: Rate) -> tuple[int, int]:
    return rate.successes, rate.trials


def _shown(rate: Rate | None) -> str:
    return "not measured" if rate is None else f"{rate.successes} of {rate.trials}"


def _surroundings(first: Report, again: Report) -> list[str]:
    pairs = [("ggl-audit", first.tool.version, again.tool.version)]
    names = [*first.environment, *(n for n in again.environment if n not in first.environment)]
    pairs += [(n, first.environment.get(n, "-"), again.environment.get(n, "-")) for n in names]
    return [f"{name}: {one} there, {other} here" for name, one, other in pairs if one != other]
