"""Loads the prior that a spec names: bundled, trained by this tool, or the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ggl_audit.errors import InputError, SpecError, nearest
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.messages import Message
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME, read_card
from ggl_audit.priors.generator import Generator
from ggl_audit.priors.latents import DeclaredLatents
from ggl_audit.priors.own import load_own
from ggl_audit.priors.prior import Conversion, Prior
from ggl_audit.priors.trial import try_out
from ggl_audit.spec import LatentSpec, PriorSpec, Spec

SAMPLES_TOGETHER = 256

NO_BUNDLED_PRIOR = Message(
    "generator/no-bundled-prior",
    "there is no bundled prior {name!r}",
    "{nearest}",
    advice="Choose one of `ggl-audit list priors`, or give the folder of a trained one.",
)
DRAWS_BY_CLASS = Message(
    "generator/draws-by-class",
    "{prior} draws images of a class, but what images are to give is more than a class",
    "Give an unconditional one.",
    advice="Give an unconditional generator, `labels: none`.",
)
OTHER_CLASSES = Message(
    "generator/other-classes",
    "{prior} knows {known} classes; the model has {classes}",
    advice="Give a prior of the model's classes, or an unconditional one; check `prior.classes`.",
)
OTHER_ARCHITECTURE = Message(
    "generator/other-architecture",
    "does not fit the architecture in {card}",
    advice="Give a folder that `ggl-audit prior train` wrote, whole and unchanged.",
)
NO_FINGERPRINTS = Message(
    "generator/no-fingerprints",
    "holds no fingerprints of the images that the prior was trained on",
    advice="Give a folder that `ggl-audit prior train` wrote, whole and unchanged.",
)


def bundled_folder() -> Path:
    """The folder of bundled priors: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "gan_weights"
    return inside if inside.is_dir() else package.parent / "gan_weights"


def bundled_names() -> list[str]:
    """The bundled priors."""
    return sorted(card.parent.name for card in bundled_folder().glob(f"*/{CARD_NAME}"))


def prior_folder(spec: PriorSpec, base: Path) -> Path | None:
    """The folder of a bundled or trained prior; None for the user's own.

    Raises:
        SpecError: there is no bundled prior of that name.
    """
    if spec.bundled is not None:
        if spec.bundled not in bundled_names():
            raise SpecError(
                ("prior", "bundled"),
                NO_BUNDLED_PRIOR(name=spec.bundled, nearest=nearest(spec.bundled, bundled_names())),
            )
        return bundled_folder() / spec.bundled
    return None if spec.trained is None else base / spec.trained


def load_prior(spec: Spec, model: ClientModel) -> Prior:
    """Loads the prior, and tries whether it draws what the model takes.

    Raises:
        SpecError: its images have another size or range, it does not know all the model's classes,
            or the user's generator cannot be searched.
        InputError: a file is missing or broken.
    """
    declared = spec.prior
    folder = prior_folder(declared, spec.folder)
    if folder is None:
        prior = load_own(spec, model)
    else:
        prior = load_trained(folder)
        prior.generator.to(model.device)
        if declared.colour is not None or declared.resize is not None:
            # The reference images are of another size than those that it was trained on.
            conversion = Conversion(colour=declared.colour, resize=declared.resize)
            prior = replace(prior, conversion=conversion, seen=None)
    if prior.classes is not None and model.targets is not None:
        raise SpecError(("prior",), DRAWS_BY_CLASS(prior=prior.source))
    if prior.classes is not None and prior.classes < model.classes:
        raise SpecError(
            ("prior",),
            OTHER_CLASSES(prior=prior.source, known=prior.classes, classes=model.classes),
        )
    doubts = try_out(prior, declared, model.shape, model.classes, spec.seed, model.device)
    return replace(prior, doubts=tuple(doubts))


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
        raise InputError(path, OTHER_ARCHITECTURE(card=CARD_NAME)) from None
    return Prior(
        generator=generator.eval().requires_grad_(requires_grad=False),
        space=DeclaredLatents(LatentSpec(shape=[card.architecture.latent])),
        classes=card.architecture.classes,
        source=f"prior {folder.name}",
        seen=_seen(folder / SEEN_NAME),
    )


def _seen(path: Path) -> frozenset[int] | None:
    if not path.is_file():
        return None
    marks = read_tensors(path).get("fingerprints")
    if marks is None or marks.ndim != 1 or marks.dtype != torch.int64:
        raise InputError(path, NO_FINGERPRINTS())
    return frozenset(marks.tolist())


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
