"""What else a capture may be of, where it is not like the canaries' gradients."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

from ggl_audit.attacks.attack import Advance
from ggl_audit.attacks.ggl import search_latents
from ggl_audit.basics.gradient import stack
from ggl_audit.case.case import Case
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.experiments.alternatives import (
    other_layouts,
    other_models,
    other_signs,
    other_trainings,
)
from ggl_audit.experiments.capture import CAPTURED, SEARCHES_COMPARED, CaptureAttack
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.ledger import Ledger
from ggl_audit.experiments.likeness import Explanation, is_in_question, place, premises_of
from ggl_audit.experiments.reconstruction import Reconstruction
from ggl_audit.messages import Said


class Explained(Result):
    """How well other declarations explain a capture, as many as can be so."""

    explanations: list[Explanation]


class _Alternatives(Experiment[Explained]):
    """Searches each capture that is in question under other declarations."""

    result = Explained
    as_long_as = Reconstruction.name
    waits = True
    explains = True

    def plan(self) -> Plan | NotMeasured:
        """A trial for each capture; what it takes is only known if it is made."""
        if self.case.spec.evidence.reconstruction_trials == 0:
            return NotMeasured(reason="evidence.reconstruction_trials is 0")
        return Plan(trials=len(self.case.captures), optional=True)

    @abstractmethod
    def alternatives(self, case: Case) -> Iterator[tuple[Said, Case]]:
        """What else the audited capture may be of, and in words what differs."""

    @abstractmethod
    def may_help(self, likeness: Likeness) -> bool:
        """Whether it can be the cause, for a capture that is so placed."""

    def is_wanted(self, trials: range, ledger: Ledger) -> bool:
        """Whether a capture is in question."""
        canaries = ledger.results(Reconstruction)
        attacked = ledger.results(CaptureAttack)
        if not canaries or len(attacked) <= trials.start:
            return False
        found = attacked[trials.start]
        likeness = place(premises_of(self.case, self.case.captures[trials.start]), found, canaries)
        return self.may_help(likeness) and is_in_question(likeness, found, canaries)

    def run(self, trials: range, advance: Advance) -> Iterator[Explained]:
        """Searches captures anew, with the random numbers of the first search.

        So a declaration that is the same in effect finds the same.
        """
        for trial in trials:
            tried = self.alternatives(replace(self.case, captures=(self.case.captures[trial],)))
            yield Explained(explanations=[self._explain(*one, advance) for one in tried])

    def _explain(self, cause: Said, case: Case, advance: Advance) -> Explanation:
        observed = stack([case.audited.observed] * SEARCHES_COMPARED)
        labels = case.audited.repeated_labels(SEARCHES_COMPARED)
        randoms = [case.random(CAPTURED, number) for number in range(SEARCHES_COMPARED)]
        found = search_latents(case, case.defense, observed, labels, randoms, advance)
        return Explanation(
            cause=cause,
            losses=found.losses.tolist(),
            agreements=case.matching().agreement(found.images, labels, observed).tolist(),
            tensors=list(case.audited.observed),
        )


class OtherDeclaration(_Alternatives):
    """Another sign, model or training than was declared."""

    name = "other_declarations"
    stage = "the search for what else the capture may be of"

    def alternatives(self, case: Case) -> Iterator[tuple[Said, Case]]:
        """Each declaration with one thing changed."""
        return itertools.chain(other_signs(case), other_models(case), other_trainings(case))

    def may_help(self, likeness: Likeness) -> bool:
        """Always."""
        return True


class OtherLayout(_Alternatives):
    """Values in another order; tensors by themselves tell it, by how they agree."""

    name = "other_layouts"
    stage = "the search for the order that the capture's values may be in"

    def alternatives(self, case: Case) -> Iterator[tuple[Said, Case]]:
        """Each tensor, or two of them, in another order."""
        return other_layouts(case)

    def may_help(self, likeness: Likeness) -> bool:
        """Only where a tensor stands out."""
        return likeness.outcome in ("unlike", "undecided")
