"""The experiments of an audit, each of which adds to what has been measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ggl_audit.alternatives import other_layouts, other_models
from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.attack.matching import Matching
from ggl_audit.attack.search import SearchResult
from ggl_audit.attacks import (
    ANALYTIC,
    GGL,
    Advance,
    Suite,
    captured_labels,
    recovered_exactly,
    run_attacks,
    run_search,
)
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.clock import Clock
from ggl_audit.defenses import Pipeline, SecureAggregation
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, measure_rate, paired_p_value
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.fidelity import candidate_distances, mean_psnr, nearest
from ggl_audit.evidence.grade import ceiling_is_settled, floor_is_settled, strongest
from ggl_audit.evidence.identification import (
    Trials,
    blind_labels,
    match,
    rank_of_truth,
    reconstruction_ranks,
)
from ggl_audit.evidence.likeness import (
    CLEAR,
    HALFWAY,
    MUCH_LOWER,
    Likeness,
    judge,
    judge_zeros,
)
from ggl_audit.evidence.membership import UnknownMembers, public_images
from ggl_audit.evidence.promise import (
    CANDIDATES,
    Identifier,
    cancelling,
    farthest,
    pool_size,
)
from ggl_audit.gradient import Gradient, concatenate, flat, norm, shares, stack, take, unstack
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import has_batch_norm
from ggl_audit.setting import Setting

CANARIES_TOGETHER = 25
HELD_BYTES = 2**30
CANARIES_BETWEEN_LOOKS = 5
MATCHING_CONTROL_TRIALS = 50
MEMBERSHIP_TRIALS = 100
MATCHING_SHARE = 0.4
"""Of a time limit, after which no further experiment by matching is begun or goes on."""
SEARCHES_COMPARED = 4
CAPTURED = "captured search"

LAST_SHARE = 0.25
"""More time than canaries took that the next ones, and what follows them, may take."""


@dataclass(frozen=True)
class Reconstructed:
    """The pictures that a search found.

    Attributes:
        images: (k, channels, height, width) in [0, 1], one for each image of the release.
        loss: the matching distance that was reached.
        curve: of the latent search, (evaluations, best loss so far) after each step.
    """

    images: torch.Tensor
    loss: float
    curve: list[tuple[int, float]]


@dataclass
class Measurements:
    """What has been measured so far; None is not measured.

    Attributes:
        clock: of the time limit.
        stage: the experiment that is running, None when all are done.
        evaluations: gradients of candidates so far.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred.
        matching_control: canaries identified by candidate matching without the defense.
        membership: canaries identified in releases whose other images are unknown.
        promise: worst-case images identified in what the client's own code sends.
        suite: the attacks that are made.
        exact: whether the image of the capture was read off the gradient exactly.
        seconds_each: that a canary and its null control took.
        captured: what each attack made of the captured gradient.
        captured_null: what each made of a random gradient of the same norm.
        repeated: the pictures of all searches of the capture, (searches, channels, height, width).
        repeated_losses: the losses of these searches.
        agreement_db: mean PSNR between the pictures of independent searches of the capture.
        null_agreement_db: the same for the random gradient.
        ranks: of each truth, by its distance to the nearest picture of each attack.
        matching_ranks: of each truth, by candidate matching, all other images being known.
        floors: canaries that each attack identified and its null control did not, by each distance.
        nulls: canaries that the null control of each identified, by the declared distance.
        canary_losses: the losses of the canaries' searches.
        null_losses: the losses of the null control's searches, the capture's included.
        likeness: of the capture to the canaries' gradients.
        undefended: canaries that the attack identified without the defense.
        others: what became of the further captures of the round.
    """

    clock: Clock = field(default_factory=Clock)
    stage: str | None = "preparation"
    evaluations: int = 0
    ceiling: Rate | None = None
    label: Rate | None = None
    matching_control: Rate | None = None
    membership: Rate | None = None
    promise: Rate | None = None
    exact: bool = False
    seconds_each: float = 0.0
    suite: Suite = field(default_factory=Suite)
    captured: dict[str, Reconstructed] = field(default_factory=dict)
    captured_null: dict[str, Reconstructed] = field(default_factory=dict)
    repeated: torch.Tensor | None = None
    repeated_losses: list[float] = field(default_factory=list)
    agreement_db: float | None = None
    null_agreement_db: float | None = None
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    matching_ranks: list[int | None] = field(default_factory=list)
    floors: dict[str, dict[str, ReconstructionRate]] = field(default_factory=dict)
    nulls: dict[str, ReconstructionRate] = field(default_factory=dict)
    canary_losses: list[float] = field(default_factory=list)
    null_losses: list[float] = field(default_factory=list)
    likeness: Likeness | None = None
    undefended: ReconstructionRate | None = None
    others: list[Measurements] = field(default_factory=list)

    def strongest(self, distance: str) -> str:
        """The attack that shows most by a distance; GGL where none was measured."""
        floors = {name: floors[distance] for name, floors in self.floors.items()}
        return strongest(floors) or GGL


def match_candidates(
    setting: Setting, trials: Trials, measured: Measurements, advance: Advance
) -> None:
    """Measures the ceiling, how often the label is recovered, and matching without the defense."""
    matching, random = Matching(setting.model, setting.defense), setting.random("captured ties")
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
        client = DeclaredClient(Matching(setting.model, without), without)
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


def identify_members(
    setting: Setting, trials: Trials, measured: Measurements, advance: Advance
) -> None:
    """Asks of releases of several images whether a canary is in them, the others being unknown."""
    if len(trials) == 0 or not can_identify_members(setting):
        return
    model, random, members = setting.model, setting.random("members"), setting.members
    every = np.arange(len(setting.reference))
    # The attacker's public images are no members, as far as there are enough others.
    others = random.permutation(np.setdiff1d(every, trials.candidates[:, 0].cpu().numpy()))
    pool = others if len(others) >= len(every) // 2 else random.permutation(every)
    public = pool[: min(public_images(model.size), len(every) // 2)]
    rest = torch.as_tensor(np.setdiff1d(every, public), device=model.device)
    matching = Matching(model, setting.defense)

    def contributed(chosen: torch.Tensor) -> torch.Tensor:
        images, labels = setting.reference.images[chosen], setting.reference.labels[chosen]
        each = unstack(matching.gradients(images, labels))
        return torch.stack([flat(setting.defense.share_of_one(gradient)) for gradient in each])

    noise = setting.defense.total_noise()
    # A sum over each client's images is a mean over clients of sums.
    whole = members if not model.loss_sum else setting.defense.aggregation.clients
    unknown = UnknownMembers(
        contributed(torch.as_tensor(public, device=model.device)),
        members,
        whole,
        noise.std if noise else 0.0,
    )
    context, hits, done = setting.context("members clients"), 0, 0
    for one in trials.batches(1):
        if done and measured.clock.used(MATCHING_SHARE):
            break
        companions = rest[~torch.isin(rest, one.candidates)]
        drawn = torch.as_tensor(random.permutation(len(companions)), device=model.device)
        trial = replace(one, companions=companions[drawn[: members - 1]][None])
        release = flat(take(setting.client.send(*trial.members, context), 0))
        scores = unknown.log_likelihoods(contributed(trial.candidates[0]), release)
        hits += rank_of_truth(-scores[None], random)[0] == 1
        done += 1
        advance(trial.candidates.numel() + 1)
    measured.membership = measure_rate(hits, done, 1 / setting.spec.evidence.candidates)


def can_identify_members(setting: Setting) -> bool:
    """Whether a release is of several images whose shares add up."""
    model = setting.model
    local, batch_size = model.local, model.batch_size
    one = batch_size == 1
    adds_up = setting.defense.adds_up() and (one or (local is None and model.criterion.adds_up))
    mixed = has_batch_norm(model.module) and model.module.training
    enough = len(setting.reference) // 2 >= setting.members + setting.spec.evidence.candidates
    return setting.members > 1 and adds_up and enough and not (mixed and batch_size > 1)


def try_promise(setting: Setting, trials: int, measured: Measurements, advance: Advance) -> None:
    """Identifies worst-case images in what the client's own code sends, against its guarantee."""
    if not tests_promise(setting) or trials == 0:
        return
    assert isinstance(setting.client, OwnClient)
    model, random = setting.model, setting.random("promise")
    pool = pool_size(model.size)
    drawn = torch.as_tensor(random.integers(len(setting.reference), size=pool), device=model.device)
    images = setting.reference.images[drawn]
    labels = torch.as_tensor(random.integers(model.classes, size=pool), device=model.device)
    gradients = Matching(model, setting.defense).gradients(images, labels)
    context = setting.context("promise clients")
    each = [take(gradients, i) for i in range(pool)]
    contributions = torch.stack([flat(setting.defense.without_noise(g, context)) for g in each])
    raw = torch.stack([flat(gradient) for gradient in each])
    chosen = farthest(contributions, raw.norm(dim=1), CANDIDATES)
    others = cancelling(raw, setting.client.batch_size - 1, random)
    companions = ImageSet(images[others], labels[others], "companions that cancel")
    client = replace(setting.client, companions=companions, always_the_same=True)
    identifier = Identifier(contributions[chosen])
    hits = done = 0
    for truth in random.integers(CANDIDATES, size=trials):
        if done and measured.clock.used(MATCHING_SHARE):
            break
        one = chosen[int(truth)][None]
        release = flat(take(client.send(images[one], labels[one], context), 0))
        hits += identifier.guess(release, random) == int(truth)
        done += 1
        advance(1)
    measured.promise = measure_rate(hits, done, 1 / CANDIDATES)


def tests_promise(setting: Setting) -> bool:
    """Whether there is a promise, and a client that could break it."""
    return isinstance(setting.client, OwnClient) and setting.guarantee is not None


def attack_capture(setting: Setting, measured: Measurements, advance: Advance) -> None:
    """Attacks the captured gradient, and a random one of its norm, each in several searches.

    The first search of each is the one that counts; the others show whether it can be repeated.

    Raises:
        KeyboardInterrupt: interrupted; the pictures found so far are kept.
    """
    context = setting.context("captured null")
    null = null_gradient(setting.observed, setting.defense, context, setting.usual_norm)
    observed = stack([setting.observed] * SEARCHES_COMPARED + [null] * SEARCHES_COMPARED)
    labels = captured_labels(setting, 2 * SEARCHES_COMPARED)
    result, attempts = run_attacks(setting, measured.suite, observed, labels, CAPTURED, advance)
    for name, attempt in attempts.items():
        for kept, index in ((measured.captured, 0), (measured.captured_null, SEARCHES_COMPARED)):
            images = attempt.images[index].reshape(-1, *setting.model.shape)
            loss = float(attempt.losses[index])
            kept[name] = Reconstructed(images, loss, _curve(result, index))
    if not result.complete:
        raise KeyboardInterrupt
    if ANALYTIC in attempts:
        measured.exact = recovered_exactly(setting, attempts[ANALYTIC])
    searched = attempts[GGL].images
    measured.repeated = searched[:SEARCHES_COMPARED]
    measured.repeated_losses = result.losses[:SEARCHES_COMPARED].tolist()
    measured.agreement_db = _agreement_db(measured.repeated)
    measured.null_agreement_db = _agreement_db(searched[SEARCHES_COMPARED:])
    if not setting.prior_saw_truth:
        distance = candidate_distances(setting.model, setting.lpips)[setting.distance]
        random = setting.random("captured reconstruction ties")
        trials = setting.captured_trials()
        for name, attempt in attempts.items():
            measured.ranks[name] = [
                None
                if one is None
                else reconstruction_ranks(attempt.images[:1], one, distance, random)[0]
                for one in trials
            ]


def reconstruct(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Makes each attack on canaries and on a null control of each, and places the capture.

    Raises:
        KeyboardInterrupt: interrupted.
    """
    planned, chance = len(canaries), 1 / setting.spec.evidence.candidates
    if planned == 0:
        return
    distances = candidate_distances(setting.model, setting.lpips)
    context, random = setting.context("canary clients"), setting.random("reconstruction ties")
    names = measured.suite.names
    hits = {name: {distance: _Pairs() for distance in distances} for name in names}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    losses: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    gradients: list[Gradient] = []
    done = 0
    stop_early, clock = setting.spec.evidence.stop_early, measured.clock
    together = CANARIES_BETWEEN_LOOKS if stop_early or clock.is_limited else planned
    for part in canaries.batches(together):
        if done and not clock.reaches((1 + LAST_SHARE) * measured.seconds_each * len(part)):
            planned = done  # the clock does not look at what comes out
            break
        began = clock.seconds
        sent = setting.client.send(*part.members, context)
        labels = torch.cat([setting.labels_seen(sent, part.members[1])] * 2)
        nulls = [
            null_gradient(one, setting.defense, context, setting.usual_norm)
            for one in unstack(sent)
        ]
        observed = concatenate([sent, stack(nulls)])
        purpose = f"canary search {len(gradients)}"
        result, attempts = run_attacks(setting, measured.suite, observed, labels, purpose, advance)
        if not result.complete:
            raise KeyboardInterrupt
        matching = Matching(setting.model, setting.defense)
        searched = attempts[GGL].images
        agreements.append(matching.agreement(searched, labels, observed).unflatten(0, (2, -1)))
        gradients.append(sent)
        losses.append(result.losses.unflatten(0, (2, -1)))
        for name, attempt in attempts.items():
            found, null_found = attempt.images.unflatten(0, (2, -1))
            pictures[name].append(torch.stack([found, null_found]))
            for distance, measure in distances.items():
                hits[name][distance].add(
                    reconstruction_ranks(found, part, measure, random),
                    reconstruction_ranks(null_found, part, measure, random),
                )
        done += len(part)
        measured.seconds_each = (clock.seconds - began) / len(part)
        counted = [hits[name][setting.distance] for name in names]
        if stop_early and all(
            floor_is_settled(*own.apart, done, planned, chance, len(names)) for own in counted
        ):
            break

    done_canaries = canaries.first(done)
    for name in names:
        found, null_found = torch.cat(pictures[name], dim=1)
        measured.floors[name] = {}
        for distance, own in hits[name].items():
            beyond, only_null = own.apart
            p_value = paired_p_value(beyond, only_null + planned - done, len(names))
            measured.floors[name][distance] = _rate(
                beyond, found, done_canaries, planned, p_value, len(names)
            )
        null = sum(hits[name][setting.distance].null)
        measured.nulls[name] = _rate(null, null_found, done_canaries, planned)
    canary_losses, null_losses = torch.cat(losses, dim=1).tolist()
    if not setting.defense.steps:
        controls = done_canaries.first(setting.spec.evidence.control_trials)
        if len(controls):
            found = torch.cat(pictures[GGL], dim=1)[0, : len(controls)]
            right = sum(hits[GGL][setting.distance].found[: len(controls)])
            controls_planned = min(planned, setting.spec.evidence.control_trials)
            measured.undefended = _rate(right, found, controls, controls_planned)
    agreement, sent = torch.cat(agreements, dim=1), concatenate(gradients)
    others = zip(setting.others, measured.others, strict=True)
    for of, about in ((setting, measured), *others):
        about.canary_losses = canary_losses
        about.seconds_each = measured.seconds_each
        about.null_losses = [*null_losses, about.captured_null[GGL].loss]
        about.likeness = _likeness(of, about, agreement, sent, advance)


def reconstruct_undefended(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Attacks canaries without the defense: can it work at all with this prior and model?

    Raises:
        KeyboardInterrupt: interrupted.
    """
    if len(canaries) == 0 or not setting.defense.steps:
        return
    client = DeclaredClient(Matching(setting.model, undefended(setting)), undefended(setting))
    gradients = client.send(*canaries.members, setting.context("undefended clients"))
    labels = setting.labels_seen(gradients, canaries.members[1])
    result, images = run_search(
        setting, undefended(setting), gradients, labels, "undefended search", advance
    )
    if not result.complete:
        raise KeyboardInterrupt
    distance = candidate_distances(setting.model, setting.lpips)[setting.distance]
    ranks = reconstruction_ranks(images, canaries, distance, setting.random("undefended ties"))
    measured.undefended = _rate(ranks.count(1), images, canaries, len(canaries))


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
    matching = Matching(setting.model, defense)
    context, random = setting.context(f"{purpose} clients"), setting.random(f"{purpose} ties")
    infers = not why_not_inferred(setting.model, setting.members)
    evidence = setting.spec.evidence
    hits = labels_right = done = 0
    held = 4 * setting.model.size * setting.defense.aggregation.clients
    for part in trials.batches(max(1, min(CANARIES_TOGETHER, HELD_BYTES // held))):
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


def _likeness(
    setting: Setting,
    measured: Measurements,
    agreements: torch.Tensor,
    gradients: Gradient,
    advance: Advance,
) -> Likeness:
    """Judges the capture, and where it is unlike the canaries, or may be, looks for the cause.

    Args:
        setting: what was handed in.
        measured: holds the pictures of the capture.
        agreements: (2, n, k), of the canaries and of their null control.
        gradients: of the canaries, k - 1 tensors with a leading dimension n.
        advance: told of the candidates that are evaluated.
    """
    assert measured.repeated is not None
    canaries, nulls = agreements
    names = list(setting.observed)
    losses = torch.tensor(measured.canary_losses, device=canaries.device)

    def place(of: Setting, images: torch.Tensor) -> Likeness:
        """Of the picture that places the capture highest: a single search may fail."""
        count = len(images)
        matching = Matching(of.model, of.defense)
        labels = captured_labels(of, count)
        found = matching.agreement(images, labels, stack([of.observed] * count))
        judged = [judge(row, canaries, losses, nulls, names) for row in found]
        return max(judged, key=lambda one: -math.inf if one.place is None else one.place)

    likeness = place(setting, measured.repeated)
    largest = max(float(norm(take(gradients, i))) for i in range(len(canaries)))
    if float(norm(setting.observed)) > largest:
        likeness = likeness.model_copy(update={"rules_out_larger": False})
    if has_batch_norm(setting.model.module) and not setting.defense.empties_tensors():
        own_shares = shares(stack([setting.observed]))[0]
        likeness = judge_zeros(own_shares, shares(gradients), names) or likeness
    loss = min(measured.repeated_losses)
    is_placed = likeness.place is not None and likeness.place >= CLEAR
    if likeness.outcome == "hidden" or (is_placed and loss <= float(losses.median())):
        return likeness
    unlike = likeness.outcome == "unlike"
    least_place, lowest = (HALFWAY, loss) if unlike else (CLEAR, MUCH_LOWER * loss)
    better_cause = None
    # Values in another order are told by the agreement of their own tensors.
    layouts = other_layouts(setting) if unlike else ()
    for cause, other in itertools.chain(other_models(setting), layouts):
        if not measured.clock.reaches(SEARCHES_COMPARED * measured.seconds_each):
            break
        observed = stack([other.observed] * SEARCHES_COMPARED)
        labels = captured_labels(other, SEARCHES_COMPARED)
        # The capture's own stream, so that a declaration which is the same in effect does the same.
        result, images = run_search(other, other.defense, observed, labels, CAPTURED, advance)
        if not result.complete:
            raise KeyboardInterrupt
        elsewhere, loss_elsewhere = place(other, images).place, float(result.losses.min())
        if elsewhere is not None and elsewhere >= least_place and loss_elsewhere < lowest:
            lowest = loss_elsewhere
            better_cause = (
                f"{cause}, with which it is like them, at a matching distance of {lowest:.2g} in "
                f"place of {loss:.2g}"
            )
    if better_cause is None:
        return likeness
    found = {"outcome": "unlike", "cause": better_cause, "rules_out_larger": False}
    return likeness.model_copy(update=found)


def _agreement_db(images: torch.Tensor) -> float:
    """The mean PSNR between searches; of sets by each picture's best partner, as order is idle."""
    pairs = torch.combinations(torch.arange(len(images))).tolist()
    found = []
    for first, second in pairs:
        own = images[first].reshape(-1, *images.shape[-3:])
        other = images[second].reshape(-1, *images.shape[-3:])
        found.append(mean_psnr(nearest(other.expand(len(own), *other.shape), own), own))
    return sum(found) / len(found)


@dataclass
class _Pairs:
    """Of each canary, whether the attack identified it, and whether its null control did."""

    found: list[bool] = field(default_factory=list)
    null: list[bool] = field(default_factory=list)

    def add(self, ranks: list[int], null_ranks: list[int]) -> None:
        self.found += [rank == 1 for rank in ranks]
        self.null += [rank == 1 for rank in null_ranks]

    @property
    def apart(self) -> tuple[int, int]:
        """How many only the attack identified, and how many only its null control."""
        pairs = list(zip(self.found, self.null, strict=True))
        return pairs.count((True, False)), pairs.count((False, True))


def _curve(result: SearchResult, index: int) -> list[tuple[int, float]]:
    return list(zip(result.spent.tolist(), result.curves[index].tolist(), strict=True))


def _rate(
    hits: int,
    pictures: torch.Tensor,
    canaries: Trials,
    planned: int,
    null_p_value: float | None = None,
    attacks: int = 1,
) -> ReconstructionRate:
    chance = 1 / canaries.candidates.shape[1]
    rate = measure_rate(hits, len(canaries), chance, planned, attacks)
    psnr = mean_psnr(nearest(pictures, canaries.canaries), canaries.canaries)
    return ReconstructionRate(**dict(rate), psnr_db=psnr, null_p_value=null_p_value)
