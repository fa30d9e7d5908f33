"""Loads the client's model and states what it computes as pure functions of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, replace_all_batch_norm_modules_

from ggl_audit.errors import InputError, SpecError, nearest
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import Shape
from ggl_audit.inputs.tensors import Tensors, read_tensors
from ggl_audit.spec import LocalTrainingSpec, Spec

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Head:
    """The linear layer whose output is the logits, by parameter names."""

    module: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ClientModel:
    """The model at the round of the capture.

    Attributes:
        module: the module, in the declared mode, on its device.
        parameters: the trained parameters, by name, in the order of ``named_parameters()``.
        constants: buffers and frozen parameters, by name.
        shape: (channels, height, width) of its images.
        mean: (channels, 1, 1) or (1, 1, 1), subtracted from an image in [0, 1].
        std: the same shape, divides it.
        loss_scale: multiplies the cross-entropy.
        loss_sum: whether the cross-entropy is summed over a batch, and not averaged.
        batch_size: images of one client.
        local: how a client trains before it sends an update; None where it sends a gradient.
        classes: the number of logits.
        head: the linear layer that gives the logits, or None.
    """

    module: nn.Module
    parameters: Gradient
    constants: Tensors
    shape: Shape
    mean: torch.Tensor
    std: torch.Tensor
    loss_scale: float
    classes: int
    head: Head | None
    loss_sum: bool = False
    batch_size: int = 1
    local: LocalTrainingSpec | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and everything that is computed from them."""
        return self.mean.device

    @property
    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def logits(
        self, parameters: Gradient, images: torch.Tensor, drawn: Tensors | None = None
    ) -> torch.Tensor:
        """Maps (n, channels, height, width) in [0, 1] to (n, classes).

        Args:
            parameters: by name.
            images: the batch.
            drawn: takes the place of constants of the same name.
        """
        normalized = (images - self.mean) / self.std
        swapped = {name: tensor for name, tensor in (drawn or {}).items() if name in self.constants}
        output: torch.Tensor = functional_call(
            self.module, {**self.constants, **swapped, **parameters}, (normalized,)
        )
        return output

    def loss(
        self,
        parameters: Gradient,
        images: torch.Tensor,
        targets: torch.Tensor,
        drawn: Tensors | None = None,
    ) -> torch.Tensor:
        """The client's loss on a batch, a scalar.

        Args:
            parameters: by name.
            images: (n, channels, height, width) in [0, 1].
            targets: (n,) labels or (n, classes) probabilities.
            drawn: takes the place of constants of the same name.
        """
        logits = self.logits(parameters, images, drawn)
        scale = self.loss_scale * (len(images) if self.loss_sum else 1)
        return scale * F.cross_entropy(logits, targets)

    def representation(self, images: torch.Tensor) -> torch.Tensor | None:
        """What the head takes, (n, features), for images (n, channels, height, width)."""
        if self.head is None:
            return None
        taken: list[torch.Tensor] = []
        hook = self.module.get_submodule(self.head.module).register_forward_pre_hook(
            lambda _, inputs: taken.append(inputs[0])
        )
        try:
            self.logits(self.parameters, images)
        finally:
            hook.remove()
        return taken[-1].flatten(1)


def load_model(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> ClientModel:
    """Builds the model of the spec, fills in its weights and tries it on one image.

    Args:
        spec: declares it.
        device: where it is to be.
        dtype: of its parameters.
        wrap: adds what a defense needs, before the weights are filled in.

    Raises:
        SpecError: the factory fails, or the model does not take the declared images.
        InputError: the weights are missing, broken, or do not fit the model.
    """
    declared = spec.model
    torch.manual_seed(spec.seed)
    module = build_module(declared.factory, declared.kwargs, spec.folder, "model")
    if wrap is not None:
        module = wrap(module)
    if declared.weights is not None:
        _fill(module, spec)
    module.to(device=device, dtype=dtype)
    module.train(declared.mode == "train")
    if declared.mode == "train":
        _prepare_for_training(module)
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise SpecError(("model", "factory"), "the model has no parameter that is trained")
    constants = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    constants |= dict(module.named_buffers())

    def channelwise(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)

    mean, std = channelwise(declared.input.mean), channelwise(declared.input.std)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, *declared.input.shape, generator=random).to(mean)
    logits, head = _try(module, (images[0] - mean) / std, spec)
    if _try(module, (images[1] - mean) / std, spec)[1] != head:
        head = None
    return ClientModel(
        module=module,
        parameters=parameters,
        constants=constants,
        shape=declared.input.shape,
        mean=mean,
        std=std,
        loss_scale=declared.loss.scale,
        classes=logits.shape[1],
        head=head,
        loss_sum=declared.loss.reduction == "sum",
        batch_size=spec.capture.batch_size,
        local=spec.capture.local,
    )


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the statistics that a model normalizes with."""
    return any(isinstance(layer, BATCH_NORMS) for layer in module.modules())


def _fill(module: nn.Module, spec: Spec) -> None:
    assert spec.model.weights is not None
    path = spec.resolve(spec.model.weights)
    weights = read_tensors(path)
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing:
        raise InputError(
            path,
            f"has no {missing[0]!r} {tuple(expected[missing[0]].shape)}, which the model "
            f"{spec.model.factory} needs ({len(missing)} of {len(expected)} are missing)",
            nearest(missing[0], unknown) if unknown else "",
        )
    if unknown:
        raise InputError(
            path,
            f"holds {unknown[0]!r}, which the model {spec.model.factory} does not have",
            nearest(unknown[0], expected),
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise InputError(
                path,
                f"{name!r} has the shape {tuple(weights[name].shape)}; "
                f"the model has {tuple(tensor.shape)}",
                "Are model.kwargs those of the client?",
            )
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(path, f"{name!r} holds values that are NaN or infinite")
    module.load_state_dict(weights)


def _prepare_for_training(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, DROPOUTS) and layer.p > 0:
            raise SpecError(
                ("model", "mode"),
                f"train, but {name} drops units at random and the client's draw is not known",
                "Set its probability to 0 in model.kwargs, or declare mode: eval.",
            )
    replace_all_batch_norm_modules_(module)


def _try(module: nn.Module, image: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, Head | None]:
    outputs: list[tuple[str, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(
            lambda _layer, _inputs, output, name=name: outputs.append((name, output))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits: Any = module(image)
    except (Exception, SystemExit) as error:
        # The forward pass is the user's own code; whatever it raises is told without a traceback.
        raise SpecError(
            ("model", "input", "shape"),
            f"the model {spec.model.factory} does not take images of "
            f"{list(spec.model.input.shape)} in mode {spec.model.mode} "
            f"({type(error).__name__}: {error})",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SpecError(
            ("model", "factory"),
            f"the model returned {found} for one image; expected logits (1, classes), 2 classes "
            "or more",
        )
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for name, output in reversed(outputs):
        weight = f"{name}.weight" if name else "weight"
        bias = f"{name}.bias" if name else "bias"
        if output.shape == logits.shape and torch.equal(output, logits) and weight in trained:
            return logits, Head(name, weight, bias if bias in trained else None)
    return logits, None
