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
from ggl_audit.messages import Message, Said
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

LEAVE_OUT_OR_IGNORE = (
    "Leave them out of what is sent. If the file has them and the client does not send them, or "
    "they are no secret, say so in `capture.ignored`. A tensor with something beyond what is "
    "shown of its storage is a slice of a larger one, all of which `torch.save` writes: save "
    "`tensor.clone()`."
)
SENT_BESIDE = Message(
    "doubt/sent-beside",
    "the capture holds {kind} ({names}), which were sent and are not measured: if they tell "
    "nothing, say why in capture.ignored",
    advice=LEAVE_OUT_OR_IGNORE,
)
CLIENT_SENDS_BESIDE = Message(
    "doubt/client-sends-beside",
    "the client's own code sends {kind} ({names}), which were sent and are not measured: if they "
    "tell nothing, say why in capture.ignored",
    advice=LEAVE_OUT_OR_IGNORE,
)
STATISTICS_UNSAID = Message(
    "doubt/statistics-unsaid",
    "in train mode the client's running statistics ({names}) hold what the images do to them, and "
    "whether they were sent is not said: declare capture.unsent for them if they never are",
    advice='Capture all that is sent, or declare `capture.unsent: ["*running*"]`.',
)
STATISTICS_IN_THE_CLEAR = Message(
    "doubt/statistics-in-the-clear",
    "the guarantee does not cover the running statistics, sent in the clear",
    advice="Do not send them, or clip and noise them with the rest (`over: everything`).",
)
CAPTURE_LACKS = Message(
    "doubt/capture-lacks",
    "the capture lacks {names}, which capture.unsent does not declare: a client that sends them "
    "gives more away",
    advice="Declare `capture.unsent` if no client ever sends them; else capture them.",
)
UNSENT_CHANGE = Message(
    "doubt/unsent-change",
    "parameters that are not sent change in local training, which is replayed without that",
    advice="Capture the whole update, or one step.",
)
UNSENT_IN_NORM = Message(
    "doubt/unsent-in-norm",
    "parameters that are not sent may count in the norm that local training clips, which is "
    "replayed without them",
    advice="Capture the whole update, or train without `clip_norm`.",
)
OPTIMIZER_REMEMBERS = Message(
    "doubt/optimizer-remembers",
    "the optimizer goes on with its state of earlier rounds, and is replayed as if it began afresh",
    advice="Capture a round in which the optimizer is made anew (most frameworks do so in each), "
    "or the gradient of a step.",
)
OTHER_COUNT = Message(
    "doubt/other-count",
    "{name} went up by {count:g}, and by {declared:g} as declared",
    advice="Correct `capture.local` (epochs, batch_size) and `capture.batch_size`; or the count "
    "is of earlier rounds: `model.weights` of the round has it.",
)
CANARIES_SHARE_A_MEAN = Message(
    "doubt/canaries-share-a-mean",
    "canaries share a mean over {count} images with others, which hides them better than the "
    "captured gradient of one image is hidden",
    advice="Capture a batch of that size (`capture.batch_size`), or set `client.batch_size` to 1.",
)
CLIENT_CONTRADICTS = Message(
    "doubt/client-contradicts",
    "the client's own code contradicts {step}: {detail}",
    advice="Compare the step in your code with its declaration.",
)
BATCH_CANNOT_BE_CHECKED = Message(
    "doubt/batch-cannot-be-checked",
    "whether the client's own code does {defense} to a batch cannot be checked",
    advice="Set `client.batch_size` and `capture.batch_size` to 1, where the step can be seen.",
)
OTHER_SCALE = Message(
    "doubt/other-scale",
    "no {count} equally weighted images explain the last layer's gradient: others explain "
    "{gain:.1%} more of it, where public batches leave {limit:.1%} at most; with another scale of "
    "the loss they do",
    advice="Find the factor in the client's code (a loss multiplied by the number of ranks, a sum "
    "for a mean), and declare it in `model.loss`.",
)
UNEQUAL_WEIGHTS = Message(
    "doubt/unequal-weights",
    "no {count} equally weighted images explain the last layer's gradient: others explain "
    "{gain:.1%} more of it, where public batches leave {limit:.1%} at most; is it accumulated "
    "with a clip after each step, a mean of ranks of unequal size, of a loss with class weights "
    "or label smoothing, or of another number of images",
    advice="Clip once, after all backward passes; weigh ranks by their images; declare "
    "`model.loss.weight`, `label_smoothing` and `capture.batch_size`; or declare "
    "`capture.labels`, if they are known.",
)
TAKEN_ON_TRUST = Message(
    "doubt/taken-on-trust",
    "the likelihood of {step} is taken on trust",
    advice="Nothing can be done for a random defense of your own; its ceiling is a lower bound of "
    "what leaks.",
)
REPLICA_DIFFERS = Message(
    "doubt/replica-differs",
    "the attacker's replica of {defense} does not give what the client sends (relative distance "
    "{distance:.2g}), so better matching may identify more",
    advice="Let `replicate` of your own defense give what `apply` gives, and declare `stochastic "
    "= True` if it draws at random.",
)


def capture_doubts(
    fitted: FittedGradient, spec: Spec, model: ClientModel, defense: Pipeline
) -> list[Said]:
    """What was sent, or may have been, and is not measured."""
    local = spec.capture.local
    doubts = beside_doubts(fitted.beside, model, defense, SENT_BESIDE)
    silent = fitted.beside.silent
    if silent:
        more = ", ..." if len(silent) > 1 else ""
        doubts.append(STATISTICS_UNSAID(names=silent[0] + more))
    if spec.guarantee is not None and defense.clear.names:
        doubts.append(STATISTICS_IN_THE_CLEAR())
    if fitted.unsent:
        more = f" and {len(fitted.unsent) - 1} more" if len(fitted.unsent) > 1 else ""
        doubts.append(CAPTURE_LACKS(names=fitted.unsent[0] + more))
    trained = [name for name, _ in model.module.named_parameters() if name in model.unsent]
    if trained and local is not None and local.steps(spec.capture.batch_size) > 1:
        doubts.append(UNSENT_CHANGE())
    if spec.capture.unsent and local is not None and local.clip_norm is not None:
        doubts.append(UNSENT_IN_NORM())
    if local is not None and local.remembers and not local.fresh:
        doubts.append(OPTIMIZER_REMEMBERS())
    return doubts


def beside_doubts(
    beside: Beside, model: ClientModel, defense: Pipeline, message: Message
) -> list[Said]:
    """What was sent beside the gradient and cannot be computed from images.

    Args:
        beside: what was sent.
        model: the client's.
        defense: as declared.
        message: says that something holds so many names of a kind.
    """
    doubts = [
        message(
            kind=kind, names=f"{names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''}"
        )
        for kind, names in beside.unmeasured.items()
    ]
    counts = {} if defense.clear.is_over_everything else beside.counts
    declared = _declared_counts(model, defense, tuple(counts)) if counts else {}
    wrong = [name for name, change in counts.items() if float(change) != float(declared[name])]
    if wrong:
        name, *_ = wrong
        count, as_declared = -float(counts[name]), -float(declared[name])
        doubts.append(OTHER_COUNT(name=name, count=count, declared=as_declared))
    return doubts


def _declared_counts(model: ClientModel, defense: Pipeline, names: tuple[str, ...]) -> Gradient:
    """What local training as declared changes counts of batches by, before less after."""
    counting = replace(model, statistics=Statistics(model.normalizations, names))
    clients = ClientGradients(counting, Pipeline(defense.steps, counting))
    images = torch.rand(1, model.batch_size, *model.shape, device=model.device)
    labels = torch.zeros(1, model.batch_size, dtype=torch.long, device=model.device)
    return take(clients.gradients(images, labels), 0)


def client_doubts(case: Case) -> list[Said]:
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
    sent_too = beside_doubts(beside, model, defense, CLIENT_SENDS_BESIDE)
    if sent_too:
        return sent_too
    if spec.capture.batch_size > 1:
        return _batch_doubts(client, defense, reference, spec.seed)
    images, labels = reference.images[:CLIENT_TRIALS], reference.labels[:CLIENT_TRIALS]
    contexts = client_contexts(spec.seed, "client trials", model.device, range(len(labels)))
    sent = client.send(images[:, None], labels[:, None], contexts)
    if client.averaged and client.batch_size > 1:
        return [CANARIES_SHARE_A_MEAN(count=client.batch_size)]
    for index, image in enumerate(images):
        one = take(sent, index)
        checks = defense.checks.verify(one)
        if defense.randomness.leaves_only_noise():
            told = None if client.clients.model.targets is None else labels[index, None]
            others = reference.images[1:]
            checks.append(check_truth(case.matching(), defense, one, image, others, told))
        wrong = [check for check in checks if check.outcome == "contradicts"]
        if wrong:
            return [CLIENT_CONTRADICTS(step=wrong[0].step, detail=wrong[0].detail)]
    return []


def _batch_doubts(
    client: OwnClient, defense: Pipeline, reference: ImageSet, seed: int
) -> list[Said]:
    if not defense.randomness.leaves_only_noise():
        return [BATCH_CANNOT_BE_CHECKED(defense=defense)]
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
            return [CLIENT_CONTRADICTS(step=check.step, detail=check.detail)]
    return []


def label_doubts(case: Case, observed: Gradient) -> list[Said]:
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
    doubt = OTHER_SCALE if with_another else UNEQUAL_WEIGHTS
    return [doubt(count=members, gain=own, limit=limit / CLEARLY_WORSE)]


def replica_doubts(case: Case) -> list[Said]:
    """Tries whether the replica gives what the client sends, but for the declared noise.

    It guards against a user's own step that is random without saying so, or is replicated badly.
    """
    own = [step for step in case.defense.steps if is_own(step)]
    if any(step.stochastic for step in own):
        return [TAKEN_ON_TRUST(step=own[0])]
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
            return [REPLICA_DIFFERS(defense=without, distance=away)]
    return []
