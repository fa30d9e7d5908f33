"""Are the capture, the client's own code and the attacker's replica what they are taken for?

The last two are tried on a few public images. What is found wrong is a doubt about a low ceiling.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ggl_audit.attack.labels import scale_of_one, unequal_weights, usual_head
from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, norm, stack, take
from ggl_audit.case.case import Case
from ggl_audit.client.clients import DeclaredClient, OwnClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.client.randomness import client_context, client_contexts
from ggl_audit.defenses import Pipeline, is_own, relative_l2
from ggl_audit.evidence.consistency import check_remainder, check_truth
from ggl_audit.inputs.beside import Beside
from ggl_audit.inputs.capture import FittedGradient
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.statistics import Statistics
from ggl_audit.spec import Spec

CLIENT_TRIALS = 3
REPLICA_IS_CLOSE = 0.05
"""Squared and relative, for a release without noise."""

MANY = 16
"""Images of a release, of which more are tried only once."""

LABEL_BATCHES, FEWEST_BATCHES, LABELLED_IMAGES = 32, 8, 512
"""Public batches beside which inferred labels are judged, of so many images together."""

CLEARLY_WORSE = 1.5
"""Than the worst of these. A right batch is exchangeable with 32 public ones, so at most 1 in 33 is
worse than all; of the digits' model, at round 0 and trained, 0.3 to 2.3 % are that much worse."""


def capture_doubts(
    fitted: FittedGradient, spec: Spec, model: ClientModel, defense: Pipeline
) -> list[str]:
    """What was sent, or may have been, and is not measured."""
    local = spec.capture.local
    doubts = beside_doubts(fitted.beside, model, defense, "the capture holds")
    silent = fitted.beside.silent
    if silent:
        doubts.append(
            f"in train mode the client's running statistics ({silent[0]}"
            f"{', ...' if len(silent) > 1 else ''}) hold what the images do to them, and whether "
            "they were sent is not said: declare capture.unsent for them if they never are"
        )
    if spec.guarantee is not None and defense.clear.names:
        doubts.append("the guarantee does not cover the running statistics, sent in the clear")
    if fitted.unsent:
        more = f" and {len(fitted.unsent) - 1} more" if len(fitted.unsent) > 1 else ""
        doubts.append(
            f"the capture lacks {fitted.unsent[0]}{more}, which capture.unsent does not declare: "
            "a client that sends them gives more away"
        )
    trained = [name for name, _ in model.module.named_parameters() if name in model.unsent]
    if trained and local is not None and local.steps(spec.capture.batch_size) > 1:
        doubts.append(
            "parameters that are not sent change in local training, which is replayed without that"
        )
    if spec.capture.unsent and local is not None and local.clip_norm is not None:
        doubts.append(
            "parameters that are not sent may count in the norm that local training clips, which "
            "is replayed without them"
        )
    if local is not None and local.remembers and not local.fresh:
        doubts.append(
            "the optimizer goes on with its state of earlier rounds, and is replayed as if it "
            "began afresh"
        )
    return doubts


def beside_doubts(
    beside: Beside, model: ClientModel, defense: Pipeline, what_holds: str
) -> list[str]:
    """What was sent beside the gradient and cannot be computed from images.

    Args:
        beside: what was sent.
        model: the client's.
        defense: as declared.
        what_holds: it, in words.
    """
    doubts = [
        f"{what_holds} {kind} ({names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''}), "
        "which were sent and are not measured: if they tell nothing, say why in capture.ignored"
        for kind, names in beside.unmeasured.items()
    ]
    counts = {} if defense.clear.is_over_everything else beside.counts
    declared = _declared_counts(model, defense, tuple(counts)) if counts else {}
    wrong = [name for name, change in counts.items() if float(change) != float(declared[name])]
    if wrong:
        doubts.append(
            f"{wrong[0]} went up by {-float(counts[wrong[0]]):g}, and by "
            f"{-float(declared[wrong[0]]):g} as declared"
        )
    return doubts


def _declared_counts(model: ClientModel, defense: Pipeline, names: tuple[str, ...]) -> Gradient:
    """What local training as declared changes counts of batches by, before less after."""
    counting = replace(model, statistics=Statistics(model.normalizations, names))
    clients = ClientGradients(counting, Pipeline(defense.steps, counting))
    images = torch.rand(1, model.batch_size, *model.shape, device=model.device)
    labels = torch.zeros(1, model.batch_size, dtype=torch.long, device=model.device)
    return take(clients.gradients(images, labels), 0)


def client_doubts(case: Case) -> list[str]:
    """Compares what the client's own code sends for a few images with the declaration.

    Raises:
        SpecError: the code does not run or does not return a gradient.
    """
    client, spec, defense, reference = case.client.own_code, case.spec, case.defense, case.reference
    if client is None:
        return []
    model = client.clients.model
    context = client_context(spec.seed, "client trial", model.device)
    few = max(1, client.batch_size)
    beside = client.fitted(reference.images[:few], reference.labels[:few], context).beside
    sent_too = beside_doubts(beside, model, defense, "the client's own code sends")
    if sent_too:
        return sent_too
    if spec.capture.batch_size > 1:
        return _batch_doubts(client, defense, reference, spec.seed)
    images, labels = reference.images[:CLIENT_TRIALS], reference.labels[:CLIENT_TRIALS]
    contexts = client_contexts(spec.seed, "client trials", model.device, range(len(labels)))
    sent = client.send(images[:, None], labels[:, None], contexts)
    if client.averaged and client.batch_size > 1:
        return [
            f"canaries share a mean over {client.batch_size} images with others, which hides them "
            "better than the captured gradient of one image is hidden"
        ]
    for index, image in enumerate(images):
        one = take(sent, index)
        checks = defense.checks.verify(one)
        if defense.randomness.leaves_only_noise():
            told = None if client.clients.model.targets is None else labels[index, None]
            others = reference.images[1:]
            checks.append(check_truth(case.matching(), defense, one, image, others, told))
        wrong = [check for check in checks if check.outcome == "contradicts"]
        if wrong:
            return [f"the client's own code contradicts {wrong[0].step}: {wrong[0].detail}"]
    return []


def _batch_doubts(
    client: OwnClient, defense: Pipeline, reference: ImageSet, seed: int
) -> list[str]:
    if not defense.randomness.leaves_only_noise():
        return [f"whether the client's own code does {defense} to a batch cannot be checked"]
    images, labels = reference.sets(CLIENT_TRIALS, client.batch_size)
    contexts = client_contexts(
        seed, "client trials", client.clients.model.device, range(CLIENT_TRIALS)
    )
    sent = client.send(images, labels, contexts)
    matching = Matching(client.clients.model, defense, memory=client.clients.memory)
    replicas = matching.replicas(images, labels, sent)
    for index in range(CLIENT_TRIALS):
        check = check_remainder(defense, take(replicas, index), take(sent, index))
        if check.outcome == "contradicts":
            return [f"the client's own code contradicts {check.step}: {check.detail}"]
    return []


def label_doubts(case: Case, observed: Gradient) -> list[str]:
    """Compares how well equally weighted images explain the capture with public batches.

    There are none for a single image.
    """
    model, reference, members = case.model, case.reference, case.members
    if members == 1:
        return []
    batches = max(FEWEST_BATCHES, min(LABEL_BATCHES, LABELLED_IMAGES // members))
    contexts = client_contexts(0, "label batches", model.device, range(batches))
    # A set may be sorted by its classes.
    shuffled = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    chosen = shuffled.repeat(-(-batches * members // len(reference)))[: batches * members]
    chosen = chosen.view(batches, members).to(model.device)
    sent = case.client.send(reference.images[chosen], reference.labels[chosen], contexts)
    usual, scale = usual_head(model, reference), scale_of_one(model, case.defense, members)

    def gained(gradients: Gradient, scale: float | None) -> float:
        return float(unequal_weights(gradients, model, usual, members, scale).max())

    limit, own = CLEARLY_WORSE * gained(sent, scale), gained(stack([observed]), scale)
    if own <= limit:
        return []
    with_another = scale is not None and gained(stack([observed]), None) <= limit
    cause = (
        "with another scale of the loss they do"
        if with_another
        else "is it accumulated with a clip after each step, a mean of ranks of unequal size, of a "
        "loss with class weights or label smoothing, or of another number of images"
    )
    return [
        f"no {members} equally weighted images explain the last layer's gradient: others explain "
        f"{own:.1%} more of it, where public batches leave {limit / CLEARLY_WORSE:.1%} at most; "
        f"{cause}"
    ]


def replica_doubts(case: Case) -> list[str]:
    """Tries whether the replica gives what the client sends, but for the declared noise.

    It guards against a user's own step that is random without saying so, or is replicated badly.
    """
    own = [step for step in case.defense.steps if is_own(step)]
    if any(step.stochastic for step in own):
        return [f"the likelihood of {own[0]} is taken on trust"]
    without = case.defense.noiseless()
    if not without.steps or not without.likelihood.is_known() or without.randomness.is_random():
        return []
    matching, trials = case.matching(without), CLIENT_TRIALS if case.members <= MANY else 1
    images, labels = case.reference.sets(trials, case.members)
    contexts = case.contexts("replica trial", range(len(labels)))
    sent = DeclaredClient(matching.clients, without, case.reference).send(images, labels, contexts)
    replicas = matching.replicas(images, labels, sent)
    for index in range(len(labels)):
        observed = take(sent, index)
        away = float(relative_l2(take(replicas, index), observed))
        if bool(norm(observed) > 0) and not away <= REPLICA_IS_CLOSE:
            return [
                f"the attacker's replica of {without} does not give what the client sends "
                f"(relative distance {away:.2g}), so better matching may identify more"
            ]
    return []
