"""What clients compute from images, in batches that fit the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.func import vmap

from ggl_audit.basics.environment import is_out_of_memory
from ggl_audit.basics.gradient import Gradient, concatenate, each, take, unstack
from ggl_audit.client.contribution import Contribution
from ggl_audit.defenses import Context, Drawn, Pipeline, relative_l2
from ggl_audit.errors import SpecError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message

MEMORY = 256 * 2**20
"""Bytes held at a time; what takes more is taken in chunks."""

COPIES_OF_A_GRADIENT = 4
"""The gradient, its replica, the difference and its square, while a chunk is worked on."""

BYTES_OF_A_VALUE = 4

ROUNDING = 1e-6
"""The rounding of a sum of gradients on any hardware, squared and relative."""

Method = TypeVar("Method", bound=Callable[..., Any])

NOT_FOR_MANY = Message(
    "model/not-for-many",
    "the model cannot be evaluated for many candidates at a time ({reason})",
    "torch.func.vmap needs a forward pass without data-dependent branches, random draws, or "
    "buffers that it changes.",
    advice="Write the forward pass without branches on values, `.item()` and changes in place, "
    "which `torch.func.vmap` cannot map.",
)


def in_less_memory(method: Method) -> Method:
    """Tries a method again with half the chunks where memory runs out.

    Its object says by ``halve_chunks`` whether there is any less.
    """

    @functools.wraps(method)
    def tried(self: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return method(self, *args, **kwargs)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self.halve_chunks():
                    raise

    return tried  # type: ignore[return-value]


class ClientGradients:
    """Computes clients' gradients, and knows how many of them may be held at a time.

    The memory belongs to it alone: whoever holds gradients asks it for :meth:`room`.

    Args:
        model: the clients' model, and how it is trained.
        defense: what they apply; here what acts before there is a gradient.
        memory: bytes that gradients may take at a time, about. Where the device has fewer, the
            chunks are halved until they fit.
    """

    def __init__(self, model: ClientModel, defense: Pipeline, memory: int = MEMORY) -> None:
        self.model = model
        self.defense = defense
        self.memory = memory
        self.chunk = max(1, self.room(COPIES_OF_A_GRADIENT))
        self._contribution = Contribution(model, defense)
        self._shares = vmap(self._contribution)

    def room(self, copies: int = 1) -> int:
        """How many gradients may be held at a time, of each of which there are so many copies."""
        return self.memory // (copies * BYTES_OF_A_VALUE * self.model.size)

    def halve_chunks(self) -> bool:
        """Takes half as many gradients at a time; False where that is one already."""
        most, self.chunk = self.chunk, max(1, self.chunk // 2)
        return most > 1

    @property
    def share(self) -> float:
        """What an image's own gradient is multiplied by in that of its client."""
        return 1 if self.model.loss_sum else 1 / self.model.batch_size

    @functools.cached_property
    def adds_up(self) -> bool:
        """Whether a client's gradient is the sum of what its images add, tried on random ones.

        It is not where images are trained on one after the other, share the statistics of a batch,
        are mixed with each other or weighed against each other.
        """
        count = self.model.batch_size
        if count == 1:
            return True
        if self.model.criterion.adds_up is False:
            return False
        random = torch.Generator().manual_seed(0)
        images = torch.rand(count, *self.model.shape, generator=random).to(self.model.mean)
        labels = torch.linspace(0, self.model.classes - 1, count, device=self.model.device)
        labels = labels.round().long()  # as different as they can be
        whole = take(self.gradients(images[None], labels[None]), 0)
        try:
            own = self.gradients(images, labels)
        except (Exception, SystemExit):
            return False  # the user's own code, or batch norm, does not take one image alone
        total = each(lambda tensor: self.share * tensor.sum(0), own)
        return float(relative_l2(total, whole)) < ROUNDING

    def draw(self, context: Context, clients: int) -> Drawn:
        """What each of several clients draws before it begins, with a leading dimension."""
        drawn = [
            self._contribution.draw(context, self.model.batch_size) for _ in range(max(clients, 1))
        ]
        return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}

    @in_less_memory
    def gradients(
        self, images: torch.Tensor, labels: torch.Tensor, drawn: Drawn | None = None
    ) -> Gradient:
        """What each of n clients computes, before the defense of the whole.

        Args:
            images: (n, B, channels, height, width) in [0, 1], or without B for one image each.
            labels: (n, B) or (n,).
            drawn: with a leading dimension n; guessed blindly unless given.

        Returns:
            Tensors with a leading dimension n, in the model's order.
        """
        if labels.ndim == 1:
            images, labels = images[:, None], labels[:, None]
        if drawn is None:
            blind = self.defense.replica.blind_guess()
            drawn = {
                name: tensor.expand(len(labels), *tensor.shape) for name, tensor in blind.items()
            }
        parts: list[Gradient] = []
        for start in range(0, len(labels), self.chunk):
            part = slice(start, start + self.chunk)
            mine = {name: tensor[part] for name, tensor in drawn.items()}
            with torch.no_grad():
                parts.append(self._shares(images[part], labels[part], mine))
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def each_gradient(self, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Gradient]:
        """What :meth:`gradients` computes, client by client, no more of them held than fit."""
        for start in range(0, len(labels), self.chunk):
            part = slice(start, start + self.chunk)
            yield from unstack(self.gradients(images[part], labels[part]))

    def try_out(self) -> None:
        """Evaluates two candidates, to find out whether the model can be mapped over.

        Raises:
            SpecError: it cannot.
        """
        images = torch.rand(2, self.model.batch_size, *self.model.shape, device=self.model.device)
        labels = torch.zeros(2, self.model.batch_size, dtype=torch.long, device=self.model.device)
        try:
            self.gradients(images, labels)
        except (Exception, SystemExit) as error:
            # The forward pass is the user's own code.
            raised = error.__cause__ or error if isinstance(error, SpecError) else error
            reason = (str(raised).strip() or type(raised).__name__).splitlines()[0]
            raise SpecError(("model", "factory"), NOT_FOR_MANY(reason=reason)) from None
