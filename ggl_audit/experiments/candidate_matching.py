"""Candidate matching: how often a canary is told from other images by its gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from ggl_audit.attacks.attack import Advance
from ggl_audit.case.case import Case
from ggl_audit.client.clients import Client, DeclaredClient
from ggl_audit.defenses import Pipeline, SecureAggregation
from ggl_audit.evidence.identification import match
from ggl_audit.evidence.standing import ceiling_is_settled
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.spec import EvidenceSpec

CANARIES_TOGETHER = 25

COPIES_OF_A_CANARY = 3
"""The gradients that its clients compute, what they send, and what is seen of them."""

MATCHING_CONTROL_TRIALS = 50

MATCHING_SHARE = 0.4
"""The share of a time limit after which no experiment by matching is begun or goes on."""

NO_TRIALS = "evidence.matching_trials is 0"


class Matched(Result):
    """Whether a canary was identified among the candidates."""

    hit: bool


class CandidateMatching(Experiment[Matched]):
    """The ceiling: how often a canary is identified."""

    name = "matching"
    stage = "candidate matching"
    result = Matched
    share = MATCHING_SHARE

    def plan(self) -> Plan | NotMeasured:
        """As many trials as are declared and the reference set has canaries for."""
        evidence = self.case.spec.evidence
        trials = min(evidence.matching_trials, len(self.case.trials))
        if trials == 0:
            return NotMeasured(reason=NO_TRIALS)
        return _plan(self.case, trials, at_most=evidence.stop_early)

    def run(self, trials: range, advance: Advance) -> Iterator[Matched]:
        """Matches candidates under the declared defense."""
        case = self.case
        return match_canaries(case, case.client, case.defense, self.name, trials, advance)

    def is_wanted(self, trials: range, ledger: Ledger) -> bool:
        """As long as the ceiling is not settled, where that is declared to end the trials."""
        evidence, plan = self.case.spec.evidence, self.plan()
        hits = [one.hit for one in ledger.results(CandidateMatching)]
        return not is_settled(hits, plan, evidence)


class UndefendedMatching(Experiment[Matched]):
    """The control of the ceiling: can matching work at all, with this model and these images?"""

    name = "undefended_matching"
    stage = "candidate matching without the defense"
    result = Matched
    share = MATCHING_SHARE

    def plan(self) -> Plan | NotMeasured:
        """The first canaries of the ceiling; none where there is no defense to leave out."""
        if not self.case.defense.steps:
            return NotMeasured(reason="no defense is declared, so that the ceiling is its control")
        evidence = self.case.spec.evidence
        trials = min(evidence.matching_trials, len(self.case.trials), MATCHING_CONTROL_TRIALS)
        return _plan(self.case, trials) if trials else NotMeasured(reason=NO_TRIALS)

    @functools.cached_property
    def _without(self) -> Pipeline:
        return undefended(self.case)

    def run(self, trials: range, advance: Advance) -> Iterator[Matched]:
        """Matches candidates without the declared steps."""
        client = DeclaredClient(self.case.matching(self._without).clients, self._without)
        return match_canaries(self.case, client, self._without, self.name, trials, advance)


def is_settled(hits: Sequence[bool], plan: Plan | NotMeasured, evidence: EvidenceSpec) -> bool:
    """Whether trials end early as declared, since none of those left can change the ceiling."""
    if not evidence.stop_early or isinstance(plan, NotMeasured) or not hits:
        return False
    return ceiling_is_settled(sum(hits), len(hits), plan.trials, 1 / evidence.candidates)


def has_likelihood(case: Case) -> bool:
    """Whether candidates are matched by the likelihood of what is seen."""
    local, batch_size = case.model.local, case.model.batch_size
    knows_order = local is None or local.order == "fixed" or batch_size == 1
    return knows_order and case.defense.likelihood.is_known()


def undefended(case: Case) -> Pipeline:
    """The cohort without its defense."""
    clients = case.defense.aggregation.clients
    return Pipeline([SecureAggregation(clients=clients)] if clients > 1 else [])


def match_canaries(
    case: Case,
    client: Client,
    defense: Pipeline,
    purpose: str,
    trials: range,
    advance: Advance,
    candidates: int | None = None,
) -> Iterator[Matched]:
    """Sends canaries, and matches candidates with what is seen of each.

    Args:
        case: what was handed in.
        client: sends them.
        defense: which is replicated.
        purpose: names the streams of randomness.
        trials: their numbers.
        advance: told of the candidates.
        candidates: how many of each canary's; all unless given.
    """
    canaries = case.trials.part(slice(trials.start, trials.stop)).among(candidates)
    observed = client.send(*canaries.members, case.contexts(f"{purpose} clients", trials))
    lots = case.lots(f"{purpose} ties", trials)
    ranks = match(case.matching(defense), canaries, observed, lots)
    advance(canaries.candidates.numel() + len(trials))
    for rank in ranks:
        yield Matched(hit=rank == 1)


def _plan(case: Case, trials: int, *, at_most: bool = False) -> Plan:
    room = case.clients.room(COPIES_OF_A_CANARY * case.defense.aggregation.clients)
    return Plan(
        trials=trials,
        matched=trials * (case.spec.evidence.candidates + 1),
        at_most=at_most,
        together=max(1, min(CANARIES_TOGETHER, room)),
    )
