"""A variational bottleneck before the head."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import nn
from typing_extensions import Self

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Drawn, ModelDefense, NoiseBound, Trace
from ggl_audit.errors import ReasonError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said

ROUNDING = 1e-3
"""Half precision, which a client may train in, rounds by half of this."""

END_IN_A_LINEAR_LAYER = (
    "Use a model that ends in a trained `nn.Linear`, and do not name it in `model.frozen` or "
    "`capture.unsent`."
)
NO_LINEAR_LAYER = Message(
    "defense/no-linear-layer",
    "precode puts a bottleneck before the last linear layer, but the model has none",
    advice=END_IN_A_LINEAR_LAYER,
)
LAST_LAYER_GIVES_NO_LOGITS = Message(
    "defense/last-layer-gives-no-logits",
    "precode puts a bottleneck before the last linear layer, which has to give the logits; "
    "{layer} does not",
    advice=END_IN_A_LINEAR_LAYER,
)

BEYOND_SPAN = Message(
    "contradiction/beyond-span",
    "{share:.1%} of {name} is beyond what {images} images span",
    advice="Correct `capture.batch_size`; check that the model has the bottleneck and the weights "
    "are of it.",
)
BOTTLENECKS_NOISE = Message(
    "check/bottlenecks-noise",
    "the noise of the bottleneck leaves nothing in the capture to check",
    advice="Nothing.",
)


class Bottleneck(nn.Module):
    """Maps features to a normal distribution, draws from it, and maps the draw back.

    The noise of the draw is the constant ``noise``, (1, size) or (images, size); at first zeros.

    Args:
        features: what it takes and gives, (n, features).
        size: the dimensions of the distribution.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, 2 * size)
        self.decoder = nn.Linear(size, features)
        self.register_buffer("noise", torch.zeros(1, size), persistent=False)
        self.divergence = torch.zeros(1)
        """From the standard normal distribution, in nats, (n,), of the last forward pass."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps (n, features) to (n, features)."""
        mean, spread = self.encoder(features).chunk(2, dim=-1)
        std = F.softplus(spread)
        self.divergence = (mean.square() + std.square() - 2 * std.log() - 1).sum(-1) / 2
        drawn: torch.Tensor = self.decoder(mean + std * self.get_buffer("noise"))
        return drawn

    def __getstate__(self) -> dict[str, Any]:
        # A copy leaves the last pass behind, whose tensors belong to the transform that ran it.
        return {**self.__dict__, "divergence": torch.zeros(1)}


class Precode(ModelDefense):
    """Puts a variational bottleneck before the last linear layer, which makes the gradient random.

    The features are encoded as a mean and a standard deviation (through softplus), a sample of that
    normal distribution is decoded to features again, and the loss gains the divergence of the
    distribution from the standard one, weighted. Usual settings: 256 dimensions, weight 0.001
    (Scheliga, Maeder and Seeland, WACV 2022). The divergence is in nats, averaged over the batch; a
    client that counts it in bits declares its weight divided by 0.693.

    The noise does not protect a gradient of few images. Each row of the encoder's weight gradient
    is a weighted sum of the images' features, whatever was drawn (as in Geiping et al., NeurIPS
    2020, proposition 3.1), so that features which do not span the observed rows are not the
    client's. Only updates of local training, and batches with as many images as features, do not
    show them.

    In the model's weights the bottleneck is called ``bottleneck``, with ``encoder`` and
    ``decoder``, and the layer after it ``head``, both under the name that this layer had.
    """

    name: ClassVar[str] = "precode"
    source: ClassVar[str] = "Scheliga et al., WACV 2022"
    broken_by: ClassVar[str] = (
        "matching without the bottleneck's gradients (Scheliga et al., arXiv 2309.04515; "
        "Balunovic et al., ICLR 2022)"
    )
    trace: ClassVar[Trace] = "span"
    stochastic: ClassVar[bool] = True

    size: int = Field(default=256, ge=1, description="dimensions of the bottleneck")
    weight: float = Field(default=0.001, ge=0, description="of the divergence in the loss")

    _place: str = PrivateAttr(default="")
    _random: frozenset[str] = PrivateAttr(default=frozenset())
    _probe: torch.Tensor | None = PrivateAttr(default=None)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Puts the bottleneck before the last linear layer.

        Raises:
            ValueError: there is no linear layer.
        """
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ReasonError(NO_LINEAR_LAYER())
        head = module.get_submodule(linear[-1])
        assert isinstance(head, nn.Linear)
        bottleneck = Bottleneck(head.in_features, self.size)
        widened = nn.Sequential(OrderedDict(bottleneck=bottleneck, head=head))
        if not linear[-1]:
            return widened
        parent, _, own = linear[-1].rpartition(".")
        setattr(module.get_submodule(parent), own, widened)
        return module

    def bind(self, model: ClientModel) -> Self:
        """Finds the bottleneck among the model's constants and parameters.

        Raises:
            ValueError: the last linear layer does not give the logits.
        """
        places = [n for n, part in model.module.named_modules() if isinstance(part, Bottleneck)]
        place = places[0]
        layer = place.removesuffix("bottleneck")
        if model.head is None or model.head.module != f"{layer}head":
            raise ReasonError(LAST_LAYER_GIVES_NO_LOGITS(layer=layer.removesuffix(".")))
        bound = self.model_copy()
        bound._place = place
        bound._random = frozenset(n for n in model.parameters if n.startswith(layer))
        encoder = model.parameters.get(f"{place}.encoder.weight")
        if encoder is not None and model.local is None and model.batch_size < encoder.shape[1]:
            random = torch.Generator().manual_seed(0)
            probe = torch.randn(model.batch_size, 2 * self.size, generator=random)
            bound._probe = probe.to(encoder)
        return bound

    def penalty(self, module: nn.Module) -> torch.Tensor:
        """What the last forward pass adds to the loss, a scalar."""
        bottleneck = module.get_submodule(self._place)
        assert isinstance(bottleneck, Bottleneck)
        return self.weight * bottleneck.divergence.mean()

    def draw(self, context: Context, images: int) -> Drawn:
        """Draws the noise of each image."""
        random, device = context.generator, context.generator.device
        return {
            f"{self._place}.noise": torch.randn(images, self.size, generator=random, device=device)
        }

    @property
    def drawn_for_each_image(self) -> frozenset[str]:
        """The noise."""
        return frozenset({f"{self._place}.noise"})

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        """Compares the span of the features; where it does not show, the tensors before them.

        What is left out of the comparison is taken from the capture. Where later steps changed the
        capture it is zero, which adds the same to every candidate's distance.
        """
        if observed is None:
            return {n: torch.zeros_like(t) if n in self._random else t for n, t in gradient.items()}
        if self._probe is None:
            return {n: observed[n] if n in self._random else t for n, t in gradient.items()}
        weight = f"{self._place}.encoder.weight"
        # A few random sums of the rows span what all of them do.
        span = torch.linalg.qr((self._probe @ gradient[weight]).T).Q
        return {**observed, weight: observed[weight] @ span @ span.T}

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds rows of the encoder that no batch of the declared size spans."""
        if self._probe is None:
            return False, BOTTLENECKS_NOISE()
        images = len(self._probe)
        name = f"{self._place}.encoder.weight"
        values = torch.linalg.svdvals(widened(observed[name]))
        beyond = float(values[images:].norm() / values.norm().clamp(min=1e-300))
        return beyond > ROUNDING, BEYOND_SPAN(share=beyond, name=name, images=images)
