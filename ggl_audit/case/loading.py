"""The declared defense and the client's model under it, built, bound and tried."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.func import vmap

from ggl_audit.basics.gradient import Gradient, each, take
from ggl_audit.client.randomness import client_context
from ggl_audit.defenses import Context, Pipeline, build_pipeline, is_own, known
from ggl_audit.defenses.capabilities import rounds_remembered
from ggl_audit.errors import Key, SpecError, nearest, raised, reason
from ggl_audit.inputs.factories import FAILS
from ggl_audit.inputs.fitting import tied_names
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.statistics import Statistics
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

NOTHING_LEFT = Message(
    "capture/nothing-left",
    "no parameter is left that is trained and sent",
    advice="Take patterns out of `model.frozen` and `capture.unsent`.",
)
RAW_BUT_NOT_A_GRADIENTS = Message(
    "capture/raw-but-not-a-gradients",
    "raw, but {defense} acts on images, on the model, on each sample or on a cohort, and cannot "
    "be applied to one gradient afterwards",
    "Declare stage: defended, or make the capture with `ggl-audit capture`.",
    advice="Declare `stage: defended` with a capture of what is sent, or make the capture with "
    "`ggl-audit capture`.",
)
NO_SUCH_PARAMETER = Message(
    "model/no-such-parameter",
    "{pattern!r} is no trained parameter of the model",
    "{nearest}",
    advice="Correct the name or pattern in `model.frozen`; what the code freezes need not be "
    "named.",
)
NO_SUCH_TENSOR = Message(
    "model/no-such-tensor",
    "{pattern!r} is no parameter or buffer of the model",
    "{nearest}",
    advice="Correct the name or pattern in `capture.unsent`: it is of entries of the state dict.",
)
NOISE_IN_EVERY_STEP = Message(
    "defense/noise-in-every-step",
    "{recipe} adds noise in every local step, which an update is not audited for",
    "Audit one step's gradient, or declare what is done to the update (dp_fedavg).",
    advice="Audit one step's gradient, or declare what is done to the update (`dp_fedavg`).",
)
DIVIDES_BY_BATCH = Message(
    "defense/divides-by-batch",
    "{batch_size}, but {recipe} divides its noise by capture.batch_size, 1",
    "Declare the clip and the noise as separate steps, or capture a batch.",
    advice="Declare the clip (`unit: sample`) and the noise as steps of their own, or capture a "
    "batch.",
)
OTHER_NAMES_OR_SHAPES = Message(
    "defense/other-names-or-shapes",
    "{name} does not keep the names and the shapes of a gradient",
    advice="Write the class as in [the "
    "README](../README.md#what-a-client-can-do-and-what-is-captured): a `Defense` with a `name`, "
    "whose `apply` and `replicate` return tensors by the same names and shapes.",
)


def load_client(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    unsent: Collection[str] = (),
) -> tuple[Pipeline, ClientModel]:
    """Builds the declared defense and the client's model under it.

    Args:
        spec: declares both.
        device: where the model is to be.
        dtype: of its parameters.
        unsent: parameters that are never sent, beside those that are declared so.

    Raises:
        AuditError: one of them cannot be built, or they do not fit each other.
    """
    samples = spec.capture.batch_size if spec.model.loss.reduction == "mean" else 1
    for step in spec.defense:
        kind = known().get(step.name or "")
        if kind is not None and kind.divides_by_batch:
            _check_batch(kind.name, spec)
    defense = build_pipeline(spec.defense, spec.folder, samples)

    def misfit(error: ValueError) -> SpecError:
        return SpecError(("defense",), reason(error).after(f"{defense}: "))

    def wrap(module: nn.Module) -> nn.Module:
        try:
            return defense.training.wrap(module)
        except ValueError as error:
            raise misfit(error) from None

    model = load_model(spec, device, dtype, wrap)
    model = replace(model, unsent=_unsent(spec.capture.unsent, model))
    fixed = {*_frozen(spec.model.frozen, model), *_never_sent(model), *unsent}
    if len(fixed) == len(model.parameters):
        raise SpecError(("capture", "unsent"), NOTHING_LEFT())
    if fixed:
        model = model.without(fixed)
    try:
        defense = defense.bind(model)
    except ValueError as error:
        raise misfit(error) from None
    _try_own_steps(defense, model, spec)
    if spec.capture.stage == "raw" and not defense.acts_on_a_gradient():
        raise SpecError(("capture", "stage"), RAW_BUT_NOT_A_GRADIENTS(defense=defense))
    return defense, model


def observe_statistics(
    model: ClientModel,
    defense: Pipeline,
    names: Sequence[str],
    unit: float,
    rounding: float = 0.0,
) -> tuple[ClientModel, Pipeline]:
    """Has what clients send hold running statistics as well.

    Args:
        model: the client's.
        defense: bound to it.
        names: of the buffers; those that the model does not keep in its mode are left out.
        unit: see :class:`Statistics`.
        rounding: see :class:`Statistics`.
    """
    kept = {n for layer in model.normalizations for n in (*layer.names, layer.counter)}
    own = tuple(name for name in names if name in kept)
    if not own:
        return model, defense
    model = replace(model, statistics=Statistics(model.normalizations, own, unit, rounding))
    return model, Pipeline(defense.steps, model)


def _frozen(patterns: list[str], model: ClientModel) -> list[str]:
    """The trained parameters that model.frozen stands for."""
    return _named(patterns, model.parameters, ("model", "frozen"))


def _unsent(patterns: list[str], model: ClientModel) -> frozenset[str]:
    """The names of the state dict that capture.unsent stands for."""
    whole = {**model.state, **model.parameters, **model.constants}
    return frozenset(_named(patterns, whole, ("capture", "unsent"), buffers=True))


def _never_sent(model: ClientModel) -> list[str]:
    """The trained parameters of which capture.unsent has all names, where they are tied."""
    names = {name: [name] for name in model.parameters}
    for name, first in tied_names(model.module).items():
        if first in names:
            names[first].append(name)
    return [first for first, own in names.items() if model.unsent.issuperset(own)]


def _named(
    patterns: list[str], names: Collection[str], key: Key, *, buffers: bool = False
) -> list[str]:
    """The names that names or patterns stand for."""
    named = []
    for index, pattern in enumerate(patterns):
        own = fnmatch.filter(names, pattern)
        if not own:
            none = NO_SUCH_TENSOR if buffers else NO_SUCH_PARAMETER
            said = none(pattern=pattern, nearest=nearest(pattern, names))
            raise SpecError((*key, index), said)
        named += own
    return named


def _check_batch(recipe: str, spec: Spec) -> None:
    if spec.capture.kind == "update":
        raise SpecError(("defense",), NOISE_IN_EVERY_STEP(recipe=recipe))
    if spec.client is not None and spec.client.batch_size > 1 and spec.capture.batch_size == 1:
        raise SpecError(
            ("client", "batch_size"),
            DIVIDES_BY_BATCH(batch_size=spec.client.batch_size, recipe=recipe),
        )


def _try_own_steps(defense: Pipeline, model: ClientModel, spec: Spec) -> None:
    """Runs a user's own steps once.

    Raises:
        SpecError: one fails, or changes the names or the shapes of a gradient.
    """
    context = client_context(spec.seed, "own steps", model.device)
    for index, step in enumerate(defense.steps):
        if not is_own(step) or rounds_remembered(step):
            continue
        gradient, alone = each(torch.ones_like, model.parameters), Pipeline([step], model)
        try:
            sent, replica = _sent_and_replicated(alone, gradient, context)
            fits = all(
                {n: t.shape for n, t in other.items()} == {n: t.shape for n, t in gradient.items()}
                for other in (sent, replica)
            )
        except (Exception, SystemExit) as error:
            # Whatever the user's own code raises is a fault in the input.
            failed = FAILS(callable=step.name, error=raised(error), how="")
            raise SpecError(("defense", index), failed) from error
        if not fits:
            raise SpecError(("defense", index), OTHER_NAMES_OR_SHAPES(name=step.name))


def _sent_and_replicated(
    step: Pipeline, gradient: Gradient, context: Context
) -> tuple[Gradient, Gradient]:
    sent = step.apply(step.training.clip_samples(gradient), context)

    def replicated(candidate: Gradient) -> Gradient:
        return step.replica.replicate([candidate], sent)

    return sent, take(vmap(replicated)(each(lambda tensor: tensor[None], gradient)), 0)
