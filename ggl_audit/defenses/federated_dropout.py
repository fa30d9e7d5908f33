"""Training of a sub-model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import nn
from torch.func import grad
from typing_extensions import Self

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Drawn, Effect, ModelDefense, NoiseBound, Trace
from ggl_audit.errors import ReasonError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said

MASK = "kept_units"
"""The buffer of a layer that says which units feed it, ones and zeros."""

USE_A_CHAIN = (
    "Use a chain of linear layers and convolutions; for another model declare your own defense by "
    "`factory`."
)
NO_HIDDEN_LAYERS = Message(
    "defense/no-hidden-layers",
    "federated_dropout leaves out units of hidden layers, but the model has none: {count} linear "
    "layers and convolutions, expected 2 or more",
    advice=USE_A_CHAIN,
)
NO_CHAIN = Message(
    "defense/no-chain",
    "federated_dropout needs layers that follow one another, but {layer} takes {inputs} inputs, "
    "in groups or not those of {before} before it, which has {units} units",
    advice=USE_A_CHAIN,
)
DECAYS_WHAT_IS_LEFT_OUT = Message(
    "defense/decays-what-is-left-out",
    "federated_dropout with local weight_decay, which would also move the units that are left out "
    "and are not sent",
    advice="Declare no `weight_decay`, if the client has none.",
)
UNITS_CANNOT_BE_SEEN = Message(
    "defense/units-cannot-be-seen",
    "federated_dropout cannot be seen before {layer}: neither this layer nor the one before it is "
    "trained",
    advice="Take one of the two layers out of `model.frozen` or `capture.unsent`.",
)
OTHER_WAYS = Message(
    "defense/other-ways",
    "federated_dropout needs a model whose layers form a chain, but units before {layer} also act "
    "by another way, such as a residual connection",
    advice=USE_A_CHAIN,
)

UNITS = Message(
    "contradiction/units",
    "{count} of {units} units before {layer} have a gradient; {kept} were declared",
    advice="Correct `kept`, or capture the gradient of the sub-model.",
)


@dataclass(frozen=True)
class Hidden:
    """The units between two layers, and where a gradient holds them.

    Attributes:
        mask: the constant that says which of them are kept.
        units: how many there are: features, or channels of a convolution.
        rows: tensors with a row for each unit, of the layer that computes them.
        columns: the weight with a block of columns for each unit, of the layer that takes them;
            None where it is not trained.
    """

    mask: str
    units: int
    rows: tuple[str, ...]
    columns: str | None

    def entries(self, gradient: Gradient) -> torch.Tensor:
        """All that a gradient holds of each unit, (units, values)."""
        parts = [gradient[name].reshape(self.units, -1) for name in self.rows]
        if self.columns is not None:
            blocks = gradient[self.columns].unflatten(1, (self.units, -1))
            parts.append(blocks.movedim(1, 0).reshape(self.units, -1))
        return torch.cat(parts, dim=1)

    def zeroed(self, gradient: Gradient, kept: torch.Tensor) -> Gradient:
        """The gradient without the units where ``kept``, (units,), is zero."""
        changed = dict(gradient)
        for name in self.rows:
            tensor = changed[name]
            changed[name] = tensor * kept.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
        if self.columns is not None:
            tensor = changed[self.columns]
            blocks = tensor.unflatten(1, (self.units, -1))
            mask = kept.to(tensor).view(-1, *[1] * (blocks.ndim - 2))
            changed[self.columns] = (blocks * mask).view_as(tensor)
        return changed


class FederatedDropout(ModelDefense):
    """Trains and sends a sub-model: some of each hidden layer's units, drawn at random.

    A unit is a feature of a linear layer, or a channel of a convolution. Units that are left out
    neither compute nor receive a gradient, so that their rows and columns are zero in what is sent.
    The image's channels and the logits stay. Usual settings: 50 to 75 % kept (Caldas et al., arXiv
    1812.07210; Bouacida et al., 2021). It fits models that are a chain of linear layers and
    convolutions, with whatever acts on each unit by itself between them.
    """

    name: ClassVar[str] = "federated_dropout"
    source: ClassVar[str] = "Caldas et al., arXiv 1812.07210"
    broken_by: ClassVar[str] = (
        "the gradient shows which units were kept, as docs/defenses.md measures"
    )
    random_if_hidden: ClassVar[bool] = True
    trace: ClassVar[Trace] = "zeros"
    effect: ClassVar[Effect] = "exact"

    kept: float = Field(gt=0, lt=1, description="share of each hidden layer's units that is kept")

    _layers: tuple[Hidden, ...] = PrivateAttr(default=())

    def wrap(self, module: nn.Module) -> nn.Module:
        """Puts a mask before each linear layer and convolution but the first; at first of ones.

        Raises:
            ValueError: there is no hidden layer, or a layer does not take what the one before it
                gives.
        """
        layers = _layers(module)
        if len(layers) < 2:
            raise ReasonError(NO_HIDDEN_LAYERS(count=len(layers)))
        for (before, giver), (name, taker) in pairwise(layers):
            units = giver.weight.shape[0]
            if isinstance(taker, nn.Linear):
                taken, follows = taker.in_features, taker.in_features % units == 0
            else:
                taken, follows = taker.in_channels, taker.weight.shape[1] == units
            if not follows:
                raise ReasonError(NO_CHAIN(layer=name, inputs=taken, before=before, units=units))
            taker.register_buffer(MASK, torch.ones(units), persistent=False)
            taker.register_forward_pre_hook(_leave_out)
        return module

    def bind(self, model: ClientModel) -> Self:
        """Finds the units in the gradient, and tries it on a random one.

        Raises:
            ValueError: a unit that is left out still has a gradient, as it reaches the logits by
                another way than through the next layer; or none of its parameters is trained.
        """
        if model.local is not None and model.local.weight_decay:
            raise ReasonError(DECAYS_WHAT_IS_LEFT_OUT())
        hidden = tuple(_hidden(model))
        random = torch.Generator().manual_seed(0)
        images = torch.rand(4, *model.shape, generator=random).to(model.mean)
        labels = torch.arange(4, device=model.device) % model.classes
        masks = {
            layer.mask: _drawn(layer.units, layer.units - layer.units // 2, random).to(model.mean)
            for layer in hidden
        }
        smaller = replace(model, constants={**model.constants, **masks})

        def loss(parameters: Gradient) -> torch.Tensor:
            return smaller.loss(parameters, images, smaller.targets_of(labels))

        gradient = grad(loss)(model.parameters)
        for layer in hidden:
            where = layer.mask.removesuffix(f".{MASK}")
            if not layer.rows and layer.columns is None:
                raise ReasonError(UNITS_CANNOT_BE_SEEN(layer=where))
            if bool(layer.entries(gradient)[masks[layer.mask] == 0].any()):
                raise ReasonError(OTHER_WAYS(layer=where))
        bound = self.model_copy()
        bound._layers = hidden
        return bound

    def draw(self, context: Context, images: int) -> Drawn:
        """Draws the units of each layer, as many as are declared."""
        return {
            layer.mask: _drawn(layer.units, self._kept(layer), context.generator)
            for layer in self._layers
        }

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        """Reads the kept units off the capture; if hidden, takes all of them for kept.

        A unit that was kept but has no gradient, such as a rectified one below zero, is taken for
        left out. On the client's image this changes nothing, as it computes zero there.
        """
        if observed is None:
            return [{}]
        return [
            {
                layer.mask: (layer.entries(observed) != 0).any(1).to(observed[self._any])
                for layer in self._layers
            }
        ]

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Nothing more, as the images' gradient is the sub-model's; without images, zeros."""
        if context.images is None:
            for layer in self._layers:
                kept = _drawn(layer.units, self._kept(layer), context.generator)
                gradient = layer.zeroed(gradient, kept)
        return gradient

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds a hidden layer with fewer units without gradient than were declared."""
        details = []
        for layer in self._layers:
            kept = int((layer.entries(observed) != 0).any(1).sum())
            allowed = self._kept(layer)
            before = layer.mask.removesuffix(f".{MASK}")
            said = UNITS(count=kept, units=layer.units, layer=before, kept=allowed)
            details.append((kept - allowed, said))
        excess, worst = max(details, key=lambda detail: detail[0])
        return excess > 0, worst

    @property
    def _any(self) -> str:
        first = self._layers[0]
        return first.columns if first.columns is not None else first.rows[0]

    def _kept(self, layer: Hidden) -> int:
        return max(1, round(self.kept * layer.units))


def _drawn(units: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(units, generator=generator, device=generator.device)
    return (order < kept).to(torch.get_default_dtype())


def _layers(module: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]


def _hidden(model: ClientModel) -> list[Hidden]:
    found: list[Hidden] = []
    rows: Sequence[str] = ()
    for name, layer in model.module.named_modules():
        trained = [f"{name}.{own}" for own, _ in layer.named_parameters(recurse=False)]
        trained = [own for own in trained if own in model.parameters]
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            # Its parameters belong to the units of the convolution before it.
            units = len(model.parameters[rows[0]]) if rows else 0
            rows = [*rows, *(own for own in trained if layer.num_features == units)]
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        mask = f"{name}.{MASK}"
        if mask in model.constants:
            weight = f"{name}.weight"
            columns = weight if weight in model.parameters else None
            found.append(Hidden(mask, len(model.constants[mask]), tuple(rows), columns))
        rows = trained
    return found


def _leave_out(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    values, mask = inputs[0], layer.get_buffer(MASK)
    if isinstance(layer, nn.Linear):
        # After a flattening each channel of the convolution before is a block of features.
        blocks = mask[:, None].expand(-1, layer.in_features // len(mask)).flatten()
        return (values * blocks.to(values.dtype), *inputs[1:])
    return (values * mask[:, None, None].to(values.dtype), *inputs[1:])
