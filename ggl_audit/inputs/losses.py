"""The loss that a client trains with: a cross-entropy, or one of the client's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ggl_audit.errors import Key, ReasonError, SpecError, raised
from ggl_audit.inputs.factories import FAILS, find_callable
from ggl_audit.messages import Message
from ggl_audit.spec import LossSpec

KEY: Key = ("model", "loss")

HeadError = Literal["lowest", "negative"]
"""What tells the label in the error of one image's logits: the lowest entry, or each negative one.
"""

DECLARE_THE_LOSS = (
    "Declare the loss that the client trains with, and give `evidence.reference` labels of the "
    "shape that it takes."
)
NEEDS_LOGITS = Message(
    "loss/needs-logits",
    "logits (n, classes), 2 classes or more",
    advice=DECLARE_THE_LOSS,
)
NEEDS_ONE_LOGIT = Message(
    "loss/needs-one-logit",
    "one logit an image for class indices 0 and 1, or reference labels (n, logits)",
    advice=DECLARE_THE_LOSS,
)
NO_SCALAR = Message(
    "loss/no-scalar",
    "{name} returned {found}; expected a scalar tensor for the batch",
    advice="Return one number for the batch, reduced by its mean or sum.",
)
CANNOT_BE_CALLED = Message(
    "loss/cannot-be-called",
    "{callable} cannot be called",
    advice="Name a function of outputs and targets, or a class whose objects are called so.",
)


class Criterion(Protocol):
    """A loss, its reduction and scale included."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar.

        Args:
            outputs: (n, ...), what the model gives.
            targets: (n,) class indices, or (n, ...) as the loss takes them.
        """
        ...

    def classes(self, outputs: torch.Tensor) -> int:
        """How many classes labels tell apart, where targets are class indices.

        Raises:
            ValueError: the outputs are not those of a classifier; says what is expected.
        """
        ...

    def mixable(self, labels: torch.Tensor, classes: int) -> torch.Tensor | None:
        """Class indices (n,) as targets (n, ...) that may be averaged; None if it takes no such."""
        ...

    @property
    def shows(self) -> HeadError | None:
        """What tells a single image's label in the gradient of a linear head, None if nothing."""
        ...

    @property
    def counts(self) -> bool:
        """Whether the gradient of a linear head counts the labels of several images."""
        ...

    @property
    def adds_up(self) -> bool | None:
        """Whether the loss of a batch is the sum, or the mean, of those of images; None unknown."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy, as ``torch.nn.functional.cross_entropy`` has it.

    Attributes:
        reduction: over the batch and, for segmentation, over pixels.
        scale: multiplies it.
        label_smoothing: the share of the target that all classes have equally.
        weight: (classes,); with ``mean`` the sum is divided by the weights of the batch's classes.
    """

    reduction: str = "mean"
    scale: float = 1.0
    label_smoothing: float = 0.0
    weight: torch.Tensor | None = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See :class:`Criterion`; targets (n, ...) indices, or probabilities like the outputs."""
        weight = None if self.weight is None else self.weight.to(outputs)
        return self.scale * F.cross_entropy(
            outputs, targets, weight, reduction=self.reduction, label_smoothing=self.label_smoothing
        )

    def classes(self, outputs: torch.Tensor) -> int:
        """The number of logits."""
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ReasonError(NEEDS_LOGITS())
        return outputs.shape[1]

    def mixable(self, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """Probabilities."""
        return F.one_hot(labels, classes)

    @property
    def shows(self) -> HeadError | None:
        """The error is p - y, with label smoothing of a confident image's label positive too."""
        return "lowest" if self.label_smoothing == 0 else None

    @property
    def counts(self) -> bool:
        """The errors of equally weighted images sum to predictions less counts."""
        return self.label_smoothing == 0 and self.weight is None

    @property
    def adds_up(self) -> bool:
        """A mean with weights is over the weights of the batch's own classes."""
        return self.weight is None or self.reduction == "sum"


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of logits: one for two classes, or one for each of several labels.

    Attributes:
        reduction: over the batch and its logits.
        scale: multiplies it.
        pos_weight: (logits,), multiplies the loss where the target is 1.
    """

    reduction: str = "mean"
    scale: float = 1.0
    pos_weight: torch.Tensor | None = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See :class:`Criterion`; targets of 0 to 1, one for each logit."""
        if outputs.numel() == targets.numel():
            targets = targets.reshape(outputs.shape)
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(outputs)
        return self.scale * F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), pos_weight=pos_weight, reduction=self.reduction
        )

    def classes(self, outputs: torch.Tensor) -> int:
        """Two."""
        if outputs[0].numel() != 1:
            raise ReasonError(NEEDS_ONE_LOGIT())
        return 2

    def mixable(self, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """Probabilities of class 1."""
        return labels

    @property
    def shows(self) -> HeadError | None:
        """The error is p - y for each logit, negative where the target is 1."""
        return "negative"

    @property
    def counts(self) -> bool:
        """No: how much one image weighs against another is not known."""
        return False

    @property
    def adds_up(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True)
class OwnLoss:
    """A function of the client's own.

    Attributes:
        function: from outputs and targets to a scalar; it does its own reduction.
        name: for messages.
        scale: multiplies it.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    name: str
    scale: float = 1.0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See :class:`Criterion`."""
        loss = self.function(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ReasonError(NO_SCALAR(name=self.name, found=found))
        return self.scale * loss.reshape(())

    def classes(self, outputs: torch.Tensor) -> int:
        """The second dimension of the outputs, 2 where they have none or of one: at most so many.

        Some may be no logits, so the labels of public images count where there are any.
        """
        return max(2, outputs.shape[1]) if outputs.ndim > 1 else 2

    def mixable(self, labels: torch.Tensor, classes: int) -> None:
        """Not known."""
        return

    @property
    def shows(self) -> HeadError | None:
        """Not known."""
        return None

    @property
    def counts(self) -> bool:
        """Not known."""
        return False

    @property
    def adds_up(self) -> bool | None:
        """Not known."""
        return None


def build_criterion(
    spec: LossSpec,
    folder: Path,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Criterion:
    """Makes the declared loss.

    Args:
        spec: declares it.
        folder: the folder of the spec, where a file of the client's own code is.
        device: where the tensors of the client's own module are to be.
        dtype: of its floating-point tensors.

    Raises:
        SpecError: the client's own is not there, or cannot be made.
    """
    if spec.factory is not None:
        function = _own_function(spec, folder)
        if isinstance(function, nn.Module):
            function.to(device=device, dtype=dtype)
        return OwnLoss(function, spec.factory, spec.scale)
    if spec.name == "binary_cross_entropy":
        pos_weight = None if spec.pos_weight is None else torch.tensor(spec.pos_weight)
        return BinaryCrossEntropy(spec.reduction, spec.scale, pos_weight)
    weight = None if spec.weight is None else torch.tensor(spec.weight)
    return CrossEntropy(spec.reduction, spec.scale, spec.label_smoothing, weight)


def _own_function(
    spec: LossSpec, folder: Path
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    assert spec.factory is not None
    named = find_callable(spec.factory, folder, (*KEY, "factory"))
    if not isinstance(inspect.unwrap(named), type):
        return functools.partial(named, **spec.kwargs)
    try:
        made = named(**spec.kwargs)
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a fault in the input.
        how = f"A class is made with model.loss.kwargs, here {spec.kwargs or 'none'}."
        failed = FAILS(callable=spec.factory, error=raised(error), how=how)
        raise SpecError((*KEY, "factory"), failed) from error
    if not callable(made):
        raise SpecError((*KEY, "factory"), CANNOT_BE_CALLED(callable=spec.factory))
    return made  # type: ignore[no-any-return]
