"""Finds a model's tensors among those of a file: weights, checkpoints and gradients alike."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ggl_audit.errors import AuditError
from ggl_audit.inputs.layouts import CHANNELS_LAST, Arrangements, Sizes, look_channels_last, swapped
from ggl_audit.inputs.names import unwrap_names
from ggl_audit.inputs.tensors import Tensors, is_ordered
from ggl_audit.messages import Message

COUNTER = "num_batches_tracked"
RUNNING = ("running_mean", "running_var")

SCALARS: tuple[Sizes, ...] = ((), (1,))
"""What a tensor of one value has for a shape, which lists of arrays do not keep."""

ROLES = {
    "kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "embedding": "weight",
    "embeddings": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "mean": "running_mean",
    "moving_variance": "running_var",
    "var": "running_var",
}
"""What Keras, TensorFlow and JAX call the tensors of a layer."""

UNKNOWN_LAYOUT = Message(
    "fit/unknown-layout",
    "how {file!r} {shape} lies with channels last is not known: no convolution, linear layer or "
    "normalization of the model uses {name!r} by itself",
    "Save the tensors in PyTorch's layout, and leave {key} out.",
    advice="Save the tensors in PyTorch's layout under the model's names; recurrent and attention "
    "layers are too different to be converted.",
)
TIED_TENSORS_DIFFER = Message(
    "fit/tied-tensors-differ",
    "{first!r} and {second!r} differ, and are one tensor in the model",
    "Is it of a model whose weights are not tied?",
    advice="Give the model in which they are not tied, or the file of one in which they are.",
)
OTHER_SHAPE = Message(
    "fit/other-shape",
    "{file!r} has the shape {shape}; the model's {name!r} has {expected}",
    "{hint}",
    advice="Correct the model (`model.kwargs`: classes, width), or capture what the client sends; "
    "Opacus' `grad_sample` is one gradient for each image, of which the client sends the sum or "
    "mean.",
)
LOOKS_CHANNELS_LAST = Message(
    "fit/looks-channels-last",
    "looks like channels last, as Keras, TensorFlow and JAX have it: {file!r} has the shape "
    "{shape}, the model's {name!r} {expected}",
    "Save the tensors as (out, in, height, width) and (out, in).",
    advice="Declare `capture.layout: channels_last`, or `model.layout` for weights.",
)
IS_PYTORCHS_LAYOUT = Message(
    "fit/is-pytorchs-layout",
    "is in PyTorch's layout, and {key} is {layout}",
    "Leave {key} out.",
    advice="Leave `capture.layout` or `model.layout` out.",
)
TWO_ORDERS = Message(
    "fit/two-orders",
    "is a list without names that may be {first} or {second}",
    "Save the tensors with their names.",
    advice="Save the tensors with their names, as two orders of the model have these shapes.",
)
OTHER_ORDER = Message(
    "fit/other-order",
    "is a list in another order than {known}: the tensor at {place} has the shape {shape}, "
    "{name!r} has {expected}",
    "Save the tensors with their names, or in the model's order.",
)
OTHER_COUNT = Message(
    "fit/other-count",
    "is a list of {count} tensors without names; expected {known}",
    "Save them with their names.",
    advice="Save the tensors with their names, or declare in `capture.unsent` which are never "
    "sent; the message compares the list with each order of the model.",
)
OWN_NAMES_OR_ORDER = (
    "Save the tensors as a list in the model's order, or with its own names: names of another "
    "framework were sorted."
)
SORTED_NAMES = Message(
    "fit/sorted-names",
    "holds {file!r} after others of higher numbers, so its order is not the model's",
    "Save the tensors with the model's own names.",
    advice=OWN_NAMES_OR_ORDER,
)
OTHER_FRAMEWORK = Message(
    "fit/other-framework",
    "holds {file!r} where the model has {name!r}",
    "Save the tensors with the model's own names.",
    advice=OWN_NAMES_OR_ORDER,
)


@dataclass(frozen=True)
class Known:
    """The tensors of a model that a file may hold.

    Attributes:
        tensors: by name, in the order of the state dict.
        orders: the names in each order that a list may have, by what it is of.
        needed: names without which what a file holds is of another model.
        twins: from the further names of tied tensors to their first.
        arrangements: how they lie in a file with channels last; None for PyTorch's layout.
        key: of the spec that declares the layout; None where none does.
        may_lack: whether a file need not hold all that the model has.
    """

    tensors: Tensors
    orders: dict[str, list[str]]
    needed: Collection[str]
    twins: dict[str, str] = field(default_factory=dict)
    arrangements: Arrangements | None = None
    key: str | None = None
    may_lack: bool = False

    def shape(self, name: str) -> Sizes:
        """The shape of a tensor in the model."""
        return tuple(self.tensors[name].shape)

    def shapes(self, name: str) -> tuple[Sizes, ...]:
        """The shapes that a tensor may have in the file."""
        arrangement = (self.arrangements or {}).get(self.twins.get(name, name))
        return (self.shape(name),) if arrangement is None else arrangement.shapes

    def restore(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor of the file as the model has it; None where its value is lost."""
        if not _has_value(self.shape(name), tensor):
            return None
        arrangement = (self.arrangements or {}).get(self.twins.get(name, name))
        return (tensor if arrangement is None else arrangement.restore(tensor)).reshape(
            self.shape(name)
        )

    def fits(self, name: str, found: Sizes) -> bool:
        """Whether a tensor of the file with this shape may be the model's."""
        expected = self.shape(name)
        if found in self.shapes(name) or (expected in SCALARS and found in SCALARS):
            return True
        # torch.Tensor(array) takes a count for a size, and gives so many values or none.
        is_count = name.rpartition(".")[2] == COUNTER and len(found) == 1
        return expected == () and (found == (0,) or is_count)


@dataclass(frozen=True)
class Fit:
    """What of a file is the model's.

    Attributes:
        tensors: by the model's names, in its shapes and layout.
        sources: from the model's names to the file's.
        how: they were matched.
        unknown: names of the file that are of no tensor of the model.
        prefix: that the file's names have before the model's.
    """

    tensors: Tensors
    sources: dict[str, str]
    how: str
    unknown: list[str]
    prefix: str = ""


def know_tensors(
    module: nn.Module,
    state: Tensors,
    trained: Collection[str],
    needed: Collection[str],
    unsent: Collection[str] = (),
    arrangements: Arrangements | None = None,
    key: str | None = None,
    *,
    may_lack: bool = False,
) -> Known:
    """Lists what a file of a model may hold.

    Args:
        module: the model.
        state: its state dict.
        trained: names of the parameters that are trained, in their order.
        needed: see :class:`Known`.
        unsent: names that a list may lack in any order.
        arrangements: see :class:`Known`.
        key: see :class:`Known`.
        may_lack: see :class:`Known`.
    """
    twins = tied_names(module)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    state = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    counts = {name for name in state if name.rpartition(".")[2] == COUNTER}
    whole = {
        "the trained parameters": [name for name in parameters if name in trained],
        "all parameters": [*parameters],
        "the state dict": [*state],
        "the state dict without counts of batches": _without(counts, state),
    }
    orders: dict[str, list[str]] = {}
    for how, order in whole.items():
        kept = _without(unsent, order)
        for less, names in {
            "": order,
            " without what is tied": _without(twins, order),
            " without what is not sent": kept,
            " without what is not sent or tied": _without(twins, kept),
        }.items():
            if names and names not in orders.values():
                orders[how + less] = names
    tensors = {**dict(module.named_buffers()), **parameters}
    tensors = {**state, **{name: t for name, t in tensors.items() if name not in state}}
    return Known(tensors, orders, needed, twins, arrangements, key, may_lack)


def _without(left_out: Collection[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in left_out]


def fit_file(found: Tensors, known: Known) -> Fit:
    """Finds the model's tensors, by name, or by order where the file is a list.

    Names may have lost or gained a wrapper (:func:`unwrap_names`); of tied tensors one name is
    enough. A scalar may have the shape (1,), and a count of batches any.

    Raises:
        AuditError: they do not fit, or in more than one way.
    """
    if is_ordered(found):
        return _fit_order([*found], found, known)
    single = set(known.needed) - set(known.twins.values())
    fitted = unwrap_names(found, known.tensors, single)
    if not fitted and known.arrangements is not None:
        return _fit_foreign(found, known)
    if not fitted:
        _refuse_other_layout(dict.fromkeys(known.orders), found, known)
    files = {name: file for file, name in fitted.items()}
    pairs = [(files[name], name) for name in known.tensors if name in files]
    _check_shapes(pairs, found, known)
    sources, tensors = _restored(pairs, found, known)
    lost = {file for file, name in pairs if found[file].numel() > 1 and known.shape(name) == ()}
    unknown = [name for name in found if name not in fitted or name in lost]
    file, name = next(iter(pairs), ("", ""))
    how, prefix = "name", file.removesuffix(name) if file.endswith(name) else ""
    if prefix:
        how = f"name without {prefix!r}"
    elif file and name != file and name.endswith(file):
        how = f"name with {name.removesuffix(file)!r}"
    return Fit(tensors, sources, how + _layout(known), unknown, prefix)


def _layout(known: Known) -> str:
    return "" if known.arrangements is None else ", channels last"


def tied_names(module: nn.Module) -> dict[str, str]:
    """From the further names of tensors that a module has under several, to their first."""
    first: dict[int, str] = {}
    twins = {}
    for held in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in held:
            if first.setdefault(id(tensor), name) != name:
                twins[name] = first[id(tensor)]
    return twins


def _has_value(expected: Sizes, tensor: torch.Tensor) -> bool:
    return expected != () or tensor.numel() == 1


def _restored(
    pairs: list[tuple[str, str]], found: Tensors, known: Known
) -> tuple[dict[str, str], Tensors]:
    """The sources and the tensors of the model, tied ones by their first name."""
    sources: dict[str, str] = {}
    tensors: Tensors = {}
    for file, name in pairs:
        tensor = known.restore(name, found[file])
        if tensor is None:
            continue
        first, shape = known.twins.get(name, name), known.shape(name)
        if (
            known.arrangements is not None
            and first not in known.arrangements
            and sum(size > 1 for size in shape) > 1
        ):
            raise AuditError(UNKNOWN_LAYOUT(file=file, shape=shape, name=name, key=known.key))
        if first in tensors and not torch.equal(tensors[first], tensor):
            raise AuditError(TIED_TENSORS_DIFFER(first=sources[first], second=file))
        if first not in tensors:
            sources[first], tensors[first] = file, tensor
    return sources, tensors


def _check_shapes(pairs: list[tuple[str, str]], found: Tensors, known: Known) -> None:
    wrong = [(file, n) for file, n in pairs if not known.fits(n, tuple(found[file].shape))]
    if not wrong:
        return
    _refuse_layout(pairs, found, known)
    file, name = wrong[0]
    shape, expected = tuple(found[file].shape), known.shapes(name)[0]
    if shape[1:] == expected:
        hint = (
            f"One gradient for each of {shape[0]} samples (Opacus' grad_sample)? Capture what the "
            "client sends: their mean or sum."
        )
    elif len(shape) > 1 and swapped(shape) == expected:
        hint = f"Is it transposed? PyTorch has a layer's weights as {expected}."
    else:
        hint = same_shape_hint(shape, known)
    raise AuditError(OTHER_SHAPE(file=file, shape=shape, name=name, expected=expected, hint=hint))


def same_shape_hint(shape: Sizes, known: Known, missing: Collection[str] | None = None) -> str:
    """Says which tensors of the model have a shape, of those that the file lacks if any do."""
    fitting = [n for n in known.tensors if known.shape(n) == shape and n not in known.twins]
    lacking = [name for name in fitting if missing is None or name in missing]
    if lacking:
        return f"Of the model's tensors, {' or '.join(map(repr, lacking[:3]))} has that shape."
    if fitting:
        listed = " or ".join(map(repr, fitting[:3]))
        return f"{listed} of the model has that shape, and the file holds it by its own name."
    return "No tensor of the model has that shape: is it of another model?"


def _refuse_layout(pairs: list[tuple[str, str]], found: Tensors, known: Known) -> None:
    """Says so where all would fit in the other layout."""
    sizes = {file: tuple(found[file].shape) for file, _ in pairs}
    judged = [
        (file, name)
        for file, name in pairs
        if len(known.shape(name)) > 1 or not known.fits(name, sizes[file])
    ]
    shapes = [(sizes[file], known.shape(name)) for file, name in judged]
    if known.arrangements is None and look_channels_last(shapes):
        (file, name), (shape, expected) = next(
            both for both in zip(judged, shapes, strict=True) if both[1][0] != both[1][1]
        )
        said = LOOKS_CHANNELS_LAST(file=file, shape=shape, name=name, expected=expected)
        declare = f"Declare {known.key}: {CHANNELS_LAST}."
        raise AuditError(said.advising(declare) if known.key else said)
    if known.arrangements is not None and all(one == other for one, other in shapes):
        raise AuditError(IS_PYTORCHS_LAYOUT(key=known.key, layout=CHANNELS_LAST))


def _refuse_other_layout(hows: Collection[str], found: Tensors, known: Known) -> None:
    for how in hows:
        if len(known.orders[how]) == len(found):
            pairs = list(zip(found, known.orders[how], strict=True))
            _refuse_layout(pairs, found, known)


def _fit_order(files: list[str], found: Tensors, known: Known) -> Fit:
    shapes = [tuple(found[file].shape) for file in files]
    fitting = {
        how: order
        for how, order in known.orders.items()
        if len(order) == len(shapes) and all(map(known.fits, order, shapes))
    }
    if not fitting:
        _refuse_order(shapes, found, known)
    fits = {
        how: _restored(list(zip(files, order, strict=True)), found, known)
        for how, order in fitting.items()
    }
    (how, (sources, tensors)), *others = fits.items()
    for other, (elsewhere, _) in others:
        if any(sources.get(name) != elsewhere.get(name) for name in known.needed):
            raise AuditError(TWO_ORDERS(first=how, second=other))
    return Fit(tensors, sources, f"order of {how}{_layout(known)}", [])


def _refuse_order(shapes: list[Sizes], found: Tensors, known: Known) -> None:
    """Says what a list that has no order of the model looks like against each."""
    _refuse_other_layout(known.orders, found, known)
    for how, order in known.orders.items():
        expected = [known.shapes(name)[0] for name in order]
        if sorted(expected) == sorted(shapes):
            place = next(i for i, shape in enumerate(expected) if shape != shapes[i])
            raise AuditError(
                OTHER_ORDER(
                    known=how,
                    place=place,
                    shape=shapes[place],
                    name=order[place],
                    expected=expected[place],
                )
            )
    compared = "; ".join(
        f"{len(order)} for {how} ({_difference(shapes, order, known)})"
        for how, order in known.orders.items()
    )
    said = OTHER_COUNT(count=len(shapes), known=compared)
    declare = "Save them with their names, or declare capture.unsent where some are never sent."
    raise AuditError(said.advising(declare) if known.may_lack else said)


def _difference(shapes: list[Sizes], order: list[str], known: Known) -> str:
    for place, (shape, name) in enumerate(zip(shapes, order, strict=False)):
        if not known.fits(name, shape):
            return f"at {place} it has {shape} where {name!r} has {known.shapes(name)[0]}"
    if len(shapes) < len(order):
        return f"it ends before {order[len(shapes)]!r}"
    return f"it goes on after {order[-1]!r}"


def _fit_foreign(found: Tensors, known: Known) -> Fit:
    """Reads a file whose names are of another framework by its order.

    Raises:
        AuditError: the order is not the model's, or sorted by name, which layers are not.
    """
    files = [*found]
    numbers: dict[str, tuple[int, ...]] = {}
    for file in files:
        stem, own = re.sub(r"\d+", "", file), tuple(map(int, re.findall(r"\d+", file)))
        if own < numbers.get(stem, ()):
            raise AuditError(SORTED_NAMES(file=file))
        numbers[stem] = own
    fit = _fit_order(files, found, known)
    for name, file in fit.sources.items():
        role = ROLES.get(re.split(r"[^a-z_]+", file.removesuffix(":0").lower())[-1])
        if role is not None and role != name.rpartition(".")[2]:
            raise AuditError(OTHER_FRAMEWORK(file=file, name=name))
    return Fit(fit.tensors, fit.sources, f"{fit.how}, as no name is the model's", [])
