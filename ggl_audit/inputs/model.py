"""Loads the client's model and states what it computes as pure functions of its parameters."""

from __future__ import annotations

import copy
import fnmatch
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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ggl_audit.environment import is_out_of_memory
from ggl_audit.errors import SpecError, nearest
from ggl_audit.gradient import Gradient
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import Shape, count_classes
from ggl_audit.inputs.interpreter import Program, UnsupportedError, recording_of
from ggl_audit.inputs.layouts import CHANNELS_LAST, Arrangements, trace_arrangements
from ggl_audit.inputs.losses import Criterion, CrossEntropy, build_criterion
from ggl_audit.inputs.outputs import Place, candidates, choose, described, first_rows
from ggl_audit.inputs.programs import load_exported, load_torchscript
from ggl_audit.inputs.statistics import (
    Normalization,
    Statistics,
    batches_seen,
    find_normalizations,
)
from ggl_audit.inputs.targets import Targets, read_targets
from ggl_audit.inputs.tensors import Tensors
from ggl_audit.inputs.weights import NORMALIZATIONS, fill_weights
from ggl_audit.spec import LocalTrainingSpec, Spec

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
LINEAR = (F.linear, torch.ops.aten.linear.default)
LOSS_ROUNDING, OUTPUT_ROUNDING = 1e-3, 1e-2
"""Relative; a GPU computes another number of images in another way, with short factors."""

WITH_MODES = (*DROPOUTS, *NORMALIZATIONS)
COMPILED = "OptimizedModule"
"""What torch.compile returns, of a module that takes seconds to import."""


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
        output: which of what the module returns are the logits; None where that is one tensor.
        whole: whether the loss is of all that the module returns, and not of the logits alone.
        mixes: whether an image's output depends on the others of its batch, as with batch norm in
            train mode.
        fewest: images that the module takes at a time; fewer are filled up with copies of them.
        unsent: names of the state dict, buffers included, that are declared never to be sent.
        arrangements: how the tensors of a capture lie in its file; None for PyTorch's layout.
        normalizations: the layers that keep running statistics in this mode.
        statistics: those of them that are observed beside the parameters; None where none are.
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
    output: Place | None = None
    whole: bool = False
    mixes: bool = False
    fewest: int = 1
    unsent: frozenset[str] = frozenset()
    arrangements: Arrangements | None = None
    normalizations: tuple[Normalization, ...] = ()
    statistics: Statistics | None = None

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

    def as_received(self) -> nn.Module:
        """A copy of the module as a client has it, which keeps running statistics."""
        module = copy.deepcopy(self.module)
        for normalization in self.normalizations:
            layer: Any = module.get_submodule(normalization.layer)
            layer.track_running_stats = True
            layer.running_mean, layer.running_var = normalization.running.clone()
            if normalization.counts:
                layer.num_batches_tracked = torch.tensor(normalization.batches)
        return module

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

        Raises:
            SpecError: the module does not take so many images.
        """
        output: torch.Tensor = self._call(parameters, images, drawn, self.output)
        return output

    def outputs(
        self, parameters: Gradient, images: torch.Tensor, drawn: Tensors | None = None
    ) -> Any:
        """What the loss takes of (n, channels, height, width) in [0, 1]; see :meth:`logits`."""
        return self._call(parameters, images, drawn, None if self.whole else self.output)

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
        outputs = self.outputs(parameters, images, drawn)
        try:
            return self.criterion(outputs, targets)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            # The loss may be the user's own code.
            raise SpecError(
                ("model", "loss"),
                f"the loss cannot be taken of {len(images)} images ({_reason(error)})",
            ) from error

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
        with _LinearCalls() as calls:
            self.logits(self.parameters, images)
        weight = self.parameters[self.head.weight]
        head = next(call for call in reversed(calls.seen) if call.weight is weight)
        taken: torch.Tensor = head.taken.flatten(1)[: len(images)]
        return taken

    def _call(
        self,
        parameters: Gradient,
        images: torch.Tensor,
        drawn: Tensors | None,
        place: Place | None,
    ) -> Any:
        normalized, count = self.normalize(images), len(images)
        if count < self.fewest:
            # Whole copies of the batch leave its statistics as they are.
            normalized = normalized.repeat(-(-self.fewest // count), 1, 1, 1)
        swapped = {name: tensor for name, tensor in (drawn or {}).items() if name in self.constants}
        constants = {**self.constants, **swapped, **parameters}
        try:
            with differentiable_attention():
                returned = call_with(self.module, constants, normalized)
            output = choose(returned, place)
            filled = len(normalized)
            return output if filled == count else first_rows(output, count, filled)
        except UnsupportedError as error:
            raise SpecError(("model",), f"the program cannot be run: {error}") from None
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            # The forward pass is the user's own code; whatever it raises is told in a message.
            raise SpecError(
                ("model",),
                f"the model does not take {count} images of {list(self.shape)} at a time "
                f"({_reason(error)})",
            ) from error


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
    module = _unwrapped(_build(spec))
    _give_shapes(module, spec)
    if wrap is not None:
        module = wrap(module)
    _set_modes(module, spec)
    layouts = (declared.layout, spec.capture.layout)
    arrangements = _arrangements(module, spec) if CHANNELS_LAST in layouts else None
    filled = frozenset(module.state_dict())
    if declared.weights is not None:
        lie = arrangements if declared.layout == CHANNELS_LAST else None
        path = spec.resolve(declared.weights)
        filled = fill_weights(module, path, declared.origin, lie, "model.layout")
    module.to(device=device, dtype=dtype)
    _check_recording(module, spec)
    state = dict(module.state_dict())
    normalizations = find_normalizations(module, filled)
    _prepare_for_training(module, declared.mode)
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
        normalizations=normalizations,
        criterion=build_criterion(declared.loss, spec.folder, device, dtype),
        targets=None if targets is None else targets.to(device, dtype),
        arrangements=arrangements if spec.capture.layout == CHANNELS_LAST else None,
    )
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.batch_size, *model.shape, generator=random).to(mean)
    output, whole, outputs, head = _try(model, images[0], spec)
    model = replace(model, output=output, whole=whole)
    if _try(model, images[1], spec)[3] != head:
        head = None
    with batches_seen(module, Statistics(normalizations, ())) as seen, torch.no_grad():
        model.logits(parameters, images[0])
    model = replace(model, normalizations=tuple(n for n in normalizations if n.layer in seen))
    model = replace(model, head=head, mixes=_try_more(model, images, outputs, spec))
    model = replace(model, fewest=_fewest(model, images[0], outputs))
    model = replace(model, classes=_classes(model, outputs, spec))
    _try_loss(model, images[0], spec)
    return model


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the statistics that a model normalizes with."""
    recording = recording_of(module)
    if recording is not None:
        return recording.normalizes
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def in_other_mode(module: nn.Module, mode: str) -> list[str]:
    """The layers, of those that a mode makes a difference to, that are not in it."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, WITH_MODES) and layer.training != (mode == "train")
    ]


def _mixes_by_statistics(module: nn.Module) -> bool:
    """Whether the images of a batch share the statistics that they are normalized with."""
    recording = recording_of(module)
    if recording is not None:
        training = "train" in recording.modes or (not recording.modes and module.training)
        return recording.normalizes and training
    return any(
        isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
        for layer in module.modules()
    )


def _reason(error: BaseException) -> str:
    """What was raised, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def call_with(module: nn.Module, tensors: Tensors, images: torch.Tensor) -> Any:
    """Calls a module with other tensors in place of its own, which it has again afterwards.

    ``functional_call`` ties weights by name, and leaves the other tensors in a layer that stands in
    the module under two names.

    Args:
        module: the module.
        tensors: by name, tied ones by their first.
        images: what it is called with.
    """
    first: dict[int, str] = {}
    tied = {}
    for prefix, layer in module.named_modules():
        for own, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            name = f"{prefix}.{own}" if prefix else own
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    more = {name: tensors[one] for name, one in tied.items() if one in tensors}
    return functional_call(module, {**tensors, **more}, (images,), tie_weights=False)


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


def _arrangements(module: nn.Module, spec: Spec) -> Arrangements:
    """How the tensors of the model lie in files with channels last."""
    parameter = next(module.parameters(), torch.empty(0))
    images = torch.rand(spec.capture.batch_size, *spec.model.input.shape).to(parameter)
    try:
        with differentiable_attention():
            return trace_arrangements(module, images)
    except (Exception, SystemExit) as error:
        # The forward pass is the user's own code.
        raise _not_taken(spec, images, error) from error


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


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model in wrappers that spread a batch over devices, compile it or take it apart."""
    inner: nn.Module | None = module
    while inner is not None:
        module, inner = inner, _inside(inner)
    for part in module.modules():
        if isinstance(part, nn.DataParallel):
            part.device_ids = []  # it then calls what is in it, where that is
    return module


def _inside(module: Any) -> nn.Module | None:
    """What a wrapper holds; None where it is none."""
    inner = None
    if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
        inner = module.module
    elif type(module).__name__ == COMPILED:
        inner = module._orig_mod
    elif hasattr(module, "to_standard_module"):  # of Opacus, for gradients of single samples
        inner = module.to_standard_module()
    return inner if isinstance(inner, nn.Module) else None


def _give_shapes(module: nn.Module, spec: Spec) -> None:
    """Has lazy layers take their shapes from what they are given."""
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        module.eval()
        _call_aside(module, spec)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if is_lazy(tensor):
                raise SpecError(
                    ("model", spec.model.source),
                    f"{name} of the model {spec.model.origin} has no shape, and its layer is "
                    "not called in the forward pass",
                    "Give the layer its sizes, or leave it out.",
                )


def _set_modes(module: nn.Module, spec: Spec) -> None:
    """Puts each layer in the mode in which the client's forward pass calls it.

    What the model's own ``train()`` does is left as it is, and what its forward pass does to layers
    is found by calling it, with copies of all that it could change.
    """
    declared = spec.model
    module.train(declared.mode == "train")
    parts = dict(module.named_modules())
    for index, pattern in enumerate(declared.eval_modules):
        own = fnmatch.filter(parts, pattern)
        if not own:
            raise SpecError(
                ("model", "eval_modules", index),
                f"{pattern!r} is no module of the model",
                nearest(pattern, filter(None, parts)),
            )
        for name in own:
            parts[name].eval()
    if recording_of(module) is not None:
        return
    names: dict[nn.Module, str] = {
        part: name for name, part in parts.items() if isinstance(part, WITH_MODES)
    }
    called: dict[nn.Module, set[bool]] = {}

    def note(layer: nn.Module, _arguments: Any) -> None:
        called.setdefault(layer, set()).add(layer.training)

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        _call_aside(module, spec)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, modes in called.items():
        if len(modes) > 1:
            raise SpecError(
                ("model", declared.source),
                f"the model {declared.origin} calls {names[layer]} in train mode and in eval mode "
                "in one forward pass",
            )
        layer.training = modes.pop()


def _call_aside(module: nn.Module, spec: Spec) -> None:
    """Calls the module on a batch, with copies of its tensors and of the random state."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    copies = {name: one.detach().clone() for name, one in held.items() if not is_lazy(one)}
    like = next(module.parameters(), torch.zeros(()))
    shape = (spec.capture.batch_size, *spec.model.input.shape)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(like.device, like.dtype if like.is_floating_point() else None)
    with torch.random.fork_rng(), torch.no_grad(), differentiable_attention():
        try:
            call_with(module, copies, images)
        except (Exception, SystemExit) as error:
            raise _not_taken(spec, images, error) from error


def _not_taken(spec: Spec, images: torch.Tensor, error: BaseException) -> SpecError:
    # The forward pass is the user's own code; whatever it raises is told without a traceback.
    batch = f"{len(images)} images" if len(images) > 1 else "images"
    return SpecError(
        ("model", "input", "shape"),
        f"the model {spec.model.origin} does not take {batch} of {list(spec.model.input.shape)} in "
        f"mode {spec.model.mode} ({type(error).__name__}: {error})",
    )


def _prepare_for_training(module: nn.Module, mode: str) -> None:
    """Has the layers that are in train mode do without running statistics."""
    for name, layer in module.named_modules():
        if not layer.training:
            continue
        if isinstance(layer, DROPOUTS) and layer.p > 0:
            raise _random(f"{name} drops units at random", mode)
        if isinstance(layer, _InstanceNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        if isinstance(layer, _BatchNorm):
            replace_all_batch_norm_modules_(layer)


def _random(what: str, mode: str) -> SpecError:
    return SpecError(
        ("model", "mode"),
        f"{mode}, but {what} and the client's draw is not known",
        "A capture that was made so cannot be audited: every replay would be of another draw. Let "
        "the client make one with the probability of its dropout set to 0, and set it in "
        "model.kwargs"
        + (", or declare mode: eval if its dropout was off." if mode == "train" else "."),
    )


def _try(
    model: ClientModel, images: torch.Tensor, spec: Spec
) -> tuple[Place | None, bool, torch.Tensor, Head | None]:
    """Calls the module on a batch; finds the output, whether the loss takes more, and the head."""
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
        returned, calls = call(images)
    except (Exception, SystemExit) as error:
        raise _not_taken(spec, images, error) from error
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
    place, whole = _output(returned, images, spec)
    outputs = choose(returned, place)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    for linear in reversed(calls.seen):
        weight = names.get(id(linear.weight))
        same = linear.given.shape == outputs.shape and torch.equal(linear.given, outputs)
        reused = sum(call.weight is linear.weight for call in calls.seen) > 1
        if same and weight is not None and not reused:
            head = Head(weight.rpartition(".")[0], weight, names.get(id(linear.bias)))
            return place, whole, outputs, head
    return place, whole, outputs, None


def _output(returned: Any, images: torch.Tensor, spec: Spec) -> tuple[Place | None, bool]:
    """Which of what the module returned are the logits, and whether the loss takes all of it."""
    declared, count = spec.model, f"{len(images)} images"
    if declared.output is not None:
        try:
            chosen = choose(returned, declared.output)
        except LookupError:
            raise SpecError(
                ("model", "output"),
                f"{declared.output!r}, but the model returned {described(returned)} for {count}",
            ) from None
        if not candidates(chosen, len(images)) == [None]:
            raise SpecError(
                ("model", "output"),
                f"{declared.output!r}, which is {described(chosen)} for {count}; expected one "
                "tensor with a row for each",
            )
        return declared.output, False
    places = candidates(returned, len(images))
    whole = declared.loss.factory is not None and not isinstance(returned, torch.Tensor)
    if not places:
        raise SpecError(
            ("model", declared.source),
            f"the model returned {described(returned)} for {count}; expected one tensor with a row "
            "for each",
        )
    if len(places) > 1 and not whole:
        raise SpecError(
            ("model", "output"),
            f"not given, but the model returned {described(returned)} for {count}",
            f"Declare the one that the loss is of, for example output: {places[0]}; or a "
            "model.loss of your own, which is given all of them.",
        )
    return places[0], whole


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    nan = one.isnan() & other.isnan()
    return bool(((one == other) | nan).all())


def _random_state(device: torch.device) -> torch.Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def _try_more(model: ClientModel, images: torch.Tensor, outputs: torch.Tensor, spec: Spec) -> bool:
    """Finds out whether the module takes more images than the capture has, and mixes them.

    Args:
        model: without it.
        images: two batches.
        outputs: for the first.
        spec: for messages.

    Returns:
        Whether the output for the first image is another one where others are beside it.
    """
    count = len(images[0])
    more = torch.cat([images[0][:1], images[1]])
    try:
        with torch.no_grad():
            together = model.logits(model.parameters, more)
    except SpecError as error:
        if isinstance(model.module, Program):
            model.module.limit_to(count)
            return _mixes_by_statistics(model.module)
        reason = error.__cause__ or error
        raise SpecError(
            ("model", spec.model.source),
            f"the model {spec.model.origin} takes {count} images at a time, but not "
            f"{len(more)} ({type(reason).__name__}: {reason})",
            "Other numbers are evaluated too: write x.shape[0] or -1 where it has a number.",
        ) from error
    return _mixes_by_statistics(model.module) or not _alike(together[:1], outputs[:1])


def _fewest(model: ClientModel, images: torch.Tensor, outputs: torch.Tensor) -> int:
    """How many images the module takes at the least.

    A model may squeeze away the dimension of a single image, or refuse to normalize it alone.
    """
    for count in range(1, min(3, len(images))):
        try:
            with torch.no_grad():
                alone = model.logits(model.parameters, images[:count])
        except SpecError:
            continue
        expected = outputs[:count]
        if alone.shape == expected.shape and (model.mixes or _alike(alone, expected)):
            return count
    return len(images)


def _alike(outputs: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether outputs are the same up to rounding."""
    if outputs.shape != others.shape:
        return False
    away, size = (outputs - others).abs().amax(), others.abs().amax()
    return bool(away <= OUTPUT_ROUNDING * size)


def _classes(model: ClientModel, outputs: torch.Tensor, spec: Spec) -> int:
    if model.targets is not None:
        return len(model.targets.rows)
    reference, declared = spec.evidence.reference, spec.capture.labels
    if spec.model.loss.factory is not None and reference is not None:
        # Only the client's own code knows which of the outputs are logits.
        own = declared if isinstance(declared, list) else []
        return max(2, count_classes(reference, spec.folder), *(label + 1 for label in own))
    try:
        return model.criterion.classes(outputs)
    except ValueError as error:
        raise SpecError(
            ("model", spec.model.source),
            f"the model returned {tuple(outputs.shape)} for {len(outputs)} images; "
            f"{spec.model.loss} with class indices expected {error}",
            "Other outputs need model.loss, and evidence.reference with labels that fit them.",
        ) from None


def _try_loss(model: ClientModel, images: torch.Tensor, spec: Spec) -> None:
    last = 0 if model.targets is not None else model.classes - 1
    labels = torch.full((len(images),), last, dtype=torch.long, device=model.device)
    targets = model.targets_of(labels)
    with torch.no_grad():
        outputs = model.outputs(model.parameters, images)
        if isinstance(outputs, torch.Tensor):
            doubled = torch.cat([outputs, outputs])
        else:
            doubled = model.outputs(model.parameters, torch.cat([images, images]))

    def loss(outputs: Any, targets: torch.Tensor) -> float:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)  # targets that are broadcast, for example
            return float(model.criterion(outputs, targets))

    try:
        once, twice = loss(outputs, targets), loss(doubled, torch.cat([targets, targets]))
    except (Exception, SystemExit) as error:
        # The loss may be the user's own code.
        given = described(outputs).removeprefix("a tensor ")
        raise SpecError(
            ("model", "loss"),
            f"{spec.model.loss} cannot be taken of outputs {given} and targets "
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
