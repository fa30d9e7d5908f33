"""Calls the user's own code, and only where the spec names it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ggl_audit.errors import Key, SpecError, nearest
from ggl_audit.inputs.neighbours import Neighbours

_IMPORTED: dict[Path, Neighbours] = {}


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
        raise SpecError(
            key, f"{factory!r} is not file.py:callable, package.module:callable or torchvision:name"
        )
    make = _torchvision(name, key) if source == "torchvision" else _named(source, name, folder, key)
    try:
        module = make(**kwargs)
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a fault in the input, told without a traceback.
        raise SpecError(
            key,
            f"{factory} failed with {type(error).__name__}: {error}",
            f"It was called with {kwargs or 'no arguments'} ({section}.kwargs).",
        ) from error
    if not isinstance(module, nn.Module):
        raise SpecError(
            key, f"{factory} returned a {type(module).__name__}; expected a torch.nn.Module"
        )
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
        raise SpecError(key, f"{named!r} is not file.py:callable or package.module:callable")
    return _named(source, name, folder, key)


def _torchvision(name: str, key: Key) -> Callable[..., Any]:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise SpecError(key, f"torchvision has no model {name!r}", nearest(name, known))

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
        raise SpecError(
            key, f"importing {source} failed with {type(error).__name__}: {error}"
        ) from error
    make = getattr(module, name, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SpecError(key, f"{source} has no callable {name!r}", nearest(name, known))
    return make if beside is None else beside.runs(make)


def _neighbours(file: Path, key: Key) -> Neighbours:
    """What was imported from a file's folder so far, unless it has been changed since."""
    if not file.is_file():
        raise SpecError(key, f"{file} is not a file", "A path is relative to the spec's folder.")
    known = _IMPORTED.get(file.parent)
    if known is None or known.is_stale:
        known = _IMPORTED[file.parent] = Neighbours(file.parent)
    return known
