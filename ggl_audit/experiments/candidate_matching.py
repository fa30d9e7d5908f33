"""Candidate matching: how often a canary is told from other images by its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.basics.clock import Clock
from ggl_audit.basics.gradient import stack
from ggl_audit.case.clients import Client, DeclaredClient
from ggl_audit.case.setting import Setting
from ggl_audit.defenses import Pipeline, SecureAggregation
from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.grade import ceiling_is_settled
from ggl_audit.evidence.identification import Trials, blind_labels, match
from ggl_audit.experiments.attacks import Advance
from ggl_audit.experiments.measurements import Measurements

CANARIES_TOGETHER = 25

COPIES_OF_A_CANARY = 3
"""The gradients that its clients compute, what they send, and what is seen of them."""

MATCHING_CONTROL_TRIALS = 50

MATCHING_SHARE = 0.4
"""Of a time limit, after which no further experiment by matching is begun or goes on."""


def match_candidates(
    setting: Setting, trials: Trials, measured: Measurements, advance: Advance
) -> None:
    """Measures the ceiling, how often the label is recovered, and matching without the defense."""
    matching, random = setting.matching(), setting.random("captured ties")
    observed = stack([setting.observed])
    measured.matching_ranks = [
        # The attacker tries a candidate as its client's first image.
        None if one is None or not matching.adds_up else match(matching, one, observed, random)[0]
        for one in setting.captured_trials()
    ]
    if len(trials) == 0:
        return
    chance = 1 / setting.spec.evidence.candidates
    clock = measured.clock
    counted = run_matching(
        setting, setting.client, setting.defense, trials, "matching", advance, clock
    )
    measured.ceiling = measure_rate(counted.hits, counted.done, chance, counted.planned)
    if not why_not_inferred(setting.model, setting.members):
        guessed = blind_labels(setting.model.classes, setting.members)
        if guessed < 1:
            labels_right = counted.labels_right
            measured.label = measure_rate(labels_right, counted.done, guessed, counted.planned)
    if setting.defense.steps:
        control = trials.first(MATCHING_CONTROL_TRIALS)
        without = undefended(setting)
        client = DeclaredClient(setting.matching(without), without)
        counted = run_matching(
            setting,
            client,
            without,
            control,
            "matching control",
            advance,
            clock,
            to_the_end=True,
        )
        measured.matching_control = measure_rate(counted.hits, counted.done, chance)
    else:
        measured.matching_control = measured.ceiling


def undefended(setting: Setting) -> Pipeline:
    """The cohort without its defense."""
    clients = setting.defense.aggregation.clients
    return Pipeline([SecureAggregation(clients=clients)] if clients > 1 else [])


@dataclass(frozen=True)
class Counted:
    """What came of matching trials.

    Attributes:
        hits: canaries that were identified.
        labels_right: canaries whose label was inferred.
        done: trials.
        planned: trials that there would have been, had it not ended because of what came out.
    """

    hits: int
    labels_right: int
    done: int
    planned: int


def run_matching(
    setting: Setting,
    client: Client,
    defense: Pipeline,
    trials: Trials,
    purpose: str,
    advance: Advance,
    clock: Clock,
    to_the_end: bool = False,
) -> Counted:
    """Counts canaries that matching identifies, and those whose label is inferred."""
    matching = setting.matching(defense)
    context, random = setting.context(f"{purpose} clients"), setting.random(f"{purpose} ties")
    infers = not why_not_inferred(setting.model, setting.members)
    evidence = setting.spec.evidence
    hits = labels_right = done = 0
    held = COPIES_OF_A_CANARY * 4 * setting.model.size * setting.defense.aggregation.clients
    for part in trials.batches(max(1, min(CANARIES_TOGETHER, setting.memory // held))):
        observed = client.send(*part.members, context)
        hits += match(matching, part, observed, random).count(1)
        if infers:
            inferred = setting.infer(observed).reshape(len(part), -1).sort(dim=1).values
            true = part.members[1].reshape(len(part), -1).sort(dim=1).values
            labels_right += int((inferred == true).all(1).sum())
        done += len(part)
        advance(part.candidates.numel() + len(part))
        settled = ceiling_is_settled(hits, done, len(trials), 1 / evidence.candidates)
        if evidence.stop_early and settled and not to_the_end:
            break
        if clock.used(MATCHING_SHARE):
            return Counted(hits, labels_right, done, done)
    return Counted(hits, labels_right, done, len(trials))
