"""Makes the folder of a prior: weights, card and sample sheet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save

from ggl_audit.errors import AuditError
from ggl_audit.files import write_whole
from ggl_audit.inputs.images import ImageSet, fingerprints, to_picture
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, SHEET_NAME, WEIGHTS_NAME, Card, render_card
from ggl_audit.priors.generator import Architecture, Generator
from ggl_audit.priors.training import Schedule, invert, train_generator
from ggl_audit.validation import first_problem

INVERTED_IMAGES = 64
SAMPLES_A_CLASS = 10
MOST_ROWS = 20
ENLARGED = 3


def make_prior(
    folder: Path,
    seen: ImageSet,
    unseen: ImageSet | None,
    latent: int,
    schedule: Schedule,
    device: torch.device,
    command: str,
    licence: str,
    advance: Callable[[], None],
) -> Card:
    """Trains a generator and writes its folder; the card comes last, so a folder with one is whole.

    Args:
        folder: to write; made if it is not there.
        seen: what to train on.
        unseen: what to measure the inversion PSNR on, or None.
        latent: the dimension of the latent.
        schedule: how long and how.
        device: where to train.
        command: for the card.
        licence: for the card.
        advance: told after each step.

    Raises:
        AuditError: the images cannot be trained on, or the folder cannot be written.
    """
    architecture = _architecture(seen, latent)
    if unseen is not None and unseen.images.shape[1:] != seen.images.shape[1:]:
        raise AuditError(f"the images of {unseen.source} and {seen.source} differ in size")
    if unseen is not None and unseen.classes > seen.classes:
        raise AuditError(f"{unseen.source} has classes that {seen.source} does not have")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AuditError(f"{folder}: cannot be made ({error.strerror})") from None
    generator = train_generator(seen, architecture, schedule, device, advance)
    inversion = None
    if unseen is not None:
        inversion, _ = invert(generator, _balanced(unseen, INVERTED_IMAGES))
    card = Card(
        data=f"{seen.source}, {len(seen)} images",
        command=command,
        seed=schedule.seed,
        steps=schedule.steps,
        licence=licence,
        inversion=inversion,
        architecture=architecture,
    )
    weights = {name: t.cpu().contiguous() for name, t in generator.state_dict().items()}
    write_whole(folder / WEIGHTS_NAME, save(weights))
    write_whole(folder / SHEET_NAME, _sample_sheet(generator))
    write_whole(folder / SEEN_NAME, save({"fingerprints": _fingerprints(seen)}))
    write_whole(folder / CARD_NAME, render_card(card).encode())
    return card


def _architecture(seen: ImageSet, latent: int) -> Architecture:
    channels, height, width = seen.images.shape[1:]
    if height != width:
        raise AuditError(f"{seen.source}: images of {height}x{width}; expected square ones")
    counts = torch.bincount(seen.labels)
    if int(counts.min()) < 2:
        few = int(counts.argmin())
        raise AuditError(
            f"{seen.source}: class {few} has {int(counts[few])} images; each class up to the "
            "largest label needs 2 or more"
        )
    try:
        return Architecture(channels=channels, size=height, classes=seen.classes, latent=latent)
    except ValidationError as error:
        _, problem, _ = first_problem(error, lambda _: Architecture.model_fields)
        raise AuditError(f"{seen.source}: {problem}") from None


def _balanced(data: ImageSet, count: int) -> ImageSet:
    """The first images of each class in turn, (count,) at most."""
    seen: dict[int, int] = {}
    turns = []
    for label in data.labels.tolist():
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    order = torch.tensor(turns).argsort(stable=True)[:count]
    return ImageSet(data.images[order], data.labels[order], data.source)


def _fingerprints(seen: ImageSet) -> torch.Tensor:
    """By which an audit keeps the training images out of its candidates, (n,), int64."""
    return torch.tensor(sorted(set(fingerprints(seen.images))), dtype=torch.int64)


def _sample_sheet(generator: Generator) -> bytes:
    rows = min(generator.architecture.classes, MOST_ROWS)
    device = generator.code_mean.device
    random = torch.Generator(device=device).manual_seed(0)
    labels = torch.arange(rows, device=device).repeat_interleave(SAMPLES_A_CLASS)
    latents = torch.randn(
        len(labels), generator.architecture.latent, generator=random, device=device
    )
    with torch.no_grad():
        images = (generator(latents, labels) + 1) / 2
    grid = torch.cat([torch.cat(list(row), dim=2) for row in images.split(SAMPLES_A_CLASS)], dim=1)
    sheet = to_picture(grid)
    size = (sheet.width * ENLARGED, sheet.height * ENLARGED)
    buffer = io.BytesIO()
    sheet.resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()
