"""A value that each image has, as its label: how often classifiers tell it by what was sent."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ggl_audit.attacks.attack import Advance
from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, flat, rows, unstack
from ggl_audit.client.gradients import BYTES_OF_A_VALUE
from ggl_audit.evidence.classifiers import (
    LinearClassifier,
    Parts,
    Projection,
    best_of,
    divide,
    guess,
    mixture_scores,
    nearest_scores,
    spreads,
)
from ggl_audit.evidence.identification import Trials, distances_of
from ggl_audit.experiments.candidate_matching import (
    CANARIES_TOGETHER,
    COPIES_OF_A_CANARY,
    MATCHING_SHARE,
    NO_TRIALS,
)
from ggl_audit.experiments.experiment import Experiment, NotMeasured, Plan, Result
from ggl_audit.experiments.membership import divisor, shares_add_up

AVERAGED = 32
"""Public images that a likelihood is averaged over, of all values together, where each is matched
with each release, as many as candidates are."""

RIDGES = (1e-3, 0.1, 10.0)

RELEASES_LEARNED, RELEASES_CHOSEN_ON = 2, 2
"""Of each image, where they are random."""

ROWS_HELD = 2048
"""Of features, in single precision, about: of images and of releases that are learned from, and how
they deviate from their means; all in double precision."""


class Told(Result):
    """What classifiers made of a canary.

    Attributes:
        hits: whether each of them told its value, by name, and each further attack.
        chosen: the classifier that was right most often on other public images.
    """

    hits: dict[str, bool]
    chosen: str


@dataclass(frozen=True)
class Releases:
    """What was sent of t images, each with companions if a release is of several.

    Attributes:
        trials: the images, with themselves for the only candidate.
        observed: what the attacker sees of each, tensors with a leading dimension t.
    """

    trials: Trials
    observed: Gradient


Scores = Callable[[Releases], torch.Tensor]
"""How well each value explains each of t releases, (t, values)."""


class ValueExperiment(Experiment[Told]):
    """How often the value of a canary is told, all other images of the release being known."""

    result = Told
    share = MATCHING_SHARE

    @property
    @abstractmethod
    def values(self) -> torch.Tensor:
        """(n,), of the reference images."""

    @abstractmethod
    def why_not(self) -> str:
        """Why there is no such question; empty where there is."""

    def attacks(self) -> dict[str, Scores]:
        """Further ways to tell the value, by name, which need no choice."""
        return {}

    @functools.cached_property
    def parts(self) -> Parts | None:
        """The public images, in three parts; None where they are too few."""
        most = self.case.spec.evidence.matching_trials
        return divide(self.values, most, self.case.random(f"{self.name} parts"))

    def plan(self) -> Plan | NotMeasured:
        """As many trials as the ceiling's, as far as there are canaries beside what is learned."""
        reason, case = self.why_not(), self.case
        if not reason and case.spec.evidence.matching_trials == 0:
            reason = NO_TRIALS
        if reason:
            return NotMeasured(reason=reason)
        if self.parts is None:
            return NotMeasured(
                reason=f"{case.reference.source} has fewer than two classes of enough images"
            )
        trials, room = len(self.parts.canaries), case.clients.room(self._copies)
        return Plan(
            trials=trials,
            matched=trials * self._evaluations,
            together=max(1, min(CANARIES_TOGETHER, room)),
            chance=self.parts.chance,
        )

    @functools.cached_property
    def _evaluations(self) -> int:
        """Gradients that a trial takes: the canary's, and those that it is matched with."""
        return 1 if self._likelihood_is_of_features else len(self._averaged) + 1

    @property
    def _copies(self) -> int:
        return COPIES_OF_A_CANARY * self.case.defense.aggregation.clients

    def run(self, trials: range, advance: Advance) -> Iterator[Told]:
        """Sends canaries, and tells the value of each by every classifier."""
        parts = self._divided
        releases = self._send(parts.canaries[trials.start : trials.stop], "clients", trials)
        guesses = self._guesses({**self._classifiers, **self.attacks()}, releases, "ties", trials)
        truths = self._numbers(releases.trials.candidates[:, 0]).tolist()
        advance(len(trials) * self._evaluations)
        for place, truth in enumerate(truths):
            hits = {name: guessed[place] == truth for name, guessed in guesses.items()}
            yield Told(hits=hits, chosen=self._chosen)

    @property
    def _divided(self) -> Parts:
        assert self.parts is not None
        return self.parts

    def _numbers(self, images: torch.Tensor) -> torch.Tensor:
        """The places of images' values among those that are told apart."""
        values = torch.tensor(self._divided.values, device=images.device)
        return torch.searchsorted(values, self.values[images])

    def _guesses(
        self, ways: Mapping[str, Scores], releases: Releases, purpose: str, numbers: range
    ) -> dict[str, list[int]]:
        lots = self.case.lots(f"{self.name} {purpose}", numbers)
        return {name: guess(scores(releases), lots) for name, scores in ways.items()}

    def _send(self, images: torch.Tensor, purpose: str, numbers: range) -> Releases:
        """Sends images, each in a release of its own that is decided by its number."""
        case = self.case
        companions = torch.zeros(len(images), 0, dtype=torch.long, device=images.device)
        if case.members > 1:
            others = [
                self._companions(image, f"{purpose} companions", number)
                for image, number in zip(images.tolist(), numbers, strict=True)
            ]
            companions = torch.as_tensor(np.stack(others), device=images.device)
        trials = Trials(images[:, None], case.reference.labels[images], case.reference, companions)
        contexts = case.contexts(f"{self.name} {purpose}", numbers)
        return Releases(trials, case.client.send(*trials.members, contexts))

    def _companions(self, image: int, purpose: str, number: int) -> np.ndarray:
        random, others = self.case.random(f"{self.name} {purpose}", number), self.case.members - 1
        drawn = random.permutation(len(self.case.reference) - 1)[:others]
        return drawn + (drawn >= image)

    def _sent(self, images: torch.Tensor, purpose: str) -> Iterator[Releases]:
        """Releases of images, a few at a time."""
        size = max(1, min(CANARIES_TOGETHER, self.case.clients.room(self._copies)))
        for start in range(0, len(images), size):
            part = images[start : start + size]
            yield self._send(part, purpose, range(start, start + len(part)))

    @functools.cached_property
    def _chosen(self) -> str:
        """The classifier that is right most often on images that none was learned from."""
        again = RELEASES_CHOSEN_ON if self._is_random else 1
        images = self._divided.chosen_on.repeat(again)
        hits: dict[str, list[bool]] = {name: [] for name in self._classifiers}
        done = 0
        for releases in self._sent(images, "choice"):
            numbers = range(done, done + len(releases.trials))
            truths = self._numbers(releases.trials.candidates[:, 0]).tolist()
            guesses = self._guesses(self._classifiers, releases, "choice ties", numbers)
            for name, guessed in guesses.items():
                hits[name] += [g == truth for g, truth in zip(guessed, truths, strict=True)]
            done = numbers.stop
        return best_of(hits)

    @property
    def _is_random(self) -> bool:
        return self.case.defense.randomness.is_random() or self.case.spec.client is not None

    @functools.cached_property
    def _classifiers(self) -> dict[str, Scores]:
        """Those of whole gradients, by name."""
        likelihood = self._by_features if self._likelihood_is_of_features else self._by_matching
        return {"likelihood": likelihood, **self._linear()}

    @functools.cached_property
    def _averaged(self) -> torch.Tensor:
        """The images that likelihoods are averaged over, equally many of each value at most."""
        learned = self._divided.learned
        numbers, count = self._numbers(learned), max(1, AVERAGED // len(self._divided.values))
        return torch.cat([learned[numbers == n][:count] for n in range(len(self._divided.values))])

    def _by_matching(self, releases: Releases) -> torch.Tensor:
        case, averaged = self.case, self._averaged
        count = len(releases.trials)
        trials = replace(releases.trials, candidates=averaged.expand(count, -1))
        labels = case.reference.labels[trials.candidates]
        distances = widened(distances_of(case.matching(), trials, labels, releases.observed))
        numbers = self._numbers(averaged)
        weights = [case.defense.likelihood.weight(one) for one in unstack(releases.observed)]
        known = [weight for weight in weights if weight is not None]
        if len(known) < count:
            return nearest_scores(distances, numbers)
        return mixture_scores(-distances * torch.stack(known).to(distances)[:, None], numbers)

    @functools.cached_property
    def _adds_up(self) -> bool:
        """Whether a release is a sum of what single images add, and of noise that comes last."""
        return shares_add_up(self.case) and self.case.defense.randomness.leaves_only_noise()

    @functools.cached_property
    def _project(self) -> Projection:
        case = self.case
        most = case.spec.memory_bytes // (BYTES_OF_A_VALUE * ROWS_HELD)
        return Projection(len(flat(case.audited.observed)), most)

    @functools.cached_property
    def _likelihood_is_of_features(self) -> bool:
        """Whether features hold all that the likelihood is of, so that it takes no matching."""
        case, noise = self.case, self.case.defense.randomness.total_noise()
        gaussian = noise is None or noise.distribution == "gaussian"
        everything = self._project.size == len(flat(case.audited.observed))
        return self._adds_up and gaussian and everything and not case.defense.clear.names

    @functools.cached_property
    def _added(self) -> torch.Tensor:
        """The features of what each image that is learned from adds, (n, features)."""
        return torch.cat([*self._before_noise(self._divided.learned)])

    def _by_features(self, releases: Releases) -> torch.Tensor:
        noise, numbers = self.case.defense.randomness.total_noise(), self._numbers_learned
        distances = torch.cdist(self._features(releases), self._added).square()
        if noise is None:
            return nearest_scores(distances, numbers)
        return mixture_scores(-distances / (2 * noise.std**2), numbers)

    @property
    def _numbers_learned(self) -> torch.Tensor:
        return self._numbers(self._divided.learned)

    def _linear(self) -> dict[str, Scores]:
        """Linear classifiers: of gradients and the noise that is known, and of releases."""
        case, numbers = self.case, self._numbers_learned
        found: dict[str, Scores] = {}
        noise = case.defense.randomness.total_noise()
        std = 0.0 if noise is None else noise.std
        own_code, beside = case.spec.client is not None, bool(case.defense.clear.names)
        if self._adds_up:
            found |= self._learned("linear", self._added, numbers, std)
        if self._adds_up and not own_code and not beside:
            return found
        images = self._divided.learned.repeat(RELEASES_LEARNED if self._is_random else 1)
        seen = [
            (self._features(one), spreads(one.observed)) for one in self._sent(images, "learning")
        ]
        features, sizes = (torch.cat(column) for column in zip(*seen, strict=True))
        sent = self._numbers(images)
        found |= self._learned("linear, of releases", features, sent, 0.0)
        found["linear, of spreads"] = self._by_spreads(sizes, sent)
        if noise is not None and case.members == 1:
            found["linear, in two steps"] = self._in_two_steps(features, sent, std)
        return found

    def _by_spreads(self, sizes: torch.Tensor, sent: torch.Tensor) -> Scores:
        """By how large the values are, as code of the client's own may draw its noise by images."""
        mean, std = sizes.mean(0), sizes.std(0).clamp(min=1e-12)
        classifier = LinearClassifier((sizes - mean) / std, sent, 0.0, RIDGES[0])
        return lambda releases: classifier.scores((spreads(releases.observed) - mean) / std)

    def _in_two_steps(self, features: torch.Tensor, sent: torch.Tensor, std: float) -> Scores:
        """The directions by gradients before the noise; the rest by releases along these."""
        first = LinearClassifier(self._added, self._numbers_learned, std, RIDGES[1])
        second = LinearClassifier(first.scores(features), sent, 0.0, RIDGES[0])
        return lambda releases: second.scores(first.scores(self._features(releases)))

    def _learned(
        self, name: str, features: torch.Tensor, numbers: torch.Tensor, noise: float
    ) -> dict[str, Scores]:
        def with_ridge(ridge: float) -> Scores:
            classifier = LinearClassifier(features, numbers, noise, ridge)
            return lambda releases: classifier.scores(self._features(releases))

        return {f"{name} (ridge {ridge:g})": with_ridge(ridge) for ridge in RIDGES}

    def _before_noise(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """The features of what each image adds to a release, before the noise."""
        case, reference = self.case, self.case.reference
        gradients = case.clients.each_gradient(reference.images[images], reference.labels[images])
        if self._adds_up:
            for gradient in gradients:
                one = flat(case.defense.replica.share_of_one(gradient))
                yield self._project(one[None] / divisor(case))
            return
        contexts = case.contexts(f"{self.name} before noise", range(len(images)))
        for gradient, context in zip(gradients, contexts, strict=True):
            yield self._project(flat(case.defense.without_noise(gradient, context))[None])

    def _features(self, releases: Releases) -> torch.Tensor:
        """The features of releases, without what their other images add, where that is known."""
        found = self._project(rows(unstack(releases.observed), len(releases.trials)))
        companions = releases.trials.companions
        if not self._adds_up or companions.shape[1] == 0:
            return found
        others = torch.cat([*self._before_noise(companions.flatten())])
        own: torch.Tensor = found - others.unflatten(0, companions.shape).sum(1)
        return own
