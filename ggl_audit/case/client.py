"""The client that canaries' gradients are made by."""

from __future__ import annotations

import functools

from ggl_audit.client.clients import Client, DeclaredClient, OwnClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.inputs.factories import find_callable
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

NOT_ONE_STEP = Message(
    "client/not-one-step",
    "a cohort or an update is not made by one step of the client's own code",
    advice="Leave out `client`, or audit the gradient of one client's step.",
)
OTHER_BATCH_SIZE = Message(
    "client/other-batch-size",
    "{batch_size}, but the capture is of {images} images",
    advice="Set `client.batch_size` to `capture.batch_size`, or leave it out.",
)
COMPANIONS_STAY_IN = Message(
    "client/companions-stay-in",
    "{batch_size}, but {defense} ends in a step after the noise, and what the companions add "
    "cannot be taken out again",
    advice="Set `client.batch_size` to 1.",
)


def client_of(spec: Spec, model: ClientModel, defense: Pipeline, reference: ImageSet) -> Client:
    """Who sends the canaries' gradients: this tool as declared, or the client's own code.

    Raises:
        SpecError: the client's own code cannot be had, or does not make such a capture.
    """
    clients = ClientGradients(model, defense, spec.memory_bytes)
    if spec.client is None:
        return DeclaredClient(clients, defense, reference)
    if defense.aggregation.clients > 1 or spec.capture.kind == "update":
        raise SpecError(("client",), NOT_ONE_STEP())
    if spec.capture.batch_size > 1 and spec.client.batch_size not in (1, spec.capture.batch_size):
        raise SpecError(
            ("client", "batch_size"),
            OTHER_BATCH_SIZE(batch_size=spec.client.batch_size, images=spec.capture.batch_size),
        )
    step = find_callable(spec.client.step, spec.folder, ("client", "step"))
    several = spec.capture.batch_size > 1
    client = OwnClient(
        step=functools.partial(step, **spec.client.kwargs),
        clients=clients,
        defense=defense,
        companions=reference,
        batch_size=spec.capture.batch_size if several else spec.client.batch_size,
        averaged=not model.loss_sum
        if several
        else spec.guarantee is not None and spec.guarantee.reduction == "mean",
        ignored=[one.name for one in spec.capture.ignored],
    )
    if not several and client.batch_size > 1 and not defense.randomness.leaves_only_noise():
        raise SpecError(
            ("client", "batch_size"),
            COMPANIONS_STAY_IN(batch_size=client.batch_size, defense=defense),
        )
    return client
