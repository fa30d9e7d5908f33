"""The card of a trained prior: what it was made of, how, and how good it is."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import InputError, dotted
from ggl_audit.inputs.yaml_file import read_yaml
from ggl_audit.messages import Message
from ggl_audit.priors.generator import Architecture

CARD_NAME = "card.yaml"
WEIGHTS_NAME = "generator.safetensors"
SHEET_NAME = "samples.png"
SEEN_NAME = "seen.safetensors"

NO_CARD = Message(
    "generator/no-card",
    "no {card} in it",
    "Give a folder that `ggl-audit prior train` wrote.",
    advice="Give a folder that `ggl-audit prior train` wrote, whole and unchanged.",
)
OTHER_CARD = Message(
    "generator/other-card",
    "not a prior's card ({key}: {reason})",
    advice="Give a folder that `ggl-audit prior train` wrote, whole and unchanged.",
)


class Inversion(BaseModel):
    """How well the generator can represent images that it has not seen, at best.

    Attributes:
        images: how many were inverted, by Adam on the latent against the pixels.
        psnr_db: mean over the images, peak 1.
        psnr_db_tenth: the 10th percentile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    psnr_db: float
    psnr_db_tenth: float


class Card(BaseModel):
    """What a user has to know about a prior before trusting an audit with it.

    Attributes:
        data: what it was trained on, with the number of images.
        command: how it was trained.
        seed: of the training.
        steps: of the training.
        licence: of the weights, with the data's.
        held_out: the images that it was not trained on, for the inversion.
        inversion: on held-out images; None when there were none.
        architecture: of the generator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    command: str
    seed: int
    steps: int
    licence: str
    held_out: str = "not stated"
    inversion: Inversion | None
    architecture: Architecture


def read_card(folder: Path) -> Card:
    """Reads the card of a prior.

    Raises:
        InputError: the folder or the card is missing, or the card is broken.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        raise InputError(folder, NO_CARD(card=CARD_NAME))
    try:
        return Card.model_validate(read_yaml(path).data)
    except ValidationError as error:
        key, said = first_problem(error, lambda _: Card.model_fields)
        raise InputError(path, OTHER_CARD(key=dotted(key), reason=said)) from None


def render_card(card: Card) -> str:
    """The card as YAML."""
    text: str = yaml.safe_dump(card.model_dump(), sort_keys=False, width=100, allow_unicode=True)
    return text
