"""Pruning of the representation."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch.func import vjp, vmap
from typing_extensions import Self

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Defense, Effect, NoiseBound, Trace
from ggl_audit.errors import ReasonError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said

FEATURES_AT_A_TIME = 64
"""Derivatives of features with respect to the images that are held at a time."""

LOGITS_OF_NO_LINEAR_LAYER = Message(
    "defense/logits-of-no-linear-layer",
    "soteria prunes what the last linear layer takes, but the model's logits are not the output "
    "of a linear layer that is trained",
    advice="Use a model that ends in a trained `nn.Linear`, and do not name it in `model.frozen` "
    "or `capture.unsent`.",
)

PRUNED_COLUMNS = Message(
    "contradiction/pruned-columns",
    "{share:.1%} of the columns of {name} are zero; {fraction:.1%} was declared",
    advice="Correct `fraction`, or capture after the pruning.",
)


class Soteria(Defense):
    """Sets the head's weight gradient to zero for the features that say most about the image.

    A feature r_i of the representation, which is what the head takes, is ranked by
    |dr_i/dx| / |r_i|, added up over the images of a batch; those where it is smallest are pruned,
    that is, those of the largest |r_i| / |dr_i/dx| (Sun et al., CVPR 2021, section 4, and the
    authors' code, which adds 0.1 to the r_i that divides). Features that the images leave at zero
    count as pruned, as in that code. Usual settings: 60 to 80 %, one image (Li et al., CVPR 2022,
    section 4.1).
    """

    name: ClassVar[str] = "soteria"
    source: ClassVar[str] = "Sun et al., CVPR 2021"
    broken_by: ClassVar[str] = "matching what was not pruned (Balunovic et al., ICLR 2022)"
    random_if_hidden: ClassVar[bool] = True
    trace: ClassVar[Trace] = "zeros"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm", "zeros"})
    effect: ClassVar[Effect] = "exact"

    fraction: float = Field(
        gt=0, lt=1, description="share of the representation's features that is pruned"
    )

    _model: ClientModel | None = PrivateAttr(default=None)

    def bind(self, model: ClientModel) -> Self:
        """Remembers the model, whose representation ranks the features.

        Raises:
            ValueError: no linear layer gives the logits.
        """
        if model.head is None:
            raise ReasonError(LOGITS_OF_NO_LINEAR_LAYER())
        bound = self.model_copy()
        bound._model = model
        return bound

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Prunes by the images; without images, features at random."""
        features = gradient[self._weight].shape[1]
        if context.images is None:
            device = context.generator.device
            order = torch.randperm(features, generator=context.generator, device=device)
        else:
            order = self._ratios(context.images).argsort()
        kept = torch.ones(features, device=order.device)
        return self._masked(gradient, kept.scatter(0, order[: self._removed(features)], 0))

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Keeps the features that the capture shows; if hidden, all of them."""
        if observed is None:
            return gradient
        return self._masked(gradient, (observed[self._weight] != 0).any(0))

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds fewer columns of zeros than were declared."""
        pruned = (observed[self._weight] == 0).all(0)
        share = float(widened(pruned).mean())
        said = PRUNED_COLUMNS(share=share, name=self._weight, fraction=self.fraction)
        return int(pruned.sum()) < self._removed(len(pruned)), said

    @property
    def acts_on_a_gradient(self) -> bool:
        """No: it needs the images."""
        return False

    def norm_bound(self, before: float | None) -> float | None:
        """Removing values does not raise the norm."""
        return before

    @property
    def _weight(self) -> str:
        assert self._model is not None
        assert self._model.head is not None
        return self._model.head.weight

    def _removed(self, features: int) -> int:
        # The small term undoes binary rounding, as in sparsification.
        return int(self.fraction * features + 1e-9)

    def _masked(self, gradient: Gradient, kept: torch.Tensor) -> Gradient:
        weight = gradient[self._weight]
        return {**gradient, self._weight: weight * kept.to(weight.dtype)}

    def _ratios(self, images: torch.Tensor) -> torch.Tensor:
        # One product with the Jacobian gives a feature's derivatives for every image of the batch.
        features: torch.Tensor
        features, pull = vjp(self._representation, images)  # type: ignore[misc]

        def size(feature: torch.Tensor) -> torch.Tensor:
            derivative = pull(feature.expand_as(features))[0].flatten(1)
            length: torch.Tensor = torch.linalg.vector_norm(derivative, dim=1)
            return length

        each_feature = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        sizes = vmap(size, chunk_size=FEATURES_AT_A_TIME)(each_feature)
        ratios: torch.Tensor = sizes / features.abs().T.clamp(min=1e-30)
        return ratios.sum(1)

    def _representation(self, images: torch.Tensor) -> torch.Tensor:
        assert self._model is not None
        features = self._model.representation(images)
        assert features is not None
        return features
