"""What the ledger adds up to: rates, and where the captures stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, measure_rate, paired_p_value
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.evidence.promise import CANDIDATES, guesses
from ggl_audit.evidence.standing import strongest
from ggl_audit.experiments import candidate_matching, reconstruction
from ggl_audit.experiments.candidate_matching import CandidateMatching, UndefendedMatching
from ggl_audit.experiments.capture import Attacked, CaptureAttack
from ggl_audit.experiments.cause import OtherDeclaration, OtherLayout
from ggl_audit.experiments.experiment import Plan
from ggl_audit.experiments.label import INFERENCE, Label
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.likeness import place
from ggl_audit.experiments.membership import Membership
from ggl_audit.experiments.noise import Noise
from ggl_audit.experiments.promise import Promise
from ggl_audit.experiments.reconstruction import (
    Reconstructed,
    Reconstruction,
    UndefendedReconstruction,
    apart,
)
from ggl_audit.judgement.declared import Declared


class LossPlace(BaseModel):
    """Where a capture's matching loss stands among those of known kind.

    Attributes:
        canaries: how many canaries were attacked.
        canaries_above: of these, how many have a higher loss than the capture.
        nulls: how many random gradients were attacked.
        nulls_above: of these, how many have a higher loss than the capture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    canaries: int
    canaries_above: int
    nulls: int
    nulls_above: int


@dataclass(frozen=True)
class MeasuredCapture:
    """What came of one captured gradient; None is not measured.

    Attributes:
        attacked: what the attacks made of it.
        likeness: to the canaries' gradients.
        loss_place: its matching loss among theirs.
    """

    attacked: Attacked | None
    likeness: Likeness | None
    loss_place: LossPlace | None


@dataclass(frozen=True)
class Measured:
    """What was measured; None is not measured.

    Attributes:
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred from the last layer.
        label_ceiling: canaries whose label the best classifier told.
        label_classifier: the one that was chosen; empty where none was.
        undefended_matching: canaries identified by matching without the defense.
        membership: canaries identified in releases whose other images are unknown.
        promise: worst-case images identified in what the client's own code sends.
        noise: what the noise of the client's own code is like.
        floors: canaries that each attack identified and its null control did not, by each distance.
        nulls: canaries that the null control of each identified, by the declared distance.
        undefended: canaries that the latent search identified without the defense.
        captures: those of the round.
        attack: the strongest on the canaries; the nearest on the capture where none were attacked.
    """

    ceiling: Rate | None
    label: Rate | None
    label_ceiling: Rate | None
    label_classifier: str
    undefended_matching: Rate | None
    membership: Rate | None
    promise: Rate | None
    noise: NoiseTest | None
    floors: dict[str, dict[str, ReconstructionRate]]
    nulls: dict[str, ReconstructionRate]
    undefended: ReconstructionRate | None
    captures: list[MeasuredCapture]
    attack: str

    @property
    def is_exact(self) -> bool:
        """Whether an image was read off a capture, exactly."""
        return any(one.attacked is not None and one.attacked.exact for one in self.captures)


def measure(declared: Declared, ledger: Ledger) -> Measured:
    """Counts what is in the ledger.

    Where trials ended because of what came out, the rest counts as it could have come out worst;
    where they ended for another reason, the rate is that of the trials that there are.
    """
    chance = 1 / declared.evidence.candidates
    ceiling = _ceiling(declared, ledger, chance)
    label_ceiling, label_classifier = _label_ceiling(declared, ledger)
    control = [one.hit for one in ledger.results(UndefendedMatching)]
    members = [one.hit for one in ledger.results(Membership)]
    noise = [one.test for one in ledger.results(Noise)]
    canaries = ledger.results(Reconstruction)
    floors, nulls = _floors(declared, canaries, chance)
    distance = declared.evidence.distance
    first = ledger.by_trial(CaptureAttack).get(0)
    nearest = GenerativeGradientLeakage.name if first is None else first.nearest
    return Measured(
        ceiling=ceiling,
        label=_label(declared, ledger),
        label_ceiling=label_ceiling,
        label_classifier=label_classifier,
        undefended_matching=_rate(control, chance) if declared.is_defended else ceiling,
        membership=_rate(members, chance),
        promise=_promise(ledger),
        noise=noise[0] if noise else None,
        floors=floors,
        nulls=nulls,
        undefended=_undefended(declared, ledger, canaries, chance),
        captures=_captures(declared, ledger, canaries),
        attack=strongest({name: own[distance] for name, own in floors.items()}) or nearest,
    )


def _rate(hits: Sequence[bool], chance: float, planned: int | None = None) -> Rate | None:
    return measure_rate(sum(hits), len(hits), chance, planned) if hits else None


def _ceiling(declared: Declared, ledger: Ledger, chance: float) -> Rate | None:
    hits = [one.hit for one in ledger.results(CandidateMatching)]
    plan = declared.plans[CandidateMatching.name]
    settled = candidate_matching.is_settled(hits, plan, declared.evidence)
    planned = plan.trials if settled and isinstance(plan, Plan) else None
    return _rate(hits, chance, planned)


def _label(declared: Declared, ledger: Ledger) -> Rate | None:
    """The rate of the last layer alone, all other images of the release being known."""
    done, plan = ledger.results(Label), declared.plans[Label.name]
    if not done or not isinstance(plan, Plan) or plan.chance is None:
        return None
    hits = [one.hits[INFERENCE] for one in done if INFERENCE in one.hits]
    return _rate(hits, plan.chance)


def _label_ceiling(declared: Declared, ledger: Ledger) -> tuple[Rate | None, str]:
    """Of the classifier that was chosen, or of label inference where that is right more often.

    The choice was made on other images and costs nothing; the larger of the two is paid for.
    """
    done, plan = ledger.results(Label), declared.plans[Label.name]
    if not done or not isinstance(plan, Plan) or plan.chance is None:
        return None, ""
    chosen = done[0].chosen
    successes = {chosen: sum(one.hits[one.chosen] for one in done)}
    if INFERENCE in done[0].hits:
        successes[INFERENCE] = sum(one.hits[INFERENCE] for one in done)
    best = max(successes, key=lambda name: successes[name])
    rate = measure_rate(successes[best], len(done), plan.chance, attacks=len(successes))
    return rate, best


def _promise(ledger: Ledger) -> Rate | None:
    done = ledger.results(Promise)
    guessed = guesses([one.scores for one in done], [one.lot for one in done])
    hits = [guess == one.truth for guess, one in zip(guessed, done, strict=True)]
    return _rate(hits, 1 / CANDIDATES)


def _floors(
    declared: Declared, done: Sequence[Reconstructed], chance: float
) -> tuple[dict[str, dict[str, ReconstructionRate]], dict[str, ReconstructionRate]]:
    """The floor of each attack by each distance, and of its null control by the declared one."""
    if not done:
        return {}, {}
    plan = declared.plans[Reconstruction.name]
    settled = reconstruction.are_settled(done, plan, declared.evidence)
    planned = plan.trials if settled and isinstance(plan, Plan) else len(done)
    attacks = list(done[0].hits)
    floors: dict[str, dict[str, ReconstructionRate]] = {}
    nulls = {}
    for name in attacks:
        psnr_db = _mean([one.psnr_db[name] for one in done])
        floors[name] = {}
        for distance in done[0].hits[name]:
            beyond, only_null = apart(done, name, distance)
            p_value = paired_p_value(beyond, only_null + planned - len(done), len(attacks))
            rate = measure_rate(beyond, len(done), chance, planned, len(attacks))
            floors[name][distance] = ReconstructionRate(
                **dict(rate), psnr_db=psnr_db, null_p_value=p_value
            )
        hits = sum(one.null_hits[name][declared.evidence.distance] for one in done)
        nulls[name] = ReconstructionRate(
            **dict(measure_rate(hits, len(done), chance, planned)),
            psnr_db=_mean([one.null_psnr_db[name] for one in done]),
        )
    return floors, nulls


def _undefended(
    declared: Declared, ledger: Ledger, canaries: Sequence[Reconstructed], chance: float
) -> ReconstructionRate | None:
    """The rate of the control; without a defense, that of the first canaries as they are."""
    hits = [one.hit for one in ledger.results(UndefendedReconstruction)]
    psnr_db = [one.psnr_db for one in ledger.results(UndefendedReconstruction)]
    if not declared.is_defended:
        name, distance = GenerativeGradientLeakage.name, declared.evidence.distance
        control = canaries[: declared.evidence.control_trials]
        hits = [one.hits[name][distance] for one in control]
        psnr_db = [one.psnr_db[name] for one in control]
    if not hits:
        return None
    rate = measure_rate(sum(hits), len(hits), chance)
    return ReconstructionRate(**dict(rate), psnr_db=_mean(psnr_db))


def _captures(
    declared: Declared, ledger: Ledger, canaries: Sequence[Reconstructed]
) -> list[MeasuredCapture]:
    attacked = ledger.by_trial(CaptureAttack)
    explained = [ledger.by_trial(kind) for kind in (OtherDeclaration, OtherLayout)]
    captures = []
    for number, capture in enumerate(declared.captures):
        found = attacked.get(number)
        if found is None or not canaries:
            captures.append(MeasuredCapture(found, None, None))
            continue
        others = [e for by in explained if number in by for e in by[number].explanations]
        captures.append(
            MeasuredCapture(
                found,
                place(capture.likeness, found, canaries, others),
                _loss_place(found, canaries),
            )
        )
    return captures


def _loss_place(attacked: Attacked, canaries: Sequence[Reconstructed]) -> LossPlace:
    name = GenerativeGradientLeakage.name
    loss = attacked.loss[name]
    nulls = [*(one.null_loss for one in canaries), attacked.null_loss[name]]
    return LossPlace(
        canaries=len(canaries),
        canaries_above=sum(one.loss > loss for one in canaries),
        nulls=len(nulls),
        nulls_above=sum(other > loss for other in nulls),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
