"""The words that every rendering of a report shares."""

from __future__ import annotations

from dataclasses import dataclass

from ggl_audit.evidence.bounds import Rate
from ggl_audit.evidence.fidelity import Fidelity
from ggl_audit.report.model import Captured, EvidenceReport, Reconstruction, Report

COARSE = 1e-6
"""Relative; single precision rounds less."""


@dataclass(frozen=True)
class RateRow:
    """A rate with its name and meaning, or the reason why there is none."""

    name: str
    meaning: str
    rate: Rate | None
    not_measured: str
    psnr_db: float | None = None


def rate_rows(report: Report) -> list[RateRow]:
    """The rates of a report in the order in which they are read."""
    evidence = report.evidence
    controls = evidence.controls
    reasons = evidence.not_measured

    def row(key: str, name: str, meaning: str, rate: Rate | None) -> RateRow:
        psnr = getattr(rate, "psnr_db", None)
        return RateRow(name, meaning, rate, reasons.get(key, "not measured"), psnr)

    rows = [
        row("ceiling", "ceiling (matching)", "identified by candidate matching", evidence.ceiling),
        row(
            "floor",
            "floor (pictures)",
            "identified by reconstructions, beyond null",
            evidence.floor,
        ),
        *_by_attack(evidence),
        row("controls.null", "null control", "identified from a random gradient", controls.null),
        row(
            "controls.undefended",
            "undefended control",
            "identified by reconstructions, no defense",
            controls.undefended,
        ),
        row(
            "controls.undefended_matching",
            "undefended matching",
            "identified by candidate matching, no defense",
            controls.undefended_matching,
        ),
        row(
            "label_ceiling",
            "label (classifiers)",
            f"label told by the best: {evidence.label_classifier}",
            evidence.label_ceiling,
        ),
        row("label", "label (last layer)", "label read off the last layer", evidence.label),
    ]
    if evidence.membership is not None:
        meaning = "identified in the release, all others unknown"
        rows.append(row("membership", "membership", meaning, evidence.membership))
    if evidence.promise is not None:
        among = f"worst-case images, among {round(1 / evidence.promise.chance)}"
        rows.append(row("promise", "promise (client's code)", among, evidence.promise))
    return rows


NOT_ASKED = "Not asked: attributes of the image, and what several rounds tell together."


def answers(report: Report) -> list[str]:
    """What is known of each question, a sentence or two each."""
    verdict, said = report.verdict, []
    for answer in verdict.answers:
        name = answer.question.capitalize()
        if answer.grade is None:
            said.append(f"{name}: not counted. {answer.reason}")
            continue
        decides = answer.question == verdict.question
        why = ", which decides." if decides else f". {answer.reason}"
        bound = "" if answer.bound is None else _bound(answer.bound)
        said.append(f"{name}: {answer.grade}{why}{bound}")
    return [*said, NOT_ASKED]


def _bound(bound: float) -> str:
    return f" Under the declared clip and noise nobody is right more often than {bound:.1%}."


def _by_attack(evidence: EvidenceReport) -> list[RateRow]:
    """A row for each attack, where there are several."""
    if len(evidence.attacks) == 1:
        return []
    strongest = {evidence.attack: ", the strongest"}
    return [
        RateRow(
            f"by {one.name}",
            f"{one.source.partition(' (')[0]}{strongest.get(one.name, '')}",
            one.floor,
            one.not_measured or evidence.not_measured.get("floor", "not measured"),
            one.floor.psnr_db if one.floor else None,
        )
        for one in evidence.attacks
    ]


def identification(about: Captured) -> str | None:
    """What became of the captured images themselves, where the truths are held."""
    pictures = about.reconstructions
    ranked = [found for found in pictures if found.candidates is not None]
    if not ranked:
        return None
    if len(pictures) > 1:
        return _several(ranked, len(pictures))
    found, parts = ranked[0], []
    if found.matching_rank is not None:
        parts.append(f"by matching it ranks {found.matching_rank}")
    if found.rank is not None:
        parts.append(f"by the reconstruction {found.rank}")
    return (
        f"The true image among {found.candidates} candidates of class {found.label}: "
        f"{', '.join(parts)}."
    )


def _several(ranked: list[Reconstruction], images: int) -> str:
    parts = []
    for how, ranks in (
        ("by matching", [found.matching_rank for found in ranked]),
        ("by the reconstructions", [found.rank for found in ranked]),
    ):
        measured = [rank for rank in ranks if rank is not None]
        if measured:
            parts.append(f"{how} {measured.count(1)} of {len(measured)} rank first")
    return (
        f"The {images} true images, each among {ranked[0].candidates} candidates of its class: "
        f"{', '.join(parts)}."
    )


def captured(about: Captured) -> list[str]:
    """What is known of a captured gradient itself, a sentence each."""
    said = [*about.appearance]
    found = identification(about)
    if found:
        said.append(found)
    if about.agreement:
        said.append(
            f"{about.agreement.searches} independent searches agree with each other to "
            f"{about.agreement.psnr_db:.1f} dB; on a random gradient of the same norm to "
            f"{about.agreement.null_psnr_db:.1f} dB."
        )
    if about.loss_place:
        place = about.loss_place
        said.append(
            f"Its matching loss is below that of {place.canaries_above} of {place.canaries} "
            f"canaries and of {place.nulls_above} of {place.nulls} random gradients."
        )
    if about.likeness:
        outcome = {
            "like": "It is like the canaries' gradients",
            "undecided": "It is neither like the canaries' gradients nor clearly unlike them",
            "unlike": "It is unlike the canaries' gradients",
            "hidden": "Whether it is like the canaries' gradients cannot be told",
        }[about.likeness.outcome]
        said.append(f"{outcome}: {about.likeness.detail}.")
        if about.likeness.cause:
            said.append(f"Likely cause: {about.likeness.cause}.")
    return said


def other_distances(report: Report) -> str | None:
    """The floor by the distances that do not count."""
    evidence = report.evidence
    others = [
        f"{rate.successes}/{rate.trials} by their {name}"
        for name, rate in evidence.floor_by_distance.items()
        if name != evidence.floor_distance
    ]
    if not others:
        return None
    return (
        f"Pictures are compared with candidates by their {evidence.floor_distance}, as declared; "
        f"the floor would be {', '.join(others)}."
    )


def privacy(report: Report) -> str:
    """The declared guarantee beside what was measured, or why there is none."""
    guarantee = report.evidence.guarantee
    if guarantee is None:
        reason = report.evidence.not_measured.get("guarantee", "not measured")
        return f"No guarantee: {reason}."
    rounds = "one release" if guarantee.rounds == 1 else f"{guarantee.rounds} rounds"
    text = (
        f"Declared, for one {guarantee.unit}: epsilon {guarantee.epsilon:.3g} at delta "
        f"{guarantee.delta:g} over {rounds}; mu {guarantee.mu:.3g} in one release, on which no "
        f"attack identifies more often than {guarantee.reconstruction_bound:.1%}."
    )
    if report.evidence.empirical_mu is not None:
        text += f" Measured: mu is at least {report.evidence.empirical_mu:.2f}"
        if report.evidence.ceiling is not None:
            text += f", and matching identifies {report.evidence.ceiling.rate:.1%}"
        text += "."
    return text


def noise(report: Report) -> str | None:
    """What became of the test of the client's own noise, where it was made and found nothing."""
    tested = report.evidence.noise
    if tested is None or tested.violations:
        return None
    coarse = tested.rounding > COARSE
    blind = ": what is sent is rounded, which hides copies and finer grids" if coarse else ""
    return (
        f"The noise of {tested.releases} releases of the client's own code ({tested.values:,} "
        "values) is as fresh, independent and distributed as declared, as far as can be told"
        f"{blind}."
    )


def fidelity_rows(report: Report) -> list[tuple[str, str, str]]:
    """Metrics of the reconstructions and of the null control's pictures: name, mean, mean."""
    shown = report.captured.reconstructions, report.captured.nulls
    columns = [[one.metrics for one in pictures if one.metrics is not None] for pictures in shown]
    if not columns[0]:
        return []
    rows = []
    for key, name in (
        ("mse", "MSE"),
        ("psnr_db", "PSNR, dB"),
        ("ssim", "SSIM"),
        ("lpips", "LPIPS"),
        ("mse_representation", "MSE-R"),
    ):
        found, null = (_mean(column, key) for column in columns)
        rows.append((name, found, null))
    return rows


def _mean(metrics: list[Fidelity], key: str) -> str:
    values = [getattr(one, key) for one in metrics]
    if not values:
        return "not measured"
    if None in values:
        return metrics[values.index(None)].not_measured.get(key, "not measured")
    return f"{sum(values) / len(values):.4g}"


def experiments(report: Report) -> list[str]:
    """What experiments say that no other part of a report has."""
    return [sentence for one in report.experiments for sentence in one.said]


def cost(report: Report) -> str:
    """What the audit took."""
    spent = report.cost
    text = f"{spent.evaluations:,} candidates in {spent.seconds:.1f} s"
    if spent.evaluations_per_second is not None:
        text += f" ({spent.evaluations_per_second:,.0f} a second)"
    if spent.peak_memory_bytes is not None:
        text += f", {spent.peak_memory_bytes / 2**30:.1f} GiB at most"
    return f"{text}, on {report.environment.get('device', 'an unnamed device')}."
