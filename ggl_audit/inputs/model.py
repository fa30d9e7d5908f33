"""Loads the client's model and states what it computes as pure functions of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ggl_audit.errors import SpecError
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import Shape
from ggl_audit.inputs.interpreter import Program, UnsupportedError, recording_of
from ggl_audit.inputs.losses import Criterion, CrossEntropy, build_criterion
from ggl_audit.inputs.programs import load_exported, load_torchscript
from ggl_audit.inputs.targets import Targets, read_targets
from ggl_audit.inputs.tensors import Tensors
from ggl_audit.inputs.weights import fill_weights
from ggl_audit.spec import LocalTrainingSpec, Spec

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
LINEAR = (F.linear, torch.ops.aten.linear.default)
LOSS_ROUNDING = 1e-3


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
        loss_scale: multiplies the loss.
        loss_sum: whether the loss is summed over a batch, and not averaged.
        batch_size: images of one client.
        bgr: whether the module takes the channels in the reverse order.
        state: the state dict, with the running statistics that ``mode: train`` does without.
        local: how a client trains before it sends an update; None where it sends a gradient.
        classes: how many labels there are: logits, or rows of targets.
        head: the linear layer that gives the output, or None.
        criterion: the loss of outputs and targets, scale included.
        targets: the table that labels are rows of; None where they are class indices.
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
    bgr: bool = False
    state: Tensors = field(default_factory=dict)
    criterion: Criterion = field(default_factory=CrossEntropy)
    targets: Targets | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and everything that is computed from them."""
        return self.mean.device

    @property
    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """What the module is called with, for images (..., channels, height, width) in [0, 1]."""
        return ((images.flip(-3) if self.bgr else images) - self.mean) / self.std

    def without(self, names: Collection[str]) -> ClientModel:
        """The model of a client that neither trains nor sends these parameters."""
        kept = {name: tensor for name, tensor in self.parameters.items() if name not in names}
        fixed = {name: tensor for name, tensor in self.parameters.items() if name in names}
        head = self.head
        if head is not None and head.weight in fixed:
            head = None
        elif head is not None and head.bias in fixed:
            head = replace(head, bias=None)
        return replace(self, parameters=kept, constants={**self.constants, **fixed}, head=head)

    def logits(
        self, parameters: Gradient, images: torch.Tensor, drawn: Tensors | None = None
    ) -> torch.Tensor:
        """Maps (n, channels, height, width) in [0, 1] to (n, classes).

        Args:
            parameters: by name.
            images: the batch.
            drawn: takes the place of constants of the same name.
        """
        normalized = self.normalize(images)
        swapped = {name: tensor for name, tensor in (drawn or {}).items() if name in self.constants}
        constants = {**self.constants, **swapped, **parameters}
        try:
            with differentiable_attention():
                output: torch.Tensor = functional_call(self.module, constants, (normalized,))
        except UnsupportedError as error:
            raise SpecError(("model",), f"the program cannot be run: {error}") from None
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
            targets: (n, ...), as the loss takes them (:meth:`targets_of`).
            drawn: takes the place of constants of the same name.
        """
        return self.criterion(self.logits(parameters, images, drawn), targets)

    def targets_of(self, labels: torch.Tensor) -> torch.Tensor:
        """What the loss takes for labels (n,): these, or their rows of the table."""
        return labels if self.targets is None else self.targets.rows[labels]

    def mixable_targets_of(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Targets that may be averaged over images, (n, ...); None where the loss takes no such."""
        if self.targets is None:
            return self.criterion.mixable(labels, self.classes)
        rows = self.targets.rows
        return rows[labels] if rows.is_floating_point() else None

    def representation(self, images: torch.Tensor) -> torch.Tensor | None:
        """What the head takes, (n, features), for images (n, channels, height, width)."""
        if self.head is None:
            return None
        # With batch statistics a copy changes nothing, and one image may not be normalized alone.
        copies = self.batch_size if self.module.training and len(images) == 1 else len(images)
        with _LinearCalls() as calls:
            self.logits(self.parameters, images.expand(copies, *images.shape[1:]))
        weight = self.parameters[self.head.weight]
        head = next(call for call in reversed(calls.seen) if call.weight is weight)
        taken: torch.Tensor = head.taken.flatten(1)[: len(images)]
        return taken


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
    key = ("model", declared.source)
    torch.manual_seed(spec.seed)
    module = _build(spec)
    if wrap is not None:
        module = wrap(module)
    training = declared.mode == "train"
    if declared.weights is not None:
        fill_weights(module, spec.resolve(declared.weights), declared.origin, training)
    module.to(device=device, dtype=dtype)
    module.train(training)
    _check_recording(module, spec)
    state = dict(module.state_dict())
    if training:
        _prepare_for_training(module)
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise SpecError(key, "the model has no parameter that is trained")
    constants = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    constants |= dict(module.named_buffers())

    def channelwise(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)

    mean, std = channelwise(declared.input.mean), channelwise(declared.input.std)
    targets = read_targets(spec)
    model = ClientModel(
        module=module,
        parameters=parameters,
        constants=constants,
        shape=declared.input.shape,
        mean=mean,
        std=std,
        loss_scale=declared.loss.scale,
        classes=0,
        head=None,
        loss_sum=declared.loss.reduction == "sum",
        batch_size=spec.capture.batch_size,
        local=spec.capture.local,
        bgr=declared.input.channels == "bgr",
        state=state,
        criterion=build_criterion(declared.loss, spec.folder, device, dtype),
        targets=None if targets is None else targets.to(device, dtype),
    )
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.batch_size, *model.shape, generator=random).to(mean)
    outputs, head = _try(model, images[0], spec)
    if _try(model, images[1], spec)[1] != head:
        head = None
    _try_more(model, images[0], spec)
    model = replace(model, head=head, classes=_classes(model, outputs, spec))
    _try_loss(model, outputs, spec)
    return model


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the statistics that a model normalizes with."""
    recording = recording_of(module)
    if recording is not None:
        return recording.normalizes
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Computes attention by operators that can be mapped, and differentiated in either way."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class _LinearCall:
    taken: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    given: torch.Tensor


class _LinearCalls(TorchFunctionMode):
    """Notes each call of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_LinearCall] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in LINEAR and len(args) > 1:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            self.seen.append(_LinearCall(args[0], args[1], bias, result))
        return result


def _build(spec: Spec) -> nn.Module:
    declared = spec.model
    if declared.torchscript is not None:
        return load_torchscript(spec.resolve(declared.torchscript))
    if declared.exported is not None:
        return load_exported(spec.resolve(declared.exported))
    assert declared.factory is not None
    return build_module(declared.factory, declared.kwargs, spec.folder, "model")


def _check_recording(module: nn.Module, spec: Spec) -> None:
    """Compares what is fixed in a saved program with the declaration."""
    recording = recording_of(module)
    if recording is None:
        return
    mode, batch_size, saved = spec.model.mode, spec.capture.batch_size, spec.model.origin
    own = "train" if "train" in recording.modes else "eval"
    if recording.modes and own != mode:
        raise SpecError(
            ("model", "mode"),
            f"{mode}, but the program {saved} was saved in {own} mode, which stays in it",
            f"Declare mode: {own}, or save the program after model.{mode}().",
        )
    if recording.batch not in (None, batch_size):
        raise SpecError(
            ("capture", "batch_size"),
            f"{batch_size}, but the program {saved} was exported for {recording.batch} images at "
            "a time",
            "Export it with dynamic_shapes={INPUT: {0: torch.export.Dim('batch')}}, or with "
            f"{batch_size} images.",
        )


def _prepare_for_training(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, DROPOUTS) and layer.p > 0:
            raise _random(f"{name} drops units at random", "train")
        if isinstance(layer, _InstanceNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    replace_all_batch_norm_modules_(module)


def _random(what: str, mode: str) -> SpecError:
    return SpecError(
        ("model", "mode"),
        f"{mode}, but {what} and the client's draw is not known",
        "Set the probability of its dropout to 0 in model.kwargs"
        + (", or declare mode: eval." if mode == "train" else "."),
    )


def _try(model: ClientModel, images: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, Head | None]:
    """Calls the module on a batch, and once on a larger one; finds the head."""
    module, declared = model.module, spec.model
    held: dict[str, Tensors] = {
        "parameter": dict(module.named_parameters()),
        "buffer": dict(module.named_buffers()),
    }
    before = {kind: {n: t.detach().clone() for n, t in own.items()} for kind, own in held.items()}
    state = _random_state(model.device)

    def call(images: torch.Tensor) -> tuple[Any, _LinearCalls]:
        with torch.no_grad(), differentiable_attention(), _LinearCalls() as calls:
            return module(model.normalize(images)), calls

    try:
        outputs, calls = call(images)
    except (Exception, SystemExit) as error:
        # The forward pass is the user's own code; whatever it raises is told without a traceback.
        batch = f"{len(images)} images" if len(images) > 1 else "images"
        raise SpecError(
            ("model", "input", "shape"),
            f"the model {declared.origin} does not take {batch} of {list(model.shape)} in mode "
            f"{declared.mode} ({type(error).__name__}: {error})",
        ) from error
    if not torch.equal(_random_state(model.device), state):
        raise _random(f"the model {declared.origin} draws at random", declared.mode)
    for kind, own in held.items():
        changed = [n for n, tensor in own.items() if not _same(tensor, before[kind][n])]
        if changed:
            raise SpecError(
                ("model", declared.source),
                f"the model {declared.origin} changes its {kind} {changed[0]} in mode "
                f"{declared.mode}",
                "Many candidates are evaluated at the same weights; its forward pass must leave "
                "them as they are.",
            )
    if not isinstance(outputs, torch.Tensor) or outputs.ndim == 0 or len(outputs) != len(images):
        found = "a tensor " + str(tuple(outputs.shape)) if isinstance(outputs, torch.Tensor) else ""
        raise SpecError(
            ("model", declared.source),
            f"the model returned {found or type(outputs).__name__} for {len(images)} images; "
            "expected one tensor with a row for each",
        )
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    for linear in reversed(calls.seen):
        weight = names.get(id(linear.weight))
        same = linear.given.shape == outputs.shape and torch.equal(linear.given, outputs)
        reused = sum(call.weight is linear.weight for call in calls.seen) > 1
        if same and weight is not None and not reused:
            return outputs, Head(weight.rpartition(".")[0], weight, names.get(id(linear.bias)))
    return outputs, None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    nan = one.isnan() & other.isnan()
    return bool(((one == other) | nan).all())


def _random_state(device: torch.device) -> torch.Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def _try_more(model: ClientModel, images: torch.Tensor, spec: Spec) -> None:
    """Finds out whether the module takes other numbers of images than that of the capture."""
    more = torch.cat([images, images[:1]])
    try:
        with torch.no_grad():
            model.logits(model.parameters, more)
    except (Exception, SystemExit) as error:
        if isinstance(model.module, Program):
            model.module.limit_to(len(images))
            return
        raise SpecError(
            ("model", spec.model.source),
            f"the model {spec.model.origin} takes {len(images)} images at a time, but not "
            f"{len(more)} ({type(error).__name__}: {error})",
            "Other numbers are evaluated too: write x.shape[0] or -1 where it has a number.",
        ) from error


def _classes(model: ClientModel, outputs: torch.Tensor, spec: Spec) -> int:
    if model.targets is not None:
        return len(model.targets.rows)
    try:
        return model.criterion.classes(outputs)
    except ValueError as error:
        raise SpecError(
            ("model", spec.model.source),
            f"the model returned {tuple(outputs.shape)} for {len(outputs)} images; "
            f"{spec.model.loss} with class indices expected {error}",
            "Other outputs need model.loss, and evidence.reference with labels that fit them.",
        ) from None


def _try_loss(model: ClientModel, outputs: torch.Tensor, spec: Spec) -> None:
    labels = torch.zeros(len(outputs), dtype=torch.long, device=model.device)
    targets = model.targets_of(labels)

    def loss(times: int) -> float:
        repeated = (torch.cat([part] * times) for part in (outputs, targets))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)  # targets that are broadcast, for example
            return float(model.criterion(*repeated))

    try:
        once, twice = loss(1), loss(2)
    except (Exception, SystemExit) as error:
        # The loss may be the user's own code.
        raise SpecError(
            ("model", "loss"),
            f"{spec.model.loss} cannot be taken of outputs {tuple(outputs.shape)} and targets "
            f"{tuple(targets.shape)} ({type(error).__name__}: {error})",
        ) from error
    declared, factor = spec.model.loss.reduction, 2 if model.loss_sum else 1
    if model.batch_size > 1 and abs(twice - factor * once) > LOSS_ROUNDING * abs(twice):
        raise SpecError(
            ("model", "loss", "reduction"),
            f"{declared}, but the loss of a batch is {twice / once if once else twice:.3g} times "
            "as large when every image is there twice",
            "A loss of one's own reduces by itself; declare whether to the mean or to the sum.",
        )
