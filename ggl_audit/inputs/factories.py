"""Calls the user's own code, and only where the spec names it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ggl_audit.errors import Key, SpecError, nearest, raised
from ggl_audit.inputs.neighbours import Neighbours
from ggl_audit.messages import Message

_IMPORTED: dict[Path, Neighbours] = {}

NO_SOURCE = Message(
    "code/no-source",
    "{factory!r} is not file.py:callable, package.module:callable or torchvision:name",
    advice="Write the source, a colon and the name, for example `models.py:net`.",
)
FAILS = Message(
    "code/fails",
    "{callable} failed with {error}",
    "{how}",
    advice="Mend the code, or the arguments (`kwargs`, the defense's parameters) that it was "
    "called with.",
)
NO_MODULE = Message(
    "code/no-module",
    "{factory} returned a {kind}; expected a torch.nn.Module",
    advice="Return the module itself, not a tuple, a state dict or a wrapper.",
)
NO_CALLABLES_SOURCE = Message(
    "code/no-callables-source",
    "{text!r} is not file.py:callable or package.module:callable",
    advice="Write the source, a colon and the name, for example `models.py:net`.",
)
UNKNOWN_MODEL = Message(
    "model/unknown-model",
    "torchvision has no model {name!r}",
    "{nearest}",
    advice="Choose one of `torchvision.models.list_models()`.",
)
IMPORT_FAILS = Message(
    "code/import-fails",
    "importing {source} failed with {error}",
    advice="Import it by itself in the same environment and mend what fails; files beside it are "
    "found, a package has to be installed there.",
)
NO_CALLABLE = Message(
    "code/no-callable",
    "{source} has no callable {name!r}",
    "{nearest}",
    advice="Correct the name; the message has the nearest ones of that file.",
)
NO_CODE = Message(
    "code/no-code",
    "{file} is not a file",
    "A path is relative to the spec's folder.",
    advice="Correct the path to the Python file, which starts at the folder of the spec.",
)


def build_module(factory: str, kwargs: dict[str, Any], folder: Path, section: str) -> nn.Module:
    """Builds a module from what the spec calls a factory.

    Args:
        factory: ``file.py:callable`` (looked up in ``folder``), ``package.module:callable`` or
            ``torchvision:name``.
        kwargs: arguments of the callable.
        folder: the folder of the spec.
        section: the section of the spec, ``model`` or ``prior``, for messages.

    Raises:
        SpecError: the callable is not there, fails, or returns something else than a module.
    """
    key: Key = (section, "factory")
    source, separator, name = factory.rpartition(":")
    if not separator or not source or not name:
        raise SpecError(key, NO_SOURCE(factory=factory))
    make = _torchvision(name, key) if source == "torchvision" else _named(source, name, folder, key)
    try:
        module = make(**kwargs)
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a fault in the input, told without a traceback.
        how = f"It was called with {kwargs or 'no arguments'} ({section}.kwargs)."
        raise SpecError(key, FAILS(callable=factory, error=raised(error), how=how)) from error
    if not isinstance(module, nn.Module):
        raise SpecError(key, NO_MODULE(factory=factory, kind=type(module).__name__))
    return module


def find_callable(named: str, folder: Path, key: Key) -> Callable[..., Any]:
    """Finds a function of the user's own code.

    Args:
        named: ``file.py:callable`` (looked up in ``folder``) or ``package.module:callable``.
        folder: the folder of the spec.
        key: for messages.

    Raises:
        SpecError: it is not there.
    """
    source, separator, name = named.rpartition(":")
    if not separator or not source or not name:
        raise SpecError(key, NO_CALLABLES_SOURCE(text=named))
    return _named(source, name, folder, key)


def _torchvision(name: str, key: Key) -> Callable[..., Any]:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise SpecError(key, UNKNOWN_MODEL(name=name, nearest=nearest(name, known)))

    def make(**kwargs: Any) -> Any:
        return torchvision.models.get_model(name, weights=None, **kwargs)

    return make


def _named(source: str, name: str, folder: Path, key: Key) -> Callable[..., Any]:
    beside = None
    try:
        if source.endswith(".py"):
            file = (folder / source).absolute()
            beside = _neighbours(file, key)
            # What is drawn while a file is imported, once, is no part of what its callables draw.
            with torch.random.fork_rng(devices=[]):
                module = beside.load(file)
        else:
            module = importlib.import_module(source)
    except SpecError:
        raise
    except (Exception, SystemExit) as error:
        raise SpecError(key, IMPORT_FAILS(source=source, error=raised(error))) from error
    make = getattr(module, name, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SpecError(key, NO_CALLABLE(source=source, name=name, nearest=nearest(name, known)))
    return make if beside is None else beside.runs(make)


def _neighbours(file: Path, key: Key) -> Neighbours:
    """What was imported from a file's folder so far, unless it has been changed since."""
    if not file.is_file():
        raise SpecError(key, NO_CODE(file=file))
    known = _IMPORTED.get(file.parent)
    if known is None or known.is_stale:
        known = _IMPORTED[file.parent] = Neighbours(file.parent)
    return known
