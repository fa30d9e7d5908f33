"""Loads the prior that a spec names: bundled, trained by this tool, or from a factory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ggl_audit.errors import InputError, SpecError, nearest
from ggl_audit.inputs.factories import build_module
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image_set
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME, read_card
from ggl_audit.priors.generator import Generator
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import LatentSpec, PriorSpec, Spec

SAMPLES_TOGETHER = 256


def bundled_folder() -> Path:
    """The folder of bundled priors: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "gan_weights"
    return inside if inside.is_dir() else package.parent / "gan_weights"


def bundled_names() -> list[str]:
    """The bundled priors."""
    return sorted(card.parent.name for card in bundled_folder().glob(f"*/{CARD_NAME}"))


def prior_folder(spec: PriorSpec, base: Path) -> Path | None:
    """The folder of a bundled or trained prior; None for a factory's.

    Raises:
        SpecError: there is no bundled prior of that name.
    """
    if spec.bundled is not None:
        if spec.bundled not in bundled_names():
            raise SpecError(
                ("prior", "bundled"),
                f"there is no bundled prior {spec.bundled!r}",
                nearest(spec.bundled, bundled_names()),
            )
        return bundled_folder() / spec.bundled
    return None if spec.trained is None else base / spec.trained


def load_prior(spec: Spec, model: ClientModel) -> Prior:
    """Loads the prior and checks that it draws what the model takes.

    Raises:
        SpecError: its images have another size, or it does not know all the model's classes.
        InputError: a file is missing or broken.
    """
    folder = prior_folder(spec.prior, spec.folder)
    prior = _from_factory(spec, model.classes) if folder is None else load_trained(folder)
    prior.generator.to(model.device).eval().requires_grad_(requires_grad=False)
    try:
        shape = prior.shape()
    except (Exception, SystemExit) as error:
        # A factory's generator is the user's own code.
        raise SpecError(
            ("prior",), f"the generator fails on two latents ({type(error).__name__}: {error})"
        ) from error
    if shape != model.shape:
        raise SpecError(
            ("prior",),
            f"{prior.source} draws images of {list(shape)} (channels, height, width); "
            f"the model takes {list(model.shape)}",
            "Give a prior of that size: `ggl-audit prior train` makes one from your images.",
        )
    if prior.classes is not None and prior.classes < model.classes:
        raise SpecError(
            ("prior",),
            f"{prior.source} knows {prior.classes} classes; the model has {model.classes}",
        )
    return prior


def load_trained(folder: Path) -> Prior:
    """Loads a folder that ``ggl-audit prior train`` wrote.

    Raises:
        InputError: the card or the weights are missing or broken.
    """
    card = read_card(folder)
    generator = Generator(card.architecture)
    path = folder / WEIGHTS_NAME
    weights = read_tensors(path)
    try:
        generator.load_state_dict(weights)
    except RuntimeError:
        raise InputError(path, f"does not fit the architecture in {CARD_NAME}") from None
    return Prior(
        generator=generator.eval().requires_grad_(requires_grad=False),
        latent=LatentSpec(shape=[card.architecture.latent]),
        classes=card.architecture.classes,
        output_range=(-1.0, 1.0),
        source=f"prior {folder.name}",
        seen=_seen(folder / SEEN_NAME),
    )


def _seen(path: Path) -> frozenset[int] | None:
    if not path.is_file():
        return None
    marks = read_tensors(path).get("fingerprints")
    if marks is None or marks.ndim != 1 or marks.dtype != torch.int64:
        raise InputError(path, "holds no fingerprints of the images that the prior was trained on")
    return frozenset(marks.tolist())


def _from_factory(spec: Spec, classes: int) -> Prior:
    declared = spec.prior
    assert declared.factory is not None
    assert declared.latent is not None
    torch.manual_seed(spec.seed)
    generator = build_module(declared.factory, declared.kwargs, spec.folder, "prior")
    if declared.weights is not None:
        path = spec.resolve(declared.weights)
        try:
            generator.load_state_dict(read_tensors(path))
        except RuntimeError as error:
            first = str(error).strip().splitlines()
            raise InputError(
                path, f"does not fit {declared.factory}: {first[-1].strip()}"
            ) from None
    trained_on = None
    if declared.trained_on is not None:
        key = ("prior", "trained_on")
        trained_on = read_image_set(declared.trained_on, spec.folder, key, "prior")
    return Prior(
        generator=generator,
        latent=declared.latent,
        classes=classes if declared.conditional else None,
        output_range=declared.output_range,
        source=f"prior {declared.factory}",
        seen=None if trained_on is None else frozenset(fingerprints(trained_on.images)),
    )


def sample_images(prior: Prior, labels: torch.Tensor, random: np.random.Generator) -> ImageSet:
    """Draws images from the prior, for audits without a reference set.

    Args:
        prior: the generator.
        labels: (n,), the class of each image; an unconditional prior draws any image for it.
        random: draws the latents.
    """
    latents = torch.as_tensor(random.standard_normal((len(labels), prior.size)))
    images = [
        prior.decode(latent.to(labels.device, torch.float32), label)
        for latent, label in zip(
            latents.split(SAMPLES_TOGETHER), labels.split(SAMPLES_TOGETHER), strict=True
        )
    ]
    return ImageSet(torch.cat(images), labels, f"samples of {prior.source}")
