"""Builds the client's model, fills in its weights and puts its layers into their modes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ggl_audit.errors import SpecError, nearest
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.interpreter import recording_of
from ggl_audit.inputs.layouts import CHANNELS_LAST, Arrangements, trace_arrangements
from ggl_audit.inputs.losses import build_criterion
from ggl_audit.inputs.model import (
    DROPOUTS,
    WITH_MODES,
    ClientModel,
    call_with,
    differentiable_attention,
)
from ggl_audit.inputs.model_trial import refuse_batch, try_model, without_draws
from ggl_audit.inputs.programs import load_exported
from ggl_audit.inputs.statistics import find_normalizations
from ggl_audit.inputs.targets import read_targets
from ggl_audit.inputs.weights import fill_weights
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

COMPILED = "OptimizedModule"
"""What torch.compile returns, of a module that takes seconds to import."""

NOTHING_IS_TRAINED = Message(
    "model/nothing-is-trained",
    "the model has no parameter that is trained",
    advice="Set `requires_grad` of what the client trains; a program saved with frozen weights "
    "has to be saved anew.",
)
SAVED_IN_OTHER_MODE = Message(
    "program/saved-in-other-mode",
    "{mode}, but the program {file} was saved in {saved} mode, which stays in it",
    "Declare mode: {saved}, or save the program after model.{mode}().",
    advice="Declare that mode if the client trains so, or save the program after `model.train()` "
    "or `model.eval()`.",
)
OTHER_EXPORTED_BATCH = Message(
    "program/other-exported-batch",
    "{batch_size}, but the program {file} was exported for {batch} images at a time",
    "Export it with dynamic_shapes={{INPUT: {{0: torch.export.Dim('batch')}}}}, or with "
    "{batch_size} images.",
    advice='Export it with a dynamic batch dimension, `dynamic_shapes={"x": {0: '
    'torch.export.Dim("batch")}}`, or with the batch size of the capture.',
)
NO_SHAPE = Message(
    "model/no-shape",
    "{name} of the model {model} has no shape, and its layer is not called in the forward pass",
    "Give the layer its sizes, or leave it out.",
    advice="Give this lazy layer its sizes, or leave it out.",
)
UNKNOWN_MODULE = Message(
    "model/unknown-module",
    "{pattern!r} is no module of the model",
    "{nearest}",
    advice="Correct the name or pattern in `model.eval_modules`, as `model.named_modules()` has "
    "them.",
)
TWO_MODES = Message(
    "model/two-modes",
    "the model {model} calls {layer} in train mode and in eval mode in one forward pass",
    advice="Give each of the two uses a layer of its own.",
)
DROPS_AT_RANDOM = Message(
    "model/drops-at-random",
    "{mode}, but {layer} drops units at random and the client's draw is not known",
    "{without_draws}",
    advice="A capture made with dropout cannot be audited, as every replay would be of another "
    "draw. Let the client make one with its probability set to 0, and set it in `model.kwargs`, "
    "or declare `mode: eval`, or `eval_modules` with this layer, if the client trains so.",
)


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
        raise SpecError(key, NOTHING_IS_TRAINED())
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
    return try_model(model, spec)


def _build(spec: Spec) -> nn.Module:
    declared = spec.model
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
        refuse_batch(spec, images, error)


def _check_recording(module: nn.Module, spec: Spec) -> None:
    """Compares what is fixed in a saved program with the declaration."""
    recording = recording_of(module)
    if recording is None:
        return
    mode, batch_size, saved = spec.model.mode, spec.capture.batch_size, spec.model.origin
    own = "train" if "train" in recording.modes else "eval"
    if recording.modes and own != mode:
        raise SpecError(("model", "mode"), SAVED_IN_OTHER_MODE(mode=mode, file=saved, saved=own))
    if recording.batch not in (None, batch_size):
        raise SpecError(
            ("capture", "batch_size"),
            OTHER_EXPORTED_BATCH(batch_size=batch_size, file=saved, batch=recording.batch),
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
                    ("model", spec.model.source), NO_SHAPE(name=name, model=spec.model.origin)
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
                UNKNOWN_MODULE(pattern=pattern, nearest=nearest(pattern, filter(None, parts))),
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
                ("model", declared.source), TWO_MODES(model=declared.origin, layer=names[layer])
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
            refuse_batch(spec, images, error)


def _prepare_for_training(module: nn.Module, mode: str) -> None:
    """Has the layers that are in train mode do without running statistics."""
    for name, layer in module.named_modules():
        if not layer.training:
            continue
        if isinstance(layer, DROPOUTS) and layer.p > 0:
            raise SpecError(
                ("model", "mode"),
                DROPS_AT_RANDOM(mode=mode, layer=name, without_draws=without_draws(mode)),
            )
        if isinstance(layer, _InstanceNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        if isinstance(layer, _BatchNorm):
            replace_all_batch_norm_modules_(layer)
