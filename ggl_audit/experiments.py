"""The experiments of an audit, each of which adds to what has been measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ggl_audit.alternatives import alternatives
from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.attack.matching import Matching
from ggl_audit.attack.objective import LatentObjective, pictures
from ggl_audit.attack.residuals import Residuals
from ggl_audit.attack.search import SearchResult, search
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.defenses import Pipeline, SecureAggregation
from ggl_audit.evidence.bounds import Rate, ReconstructionRate, measure_rate, paired_p_value
from ggl_audit.evidence.controls import null_gradient
from ggl_audit.evidence.fidelity import candidate_distances, mean_psnr, nearest
from ggl_audit.evidence.grade import ceiling_is_settled, floor_is_settled
from ggl_audit.evidence.identification import (
    Trials,
    blind_labels,
    match,
    rank_of_truth,
    reconstruction_ranks,
)
from ggl_audit.evidence.likeness import CLEAR, HALFWAY, WORST, Likeness, judge, judge_zeros
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
from ggl_audit.optimizers import start_optimizer, wants_more
from ggl_audit.setting import Setting

CANARIES_TOGETHER = 25
HELD_BYTES = 2**30
CANARIES_BETWEEN_LOOKS = 5
MATCHING_CONTROL_TRIALS = 50
MEMBERSHIP_TRIALS = 100
SEARCHES_COMPARED = 4

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Reconstructed:
    """The pictures that a search found.

    Attributes:
        images: (k, channels, height, width) in [0, 1], one for each image of the release.
        loss: the loss of its latent.
        curve: (evaluations, best loss so far) after each step.
    """

    images: torch.Tensor
    loss: float
    curve: list[tuple[int, float]]


@dataclass
class Measurements:
    """What has been measured so far; None is not measured.

    Attributes:
        stage: the experiment that is running, None when all are done.
        evaluations: gradients of candidates so far.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred.
        matching_control: canaries identified by candidate matching without the defense.
        membership: canaries identified in releases whose other images are unknown.
        promise: worst-case images identified in what the client's own code sends.
        captured: what the attack made of the captured gradient.
        captured_null: what it made of a random gradient of the same norm.
        repeated: the pictures of all searches of the capture, (searches, channels, height, width).
        agreement_db: mean PSNR between the pictures of independent searches of the capture.
        null_agreement_db: the same for the random gradient.
        ranks: of each truth, by its distance to the nearest picture.
        matching_ranks: of each truth, by candidate matching, all other images being known.
        floor: canaries that the attack identified and the null control did not, by each distance.
        null: canaries that the null control identified, by the declared distance.
        canary_losses: the losses of the canaries' pictures.
        null_losses: the losses of the null control's pictures, the capture's included.
        likeness: of the capture to the canaries' gradients.
        undefended: canaries that the attack identified without the defense.
        others: what became of the further captures of the round.
    """

    stage: str | None = "preparation"
    evaluations: int = 0
    ceiling: Rate | None = None
    label: Rate | None = None
    matching_control: Rate | None = None
    membership: Rate | None = None
    promise: Rate | None = None
    captured: Reconstructed | None = None
    captured_null: Reconstructed | None = None
    repeated: torch.Tensor | None = None
    agreement_db: float | None = None
    null_agreement_db: float | None = None
    ranks: list[int | None] = field(default_factory=list)
    matching_ranks: list[int | None] = field(default_factory=list)
    floor: dict[str, ReconstructionRate] = field(default_factory=dict)
    null: ReconstructionRate | None = None
    canary_losses: list[float] = field(default_factory=list)
    null_losses: list[float] = field(default_factory=list)
    likeness: Likeness | None = None
    undefended: ReconstructionRate | None = None
    others: list[Measurements] = field(default_factory=list)


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
    planned = len(trials)
    hits, labels_right, done = run_matching(
        setting, setting.client, setting.defense, trials, "matching", advance
    )
    measured.ceiling = measure_rate(hits, done, chance, planned)
    if not why_not_inferred(setting.model, setting.members):
        guessed = blind_labels(setting.model.classes, setting.members)
        if guessed < 1:
            measured.label = measure_rate(labels_right, done, guessed, planned)
    if setting.defense.steps:
        control = trials.first(MATCHING_CONTROL_TRIALS)
        without = undefended(setting)
        client = DeclaredClient(Matching(setting.model, without), without)
        hits, _, done = run_matching(
            setting, client, without, control, "matching control", advance, to_the_end=True
        )
        measured.matching_control = measure_rate(hits, done, chance)
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
    context, hits = setting.context("members clients"), 0
    for one in trials.batches(1):
        companions = rest[~torch.isin(rest, one.candidates)]
        drawn = torch.as_tensor(random.permutation(len(companions)), device=model.device)
        trial = replace(one, companions=companions[drawn[: members - 1]][None])
        release = flat(take(setting.client.send(*trial.members, context), 0))
        scores = unknown.log_likelihoods(contributed(trial.candidates[0]), release)
        hits += rank_of_truth(-scores[None], random)[0] == 1
        advance(trial.candidates.numel() + 1)
    measured.membership = measure_rate(hits, len(trials), 1 / setting.spec.evidence.candidates)


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
    hits = 0
    for truth in random.integers(CANDIDATES, size=trials):
        one = chosen[int(truth)][None]
        release = flat(take(client.send(images[one], labels[one], context), 0))
        hits += identifier.guess(release, random) == int(truth)
        advance(1)
    measured.promise = measure_rate(hits, trials, 1 / CANDIDATES)


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
    result, images = run_search(
        setting, setting.defense, observed, labels, "captured search", advance
    )
    measured.captured = _reconstructed(result, images, 0, setting)
    measured.captured_null = _reconstructed(result, images, SEARCHES_COMPARED, setting)
    if not result.complete:
        raise KeyboardInterrupt
    measured.repeated = images[:SEARCHES_COMPARED]
    measured.agreement_db = _agreement_db(measured.repeated)
    measured.null_agreement_db = _agreement_db(images[SEARCHES_COMPARED:])
    if not setting.prior_saw_truth:
        distance = candidate_distances(setting.model, setting.lpips)[setting.distance]
        random = setting.random("captured reconstruction ties")
        measured.ranks = [
            None if one is None else reconstruction_ranks(images[:1], one, distance, random)[0]
            for one in setting.captured_trials()
        ]


def reconstruct(
    setting: Setting, canaries: Trials, measured: Measurements, advance: Advance
) -> None:
    """Attacks canaries and a null control of each, and places the capture among them.

    Raises:
        KeyboardInterrupt: interrupted.
    """
    planned, chance = len(canaries), 1 / setting.spec.evidence.candidates
    if planned == 0:
        return
    assert measured.captured is not None
    assert measured.captured_null is not None
    distances = candidate_distances(setting.model, setting.lpips)
    context, random = setting.context("canary clients"), setting.random("reconstruction ties")
    hits: dict[str, list[bool]] = {name: [] for name in distances}
    null_hits: dict[str, list[bool]] = {name: [] for name in distances}
    all_found: list[torch.Tensor] = []
    null_pictures: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    gradients: list[Gradient] = []
    together = CANARIES_BETWEEN_LOOKS if setting.spec.evidence.stop_early else planned
    for part in canaries.batches(together):
        sent = setting.client.send(*part.members, context)
        labels = torch.cat([setting.labels_seen(sent, part.members[1])] * 2)
        nulls = [
            null_gradient(one, setting.defense, context, setting.usual_norm)
            for one in unstack(sent)
        ]
        observed = concatenate([sent, stack(nulls)])
        purpose = f"canary search {len(all_found)}"
        result, images = run_search(setting, setting.defense, observed, labels, purpose, advance)
        if not result.complete:
            raise KeyboardInterrupt
        matching = Matching(setting.model, setting.defense)
        agreements.append(matching.agreement(images, labels, observed).unflatten(0, (2, -1)))
        gradients.append(sent)
        losses.append(result.losses.unflatten(0, (2, -1)))
        found, null_found = images.unflatten(0, (2, -1))
        all_found.append(found)
        null_pictures.append(null_found)
        for name, distance in distances.items():
            for made, kept in ((found, hits), (null_found, null_hits)):
                ranks = reconstruction_ranks(made, part, distance, random)
                kept[name] += [rank == 1 for rank in ranks]
        beyond, only_null = _paired(hits[setting.distance], null_hits[setting.distance])
        done = len(hits[setting.distance])
        if floor_is_settled(beyond, only_null, done, planned, chance):
            break

    done_canaries = canaries.first(len(hits[setting.distance]))
    for name in distances:
        beyond, only_null = _paired(hits[name], null_hits[name])
        left = planned - len(hits[name])
        p_value = paired_p_value(beyond, only_null + left)
        measured.floor[name] = _rate(beyond, torch.cat(all_found), done_canaries, planned, p_value)
    null = sum(null_hits[setting.distance])
    measured.null = _rate(null, torch.cat(null_pictures), done_canaries, planned)
    canary_losses, null_losses = torch.cat(losses, dim=1).tolist()
    if not setting.defense.steps:
        controls = done_canaries.first(setting.spec.evidence.control_trials)
        if len(controls):
            found = torch.cat(all_found)[: len(controls)]
            right = sum(hits[setting.distance][: len(controls)])
            controls_planned = min(planned, setting.spec.evidence.control_trials)
            measured.undefended = _rate(right, found, controls, controls_planned)
    agreement, sent = torch.cat(agreements, dim=1), concatenate(gradients)
    others = zip(setting.others, measured.others, strict=True)
    for of, own in ((setting, measured), *others):
        assert own.captured_null is not None
        own.canary_losses = canary_losses
        own.null_losses = [*null_losses, own.captured_null.loss]
        own.likeness = _likeness(of, own, agreement, sent, advance)


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


def run_matching(
    setting: Setting,
    client: Client,
    defense: Pipeline,
    trials: Trials,
    purpose: str,
    advance: Advance,
    to_the_end: bool = False,
) -> tuple[int, int, int]:
    """Counts canaries that matching identifies, those whose label is inferred, and all of them."""
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
    return hits, labels_right, done


def run_search(
    setting: Setting,
    defense: Pipeline,
    observed: Gradient,
    labels: torch.Tensor,
    purpose: str,
    advance: Advance,
    evaluations: int | None = None,
) -> tuple[SearchResult, torch.Tensor]:
    """Searches the latents of t observed gradients, each on its own, as the spec declares.

    Args:
        setting: what was handed in.
        defense: to replicate; not the declared one in the undefended control.
        observed: tensors with a leading dimension t.
        labels: (t,) or (t, k), what the attacker takes the labels for.
        purpose: names the stream of randomness.
        advance: told of the candidates that are evaluated.
        evaluations: for each gradient, if not as declared.

    Returns:
        What was found, and its pictures (t, channels, height, width) or (t, k, ...) in [0, 1].
    """
    attack = setting.spec.attack
    matching = Matching(setting.model, defense, attack.distance)
    noise = defense.total_noise()
    objective = LatentObjective(
        matching,
        Residuals(matching, defense, attack.distance),
        Derivatives(setting.model, defense, attack.distance),
        setting.prior,
        observed,
        labels,
        attack.regularizer,
        noise.std if noise else 0.0,
    )
    random = setting.random(purpose)
    parts = objective.parts(together=wants_more(attack.optimizer))
    searches = (len(labels), attack.restarts, parts)
    seeds = random.integers(2**32, size=searches)
    budget = evaluations or attack.evaluations
    start = start_optimizer(attack, setting.prior.size * objective.members // parts)
    result = search(objective, start, seeds, budget, advance)
    found = pictures(setting.prior, result.latents, labels.reshape(len(labels), -1))
    return result, found if labels.ndim == 2 else found[:, 0]


def _likeness(
    setting: Setting,
    measured: Measurements,
    agreements: torch.Tensor,
    gradients: Gradient,
    advance: Advance,
) -> Likeness:
    """Judges the capture, and where it is unlike the canaries looks for the cause.

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

    def place(of: Setting, images: torch.Tensor) -> Likeness:
        """Of the picture that places the capture highest: a single search may fail."""
        count = len(images)
        matching = Matching(of.model, of.defense)
        labels = captured_labels(of, count)
        found = matching.agreement(images, labels, stack([of.observed] * count))
        judged = [judge(row, canaries, nulls, names) for row in found]
        return max(judged, key=lambda one: -math.inf if one.place is None else one.place)

    likeness = place(setting, measured.repeated)
    largest = max(float(norm(take(gradients, i))) for i in range(len(canaries)))
    if float(norm(setting.observed)) > largest:
        likeness = likeness.model_copy(update={"rules_out_larger": False})
    if has_batch_norm(setting.model.module) and not setting.defense.empties_tensors():
        own_shares = shares(stack([setting.observed]))[0]
        likeness = judge_zeros(own_shares, shares(gradients), names) or likeness
    if likeness.outcome == "hidden" or (likeness.place is not None and likeness.place >= CLEAR):
        return likeness
    best, best_cause = WORST if likeness.outcome == "like" else HALFWAY, None
    for cause, other in alternatives(setting):
        observed = stack([other.observed])
        labels = captured_labels(other, 1)
        result, images = run_search(other, other.defense, observed, labels, "alternative", advance)
        if not result.complete:
            raise KeyboardInterrupt
        elsewhere = place(other, images)
        if elsewhere.place is not None and elsewhere.place >= best:
            best, best_cause = elsewhere.place, f"{cause}, with which it is like them"
    if best_cause is None:
        return likeness
    unlike = {"outcome": "unlike", "cause": best_cause, "rules_out_larger": False}
    return likeness.model_copy(update=unlike)


def _reconstructed(
    result: SearchResult, images: torch.Tensor, index: int, setting: Setting
) -> Reconstructed:
    losses = result.curves[index].tolist()
    curve = list(zip(result.spent.tolist(), losses, strict=True))
    own = images[index].reshape(-1, *setting.model.shape)
    return Reconstructed(own, float(result.losses[index]), curve)


def captured_labels(setting: Setting, count: int) -> torch.Tensor:
    """The captured labels for so many searches: (count,) or (count, k)."""
    labels = torch.tensor(setting.labels, device=setting.model.device)
    return labels.expand(count, -1) if setting.members > 1 else labels.expand(count)


def _agreement_db(images: torch.Tensor) -> float:
    """The mean PSNR between searches; of sets by each picture's best partner, as order is idle."""
    pairs = torch.combinations(torch.arange(len(images))).tolist()
    found = []
    for first, second in pairs:
        own = images[first].reshape(-1, *images.shape[-3:])
        other = images[second].reshape(-1, *images.shape[-3:])
        found.append(mean_psnr(nearest(other.expand(len(own), *other.shape), own), own))
    return sum(found) / len(found)


def _paired(hits: list[bool], null_hits: list[bool]) -> tuple[int, int]:
    """Counts what only the attack identified, and what only its null control did."""
    pairs = list(zip(hits, null_hits, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def _rate(
    hits: int,
    pictures: torch.Tensor,
    canaries: Trials,
    planned: int,
    null_p_value: float | None = None,
) -> ReconstructionRate:
    rate = measure_rate(hits, len(canaries), 1 / canaries.candidates.shape[1], planned)
    psnr = mean_psnr(nearest(pictures, canaries.canaries), canaries.canaries)
    return ReconstructionRate(**dict(rate), psnr_db=psnr, null_p_value=null_p_value)
