"""Fits names of tensors to those of a model, through what wrappers put before them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ggl_audit.errors import AuditError
from ggl_audit.messages import Message

COMPILED = "_orig_mod"
SAVED, ADAPTER = "modules_to_save", "default"
WRAPPERS = frozenset({"module", "_module", "model", "net", COMPILED})
"""What DistributedDataParallel, Opacus, Lightning modules and torch.compile put before a name."""

TENSORS_NAMED_ALIKE = Message(
    "tensors/named-alike",
    "{first!r} and {second!r} are of one name",
    "Save the tensors of one model only.",
    advice="Save the tensors of one model only; the file holds two that both fit.",
)
TWO_WRAPPERS = Message(
    "tensors/two-wrappers",
    "{first!r} and {second!r} are of two wrappers; either may be it",
    "Save the tensors of one model only.",
    advice="Save the tensors of one model only; the file holds two that both fit.",
)


def unwrap_names(
    found: Iterable[str], wanted: Iterable[str], needed: Collection[str] = ()
) -> dict[str, str]:
    """Finds the names of a model among those of a file, one of which may be of a wrapped module.

    One prefix, of ``module.``, ``_module.``, ``model.``, ``net.`` and ``_orig_mod.`` in any order
    and number, is taken off all names of the file, or off all names of the model;
    ``_orig_mod.`` and the name of PEFT's adapter are taken out wherever they stand. Where that does
    not find all needed names, any other prefix is taken off that does: a Lightning module calls its
    model what it likes.

    Args:
        found: of the file, which may hold others too: a Lightning module's ``loss.weight``.
        wanted: of the model.
        needed: those of the model that any other prefix has to find; without, there is none.

    Returns:
        From found names to wanted ones, for those that are there, in the order of ``found``.

    Raises:
        AuditError: they fit in more than one way.
    """
    every = list(found)
    files = {_plain(name): name for name in every}
    if len(files) < len(every):
        twice = next(name for name in every if files[_plain(name)] != name)
        raise AuditError(TENSORS_NAMED_ALIKE(first=twice, second=files[_plain(twice)]))
    names = {_plain(name): name for name in wanted}
    fits: dict[tuple[str, str], dict[str, str]] = {}
    for file in files:
        for prefix, rest in _unwrapped(file):
            if rest in names:
                fits.setdefault((prefix, ""), {})[files[file]] = names[rest]
    for name in names:
        for prefix, rest in _unwrapped(name):
            if rest in files and prefix:
                fits.setdefault(("", prefix), {})[files[rest]] = names[name]
    best = max(fits.values(), key=len, default={})
    if needed and not set(needed) <= set(best.values()):
        others = _other_prefixes(files, names, set(needed))
        fits = {**fits, **others} if others else fits
        best = max(others.values(), key=len, default=best)
    for other in fits.values():
        for file, name in other.items():
            if file not in best:
                first = next((own for own in best if best[own] == name), next(iter(best)))
                raise AuditError(TWO_WRAPPERS(first=first, second=file))
    return {file: best[file] for file in files.values() if file in best}


def _other_prefixes(
    files: dict[str, str], names: dict[str, str], needed: set[str]
) -> dict[tuple[str, str], dict[str, str]]:
    """What fits all needed names once any other prefix is off, as in :func:`unwrap_names`."""
    fits: dict[tuple[str, str], dict[str, str]] = {}
    for file in files:
        parts = file.split(".")
        for count in range(1, len(parts)):
            rest = ".".join(parts[count:])
            if rest in names:
                prefix = ".".join(parts[:count]) + "."
                fits.setdefault((prefix, ""), {})[files[file]] = names[rest]
    first = next(iter(names), "").split(".")
    for count in range(1, len(first)):
        prefix = ".".join(first[:count]) + "."
        if all(name.startswith(prefix) for name in names):
            fits["", prefix] = {
                files[rest]: names[name]
                for name in names
                if (rest := name.removeprefix(prefix)) in files
            }
    return {way: fit for way, fit in fits.items() if needed <= set(fit.values())}


def _plain(name: str) -> str:
    """A name without what torch.compile, and PEFT for its one adapter, put into it."""
    parts = [part for part in name.split(".") if part != COMPILED]
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if part != SAVED and not (part == ADAPTER and before.startswith(("lora_", SAVED)))
    ]
    return ".".join(kept)


def _unwrapped(name: str) -> Iterator[tuple[str, str]]:
    """The prefixes of wrappers that a name has, none at first, and what is left without each."""
    prefix = ""
    while True:
        yield prefix, name
        word, separator, rest = name.partition(".")
        if word not in WRAPPERS or not separator:
            return
        prefix, name = f"{prefix}{word}.", rest
