"""The attacks on canaries, each beside its null control, and without the defense."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from ggl_audit.attacks.attack import Advance
from ggl_audit.attacks.ggl import GenerativeGradientLeakage, search_latents
from ggl_audit.basics.gradient import Gradient, concatenate, norm, shares, stack, unstack
from ggl_audit.case.case import Case
from ggl_audit.case.labels import infer
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.defenses import Pipeline
from ggl_audit.evidence.controls import median_norm, null_gradient
from ggl_audit.evidence.fidelity import mean_psnr, nearest
from ggl_audit.evidence.identification import Trials, reconstruction_ranks
from ggl_audit.evidence.standing import floor_is_settled
from ggl_audit.experiments.candidate_matching import undefended
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.spec import EvidenceSpec

CANARIES_TOGETHER, CANARIES_BETWEEN_LOOKS = 10, 5
"""The canaries of a group, and those of one where trials may end early."""

TOGETHER_ON_AN_ACCELERATOR = 20
"""Canaries of any group: there a step of many takes no longer than one of few."""

Hits = dict[str, bool]
"""Whether a canary was identified, by each distance by which a picture picks its candidate."""


class Reconstructed(Result):
    """What each attack made of a canary, and of its null control.

    Attributes:
        hits: by attack.
        null_hits: the same for the null control.
        psnr_db: of the picture nearest to the canary, by attack.
        null_psnr_db: the same for the null control.
        loss: the matching distance that the latent search reached.
        null_loss: the same for the null control.
        agreements: of the search's pictures with the canary's gradient: the cosine for each of
            k - 1 tensors and for the whole.
        null_agreements: the same for the null control.
        shares: of each tensor in the squared norm of the canary's gradient.
        norm: of that gradient.
    """

    hits: dict[str, Hits]
    null_hits: dict[str, Hits]
    psnr_db: dict[str, float]
    null_psnr_db: dict[str, float]
    loss: float
    null_loss: float
    agreements: list[float]
    null_agreements: list[float]
    shares: list[float]
    norm: float


class Reconstruction(Experiment[Reconstructed]):
    """The floor: how often pictures identify their canary, beyond the null control's."""

    name = "reconstruction"
    stage = "reconstruction and the null control"
    result = Reconstructed

    def plan(self) -> Plan | NotMeasured:
        """As many canaries as are declared and the reference set has."""
        evidence = self.case.spec.evidence
        trials = min(evidence.reconstruction_trials, len(self.case.trials))
        if trials == 0:
            return NotMeasured(reason="evidence.reconstruction_trials is 0")
        looks = evidence.stop_early or self.case.spec.time_limit is not None
        together = CANARIES_BETWEEN_LOOKS if looks else CANARIES_TOGETHER
        if self.case.model.device.type != "cpu":
            together = TOGETHER_ON_AN_ACCELERATOR
        return Plan(
            trials=trials,
            searched=2 * trials * self.suite.searched(),
            descended=2 * trials * self.suite.descended(),
            at_most=evidence.stop_early,
            together=together,
        )

    def run(self, trials: range, advance: Advance) -> Iterator[Reconstructed]:
        """Makes each attack on canaries, and on a random gradient beside each."""
        case = self.case
        canaries = case.trials.part(slice(trials.start, trials.stop))
        contexts = case.contexts("canary clients", trials)
        sent = case.client.send(*canaries.members, contexts)
        size = median_norm(case.usual)
        nulls = [
            null_gradient(one, case.defense, context, size)
            for one, context in zip(unstack(sent), contexts, strict=True)
        ]
        observed = concatenate([sent, stack(nulls)])
        labels = torch.cat([_labels_seen(case, sent, canaries.members[1])] * 2)
        purposes = ("canary search", "null search")
        randoms = [case.random(own, trial) for own in purposes for trial in trials]
        attempts = self.suite.run(observed, labels, randoms, advance)
        searched = attempts[GenerativeGradientLeakage.name]
        agreements = case.matching().agreement(searched.images, labels, observed)
        pictures = {
            name: attempt.images.unflatten(0, (2, -1)) for name, attempt in attempts.items()
        }
        count, their_shares = len(trials), shares(sent)
        ranked = [
            {
                name: {
                    distance: _hits(case, canaries, own[side], distance, f"{name} {side}", trials)
                    for distance in case.distances
                }
                for name, own in pictures.items()
            }
            for side in range(2)
        ]
        psnr = [
            {name: _psnr_db(own[side], canaries) for name, own in pictures.items()}
            for side in range(2)
        ]
        for place, gradient in enumerate(unstack(sent)):
            hits, null_hits = (
                {name: {d: hit[place] for d, hit in by.items()} for name, by in side.items()}
                for side in ranked
            )
            found_db, null_db = ({name: db[place] for name, db in side.items()} for side in psnr)
            yield Reconstructed(
                hits=hits,
                null_hits=null_hits,
                psnr_db=found_db,
                null_psnr_db=null_db,
                loss=float(searched.losses[place]),
                null_loss=float(searched.losses[count + place]),
                agreements=agreements[place].tolist(),
                null_agreements=agreements[count + place].tolist(),
                shares=their_shares[place].tolist(),
                norm=float(norm(gradient)),
            )

    def is_wanted(self, trials: range, ledger: Ledger) -> bool:
        """As long as a floor is not settled, where that is declared to end the trials."""
        done = ledger.results(Reconstruction)
        return not are_settled(done, self.plan(), self.case.spec.evidence)


class Redrawn(Result):
    """What the latent search made of a canary's gradient without the defense.

    Attributes:
        hit: whether its picture identified the canary.
        psnr_db: of the picture.
    """

    hit: bool
    psnr_db: float


class UndefendedReconstruction(Experiment[Redrawn]):
    """The control of the floor: can the search work at all, with this prior and model?"""

    name = "undefended_reconstruction"
    stage = "the undefended control"
    result = Redrawn
    as_long_as = Reconstruction.name
    explains = True

    def plan(self) -> Plan | NotMeasured:
        """The first canaries of the floor; none where there is no defense to leave out."""
        if not self.case.defense.steps:
            return NotMeasured(reason="no defense is declared, so that the floor is its control")
        evidence = self.case.spec.evidence
        if evidence.reconstruction_trials == 0:
            return NotMeasured(reason="evidence.reconstruction_trials is 0")
        if evidence.control_trials == 0:
            return NotMeasured(reason="evidence.control_trials is 0")
        declared = min(evidence.reconstruction_trials, evidence.control_trials)
        trials = min(declared, len(self.case.trials))
        searching = self.suite.attacks[0].evaluations()
        return Plan(trials=trials, searched=trials * searching, together=2 * CANARIES_TOGETHER)

    @functools.cached_property
    def _without(self) -> Pipeline:
        return undefended(self.case)

    def run(self, trials: range, advance: Advance) -> Iterator[Redrawn]:
        """Searches the latents of undefended gradients."""
        case, without = self.case, self._without
        canaries = case.trials.part(slice(trials.start, trials.stop))
        client = DeclaredClient(case.matching(without).clients, without)
        sent = client.send(*canaries.members, case.contexts("undefended clients", trials))
        labels = _labels_seen(case, sent, canaries.members[1])
        randoms = [case.random("undefended search", trial) for trial in trials]
        images = search_latents(case, without, sent, labels, randoms, advance).images
        hits = _hits(case, canaries, images, case.spec.evidence.distance, "undefended", trials)
        for hit, psnr_db in zip(hits, _psnr_db(images, canaries), strict=True):
            yield Redrawn(hit=hit, psnr_db=psnr_db)


def are_settled(
    done: Sequence[Reconstructed], plan: Plan | NotMeasured, evidence: EvidenceSpec
) -> bool:
    """Whether trials end early as declared, since none of those left can change any floor."""
    if not evidence.stop_early or isinstance(plan, NotMeasured) or not done:
        return False
    names, chance = list(done[0].hits), 1 / evidence.candidates
    return all(
        floor_is_settled(
            *apart(done, name, evidence.distance), len(done), plan.trials, chance, len(names)
        )
        for name in names
    )


def apart(done: Sequence[Reconstructed], attack: str, distance: str) -> tuple[int, int]:
    """How many canaries only the attack identified, and how many only its null control."""
    pairs = [(one.hits[attack][distance], one.null_hits[attack][distance]) for one in done]
    return pairs.count((True, False)), pairs.count((False, True))


def _labels_seen(case: Case, observed: Gradient, true_labels: torch.Tensor) -> torch.Tensor:
    """The labels (t, k) that the attacker assigns to t gradients, in the way of the captured one.

    Args:
        case: what was handed in.
        observed: tensors with a leading dimension t.
        true_labels: (t, k), what an attacker who is told the labels is told.
    """
    return infer(case, observed) if case.audited.inferred else true_labels


def _hits(
    case: Case,
    canaries: Trials,
    images: torch.Tensor,
    distance: str,
    purpose: str,
    trials: range,
) -> list[bool]:
    lots = case.lots(f"{purpose} {distance} ties", trials)
    ranks = reconstruction_ranks(images, canaries, case.distances[distance], lots)
    return [rank == 1 for rank in ranks]


def _psnr_db(images: torch.Tensor, canaries: Trials) -> list[float]:
    """The PSNR of each canary's nearest picture, of (t, k, channels, height, width)."""
    found = nearest(images, canaries.canaries)
    pairs = zip(found.split(1), canaries.canaries.split(1), strict=True)
    return [mean_psnr(*pair) for pair in pairs]
