"""Are the capture, the client's own code and the attacker's replica what they are taken for?

The last two are tried on a few public images. What is found wrong is a doubt about a low ceiling.
"""

from __future__ import annotations

from ggl_audit.attack.matching import Matching
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.defenses import Context, Pipeline, is_own, relative_l2
from ggl_audit.evidence.consistency import check_remainder, check_truth
from ggl_audit.gradient import norm, take
from ggl_audit.inputs.capture import Capture
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.randomness import client_context
from ggl_audit.spec import Spec

CLIENT_TRIALS = 3
REPLICA_IS_CLOSE = 0.05
"""Squared and relative, for a release without noise."""

MANY = 16
"""Images of a release, of which more are tried only once."""


def capture_doubts(captured: Capture, spec: Spec) -> list[str]:
    """What of the parameters that are not in the capture may make a client's release larger."""
    local = spec.capture.local
    doubts = []
    if captured.unsent:
        more = f" and {len(captured.unsent) - 1} more" if len(captured.unsent) > 1 else ""
        doubts.append(
            f"the capture lacks {captured.unsent[0]}{more}, which capture.unsent does not declare: "
            "a client that sends them gives more away"
        )
    if spec.capture.unsent and local is not None and local.steps(spec.capture.batch_size) > 1:
        doubts.append(
            "parameters that are not sent change in local training, which is replayed without that"
        )
    return doubts


def client_doubts(client: Client, spec: Spec, defense: Pipeline, reference: ImageSet) -> list[str]:
    """Compares what the client's own code sends for a few images with the declaration.

    Raises:
        SpecError: the code does not run or does not return a gradient.
    """
    if not isinstance(client, OwnClient):
        return []
    context = client_context(spec.seed, "client trial", client.matching.model.device)
    if spec.capture.batch_size > 1:
        return _batch_doubts(client, defense, reference, context)
    images, labels = reference.images[:CLIENT_TRIALS], reference.labels[:CLIENT_TRIALS]
    sent = client.send(images, labels, context)
    if client.averaged and client.batch_size > 1:
        return [
            f"canaries share a mean over {client.batch_size} images with others, which hides them "
            "better than the captured gradient of one image is hidden"
        ]
    for index, image in enumerate(images):
        one = take(sent, index)
        checks = defense.verify(one)
        if defense.leaves_only_noise():
            told = None if client.matching.model.targets is None else labels[index, None]
            others = reference.images[1:]
            checks.append(check_truth(client.matching, defense, one, image, others, told))
        wrong = [check for check in checks if check.outcome == "contradicts"]
        if wrong:
            return [f"the client's own code contradicts {wrong[0].step}: {wrong[0].detail}"]
    return []


def _batch_doubts(
    client: OwnClient, defense: Pipeline, reference: ImageSet, context: Context
) -> list[str]:
    if not defense.leaves_only_noise():
        return [f"whether the client's own code does {defense} to a batch cannot be checked"]
    images, labels = reference.sets(CLIENT_TRIALS, client.batch_size)
    sent = client.send(images, labels, context)
    replicas = client.matching.replicas(images, labels, sent)
    for index in range(CLIENT_TRIALS):
        check = check_remainder(defense, take(replicas, index), take(sent, index))
        if check.outcome == "contradicts":
            return [f"the client's own code contradicts {check.step}: {check.detail}"]
    return []


def replica_doubts(
    model: ClientModel, defense: Pipeline, spec: Spec, reference: ImageSet
) -> list[str]:
    """Tries whether the replica gives what the client sends, but for the declared noise.

    It guards against a user's own step that is random without saying so, or is replicated badly.
    """
    own = [step for step in defense.steps if is_own(step)]
    if any(step.stochastic for step in own):
        return [f"the likelihood of {own[0]} is taken on trust"]
    without = defense.noiseless()
    if not without.steps or not without.has_likelihood() or without.is_random():
        return []
    matching = Matching(model, without)
    members = model.batch_size * defense.aggregation.clients
    images, labels = reference.sets(CLIENT_TRIALS if members <= MANY else 1, members)
    context = client_context(spec.seed, "replica trial", model.device)
    sent = DeclaredClient(matching, without, reference).send(images, labels, context)
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
