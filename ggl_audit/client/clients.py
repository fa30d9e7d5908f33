"""What clients send: by the declaration, or by the client's own code."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ggl_audit.basics.device import CPU, seed_device
from ggl_audit.basics.gradient import Gradient, concatenate, each, stack, take, unstack
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Context, Pipeline
from ggl_audit.errors import AuditError, SpecError, raised
from ggl_audit.inputs.capture import FittedGradient, fit_capture
from ggl_audit.inputs.images import ImageSet
from ggl_audit.messages import Message, Said

Step = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Any]
"""The client's own training step: from (model, images, labels or targets) to what it sends."""

REFERENCE_IS_NOT_FINITE = Message(
    "client/reference-is-not-finite",
    "the gradient of {name} on a reference image is NaN or infinite",
    "Look at the model's weights and at model.input.mean and std.",
    advice="Look at the weights and at `model.input.mean` and `std`.",
)
LACKS_STATISTICS = Message(
    "client/lacks-statistics",
    "returned no {name!r}, which the capture has",
    advice="Return the running statistics after the step too, as the client sends them.",
)
STEP_FAILS = Message(
    "client/step-fails",
    "failed with {error}",
    advice="Mend the step; it is called as `step(model, images, labels, **client.kwargs)`, with "
    "normalized images.",
)
NO_TENSORS = Message(
    "client/no-tensors",
    "returned a {kind}; expected tensors by parameter name",
    advice="Return a dict from the names of `model.named_parameters()` to tensors.",
)
LACKS_PARAMETERS = Message(
    "client/lacks-parameters",
    "returned no {name!r}",
    "Declare capture.unsent where some parameters are never sent.",
    advice="Return every trained parameter, or declare `capture.unsent`.",
)


class Client(Protocol):
    """Whose gradients are audited."""

    @property
    def own_code(self) -> OwnClient | None:
        """The client as one that runs its own code; None where it does what was declared."""
        ...

    def send(
        self, images: torch.Tensor, labels: torch.Tensor, contexts: Sequence[Context]
    ) -> Gradient:
        """What the attacker sees of n releases, each made on its own.

        Args:
            images: (n, k, channels, height, width) in [0, 1].
            labels: (n, k).
            contexts: the clients' randomness in each of the n releases.

        Returns:
            Tensors with a leading dimension n.

        Raises:
            AuditError: a value is NaN or infinite, or the client's own code fails.
        """
        ...


@dataclass(frozen=True)
class DeclaredClient:
    """Clients that do what was declared, as this tool does it.

    Attributes:
        clients: compute their gradients.
        defense: what they apply.
        history: the images that a client's earlier rounds are made up of, where the defense carries
            something over from them.
    """

    clients: ClientGradients
    defense: Pipeline
    history: ImageSet | None = None

    @property
    def own_code(self) -> OwnClient | None:
        """None."""
        return None

    def send(
        self, images: torch.Tensor, labels: torch.Tensor, contexts: Sequence[Context]
    ) -> Gradient:
        """The declared defense on what each client computes."""
        batch_size = self.clients.model.batch_size
        images = images.reshape(-1, batch_size, *self.clients.model.shape)
        labels = labels.reshape(-1, batch_size)
        cohort = len(labels) // len(contexts)
        drawn = concatenate([self.clients.draw(context, cohort) for context in contexts])
        computed = unstack(self.clients.gradients(images, labels, drawn))
        of_each = [context for context in contexts for _ in range(cohort)]
        of_each = [
            replace(context, images=own, drawn=take(drawn, i), earlier=self._earlier(context))
            for i, (context, own) in enumerate(zip(of_each, images, strict=True))
        ]
        sent = stack(
            [
                self.defense.release(computed[i : i + cohort], of_each[i : i + cohort])
                for i in range(0, len(computed), cohort)
            ]
        )
        for name, tensor in sent.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AuditError(REFERENCE_IS_NOT_FINITE(name=name))
        return sent

    def _earlier(self, context: Context) -> list[Gradient]:
        rounds = self.defense.earlier_rounds
        if rounds == 0:
            return []
        assert self.history is not None
        shape, generator = (rounds, self.clients.model.batch_size), context.generator
        drawn = torch.randint(
            len(self.history), shape, generator=generator, device=generator.device
        )
        return unstack(
            self.clients.gradients(self.history.images[drawn], self.history.labels[drawn])
        )


@dataclass(frozen=True)
class OwnClient:
    """A client that runs its own code.

    In a batch the image has companions, which the attacker knows, as differential privacy allows
    him to (the informed adversary of Balle, Cherubin and Hayes, S&P 2022). Their share, as it would
    be under the declaration, is taken out, so that what is left is as if sent for the image alone.

    Attributes:
        step: the client's code.
        clients: compute gradients of its model.
        defense: as declared.
        companions: the images that companions are drawn from.
        batch_size: images in a step.
        averaged: whether the step sends a mean over the batch, and not a sum.
        always_the_same: whether the companions are drawn once for all, from the first of them.
        ignored: names or patterns of what it sends beside the trained parameters and is left out.
    """

    step: Step
    clients: ClientGradients
    defense: Pipeline
    companions: ImageSet
    batch_size: int
    averaged: bool
    always_the_same: bool = False
    ignored: Sequence[str] = ()

    @property
    def own_code(self) -> OwnClient | None:
        """Itself."""
        return self

    def send(
        self, images: torch.Tensor, labels: torch.Tensor, contexts: Sequence[Context]
    ) -> Gradient:
        """What the client's own code sends: for each set, or each image less its companions."""
        releases = zip(images, labels, contexts, strict=True)
        send_one = self._step if labels.shape[1] == self.batch_size else self._among_companions
        return stack([send_one(*release) for release in releases])

    def _among_companions(
        self, images: torch.Tensor, labels: torch.Tensor, context: Context
    ) -> Gradient:
        generator = context.generator
        drawn = torch.arange(self.batch_size - 1, device=generator.device)
        if not self.always_the_same:
            drawn.random_(0, len(self.companions), generator=generator)
        others, other_labels = self.companions.images[drawn], self.companions.labels[drawn]
        images, labels = torch.cat([images, others]), torch.cat([labels, other_labels])
        gradient = self._step(images, labels, context)
        factor = self.batch_size if self.averaged else 1
        gradients = self.clients.gradients(others, other_labels)
        shares = stack(
            [
                self.defense.without_noise(take(gradients, i), context)
                for i in range(self.batch_size - 1)
            ]
        )
        known = each(lambda tensor: tensor.sum(0), shares)
        return {name: factor * tensor - known[name] for name, tensor in gradient.items()}

    def _step(self, images: torch.Tensor, labels: torch.Tensor, context: Context) -> Gradient:
        statistics = self.clients.model.statistics
        fitted = self.fitted(images, labels, context)
        if statistics is None:
            return fitted.gradient
        changes = {**fitted.beside.statistics, **fitted.beside.counts}
        for name in statistics.names:
            if name not in changes:
                raise _fault(LACKS_STATISTICS(name=name))
        sent = {name: statistics.unit * changes[name] for name in statistics.names}
        return {**fitted.gradient, **sent}

    def fitted(
        self, images: torch.Tensor, labels: torch.Tensor, context: Context
    ) -> FittedGradient:
        """What the client's own code sends for one set of images, fitted to the model."""
        model, generator = self.clients.model, context.generator
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(), _other_randomness(seed):
            for device in {CPU, model.device}:
                seed_device(device, seed)
            try:
                targets = model.targets_of(labels)
                sent = self.step(model.as_received(), model.normalize(images), targets)
            except (Exception, SystemExit) as error:
                # Whatever the user's own code raises is a fault in the input.
                raise _fault(STEP_FAILS(error=raised(error))) from error
        if not isinstance(sent, dict) or not all(
            isinstance(t, torch.Tensor) for t in sent.values()
        ):
            raise _fault(NO_TENSORS(kind=type(sent).__name__))
        # What the client's code returns is of this model; capture.layout is of a file.
        here = replace(model, arrangements=None)
        ignored = [pattern for pattern in self.ignored if fnmatch.filter(sent, pattern)]
        fitted = fit_capture({n: t.detach() for n, t in sent.items()}, here, _fault, ignored)
        if fitted.unsent:
            raise _fault(LACKS_PARAMETERS(name=fitted.unsent[0]))
        return fitted


@contextmanager
def _other_randomness(seed: int) -> Iterator[None]:
    """Seeds what a client's code may draw from besides PyTorch, and leaves it as it was."""
    # Their generators are global ones, so that is what has to be seeded.
    ours, theirs = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)  # noqa: NPY002


def _fault(said: Said) -> SpecError:
    call = "It is called as step(model, images, labels, **client.kwargs), images normalized."
    told = said if said.remedy else said.advising(call)
    return SpecError(("client", "step"), told.after("the client's code "))
