"""Loads a generator of the user's own: from a factory or torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ggl_audit.basics.randomness import stream
from ggl_audit.errors import InputError, SpecError, raised
from ggl_audit.inputs.factories import build_module, find_callable
from ggl_audit.inputs.images import fingerprints, read_image_set
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.programs import load_exported
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.inputs.weights import fill_weights
from ggl_audit.messages import Message
from ggl_audit.priors.latents import DeclaredLatents, LatentSpace, fit_gaussian
from ggl_audit.priors.prior import Conversion, Prior
from ggl_audit.spec import Spec

MAPPED_LATENTS = 4096
"""That the Gaussian of W is fitted to; so many axes it can have at most, less one."""

MAPPED_TOGETHER = 256

MAPPING_FAILS = Message(
    "generator/mapping-fails",
    "{call} and failed with {error}",
    "It is called once, as mapping(generator), and returns what maps latents (n, {shape}) to what "
    "the generator takes.",
    advice="Mend `prior.latent_mapping`: it is called once with the generator, and returns what "
    "maps latents to what the generator takes.",
)
ONE_FOR_EACH = "Let the mapping return one float32 tensor with a row for each latent, which differ."
MAPS_TO_ONE = Message(
    "generator/maps-to-one",
    "it maps all latents to the same w",
    advice=ONE_FOR_EACH,
)
NO_EMBEDDING = Message(
    "generator/no-embedding",
    "expected one tensor (classes, features) of floats, found {count}: {found}",
    advice="Save the embedding's weight alone.",
)
EMBEDDING_NOT_FINITE = Message(
    "generator/embedding-not-finite",
    "holds values that are NaN or infinite",
    advice="Save finite numbers.",
)
NO_LATENT_FOR_EACH = Message(
    "generator/no-latent-for-each",
    "it made {shown} of {count} latents; expected one w for each",
    advice=ONE_FOR_EACH,
)
MAPPED_TO_NO_NUMBERS = Message(
    "generator/mapped-to-no-numbers",
    "it gives values that are not finite numbers of float32",
    advice=ONE_FOR_EACH,
)


def load_own(spec: Spec, model: ClientModel) -> Prior:
    """Loads the generator that the spec declares, on the model's device.

    Raises:
        SpecError: the user's code fails, or is not what its key asks for.
        InputError: a file is missing or broken, or does not fit.
    """
    declared = spec.prior
    assert declared.latent is not None
    generator, name = _generator(spec)
    generator.to(model.device).eval().requires_grad_(requires_grad=False)
    classes = None if declared.labels == "none" else declared.classes or model.classes
    embedding = None
    if declared.embedding is not None:
        embedding = _embedding(spec.resolve(declared.embedding)).to(model.device)
        classes = len(embedding)
    space: LatentSpace
    space = own_latents = DeclaredLatents(declared.latent)
    if declared.latent_mapping is not None:
        space = fit_gaussian(_mapped(spec, declared.latent_mapping, generator, own_latents, model))
        if space.size == 0:
            raise SpecError(("prior", "latent_mapping"), MAPS_TO_ONE())
    trained_on = None
    if declared.trained_on is not None:
        key = ("prior", "trained_on")
        trained_on = read_image_set(declared.trained_on, spec.folder, key, "prior", model.shape)
    return Prior(
        generator=generator,
        space=space,
        classes=classes,
        source=f"prior {name}",
        labels="index" if declared.labels == "none" else declared.labels,
        embedding=embedding,
        conversion=Conversion(declared.output_range, declared.colour, declared.resize),
        seen=None if trained_on is None else frozenset(fingerprints(trained_on.images)),
    )


def _generator(spec: Spec) -> tuple[nn.Module, str]:
    declared = spec.prior
    if declared.exported is not None:
        return load_exported(spec.resolve(declared.exported)), declared.exported.name
    assert declared.factory is not None
    torch.manual_seed(spec.seed)
    generator = build_module(declared.factory, declared.kwargs, spec.folder, "prior")
    if declared.weights is not None:
        path = spec.resolve(declared.weights)
        generator.eval()
        fill_weights(generator, path, declared.factory)
    return generator, declared.factory


def _embedding(path: Path) -> torch.Tensor:
    tensors = list(read_tensors(path).values())
    if len(tensors) != 1 or tensors[0].ndim != 2 or not tensors[0].is_floating_point():
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors[:3])
        raise InputError(path, NO_EMBEDDING(count=len(tensors), found=found))
    if not bool(torch.isfinite(tensors[0]).all()):
        raise InputError(path, EMBEDDING_NOT_FINITE())
    return tensors[0].float()


def _mapped(
    spec: Spec, named: str, generator: nn.Module, space: DeclaredLatents, model: ClientModel
) -> torch.Tensor:
    """What the user's mapping makes of random latents, (MAPPED_LATENTS, *w_shape)."""
    key = ("prior", "latent_mapping")
    make: Callable[..., Any] = find_callable(named, spec.folder, key)
    random = stream(spec.seed, "latent mapping")
    drawn = torch.as_tensor(random.standard_normal((MAPPED_LATENTS, space.size)))
    coordinates = drawn.to(model.device, torch.float32)
    call = f"{named} was called with the generator"
    try:
        mapping: Any = make(generator)
        if isinstance(mapping, nn.Module):
            mapping.to(model.device).eval()
        call = f"what {named} returned was called with latents of {space.declared.shape}"
        with torch.no_grad():
            mapped = [mapping(space(part)) for part in coordinates.split(MAPPED_TOGETHER)]
    except (Exception, SystemExit) as error:
        # The mapping is the user's own code.
        shape = ", ".join(map(str, space.declared.shape))
        failed = MAPPING_FAILS(call=call, error=raised(error), shape=shape)
        raise SpecError(key, failed) from error
    for found in mapped:
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != MAPPED_TOGETHER:
            shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise SpecError(key, NO_LATENT_FOR_EACH(shown=shown, count=MAPPED_TOGETHER))
        if found.dtype != torch.float32 or not bool(torch.isfinite(found).all()):
            raise SpecError(key, MAPPED_TO_NO_NUMBERS())
    return torch.cat(mapped)
