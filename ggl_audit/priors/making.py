"""Makes the folder of a prior: weights, card and sample sheet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save

from ggl_audit.basics.files import write_whole
from ggl_audit.basics.validation import first_problem
from ggl_audit.errors import AuditError, InputError
from ggl_audit.inputs.images import ImageSet, fingerprints, to_picture
from ggl_audit.messages import Message
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, SHEET_NAME, WEIGHTS_NAME, Card, render_card
from ggl_audit.priors.checkpoint import (
    CHECKPOINT_NAME,
    restore_checkpoint,
    settings_of,
    write_checkpoint,
)
from ggl_audit.priors.classes import place_in_class
from ggl_audit.priors.generator import Architecture, Generator
from ggl_audit.priors.held_out import apart
from ggl_audit.priors.training import Schedule, Training, invert

INVERTED_IMAGES = 64
SAMPLES_A_CLASS = 10
MOST_ROWS = 20
ENLARGED = 3

INTERRUPTED = Message(
    "training/interrupted",
    "a training was interrupted here",
    "--resume goes on with it; delete the file to start anew.",
    advice="Add `--resume` to go on, or delete the checkpoint to start anew.",
)
FOLDER_CANNOT_BE_MADE = Message(
    "training/folder-cannot-be-made",
    "{folder}: cannot be made ({reason})",
    advice="Give a folder that you may write to.",
)
NOT_SQUARE = Message(
    "training/not-square",
    "{source}: images of {height}x{width}; expected square ones",
    advice="Resize or crop the images to one of these sizes.",
)
TOO_FEW_TO_TRAIN = Message(
    "training/too-few-to-train",
    "{source}: class {label} has {count} images to train on; each class up to the largest label "
    "needs 2 or more",
    advice="Number the classes from 0 without gaps, add images, or train with `--unconditional`.",
)


def make_prior(
    folder: Path,
    seen: ImageSet,
    unseen: ImageSet | None,
    architecture: Architecture,
    schedule: Schedule,
    device: torch.device,
    command: str,
    licence: str,
    advance: Callable[[int], None],
    checkpoint_steps: int = 200,
    *,
    resume: bool = False,
) -> Card:
    """Trains a generator and writes its folder; the card comes last, so a folder with one is whole.

    Until then the folder holds a checkpoint. A KeyboardInterrupt out of ``advance``, which is
    called between steps, leaves one of the last step.

    Args:
        folder: to write; made if it is not there.
        seen: what to train on.
        unseen: what to measure the inversion PSNR on, or None.
        architecture: of the generator, as :func:`architecture_for` gives it.
        schedule: how long and how.
        device: where to train.
        command: for the card.
        licence: for the card.
        advance: told how many steps more are done, of ``schedule.steps`` and then, where there are
            unseen images, ``INVERSION_STEPS``.
        checkpoint_steps: steps from one checkpoint to the next.
        resume: go on from the checkpoint in the folder.

    Raises:
        AuditError: the images cannot be measured on, the training diverged, the folder cannot be
            written, it holds a checkpoint though ``resume`` is not asked for, or one of another
            training.
    """
    if unseen is not None:
        unseen = apart(unseen, seen)
    if not resume and (folder / CHECKPOINT_NAME).exists():
        raise InputError(folder / CHECKPOINT_NAME, INTERRUPTED())
    settings = settings_of(seen, architecture, schedule, device)
    training = Training(seen, architecture, schedule, device)
    if resume:
        restore_checkpoint(folder, training, settings)
        advance(training.done)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AuditError(FOLDER_CANNOT_BE_MADE(folder=folder, reason=error.strerror)) from None
    while training.done < schedule.steps:
        training.advance()
        try:
            advance(1)
        except KeyboardInterrupt:
            write_checkpoint(folder, training, settings)
            raise
        if training.done % checkpoint_steps == 0 or training.done == schedule.steps:
            write_checkpoint(folder, training, settings)
    inversion = None
    if unseen is not None:
        some = _balanced(unseen, INVERTED_IMAGES)
        inversion, _ = invert(training.generator, some, advance=advance)
    card = Card(
        data=f"{seen.source}, {len(seen)} images",
        held_out="none" if unseen is None else f"{unseen.source}, {len(unseen)} images",
        command=command,
        seed=schedule.seed,
        steps=schedule.steps,
        licence=licence,
        inversion=inversion,
        architecture=architecture,
    )
    weights = {n: t.cpu().contiguous() for n, t in training.generator.state_dict().items()}
    (folder / CARD_NAME).unlink(missing_ok=True)
    write_whole(folder / WEIGHTS_NAME, save(weights))
    write_whole(folder / SHEET_NAME, _sample_sheet(training.generator))
    write_whole(folder / SEEN_NAME, save({"fingerprints": _fingerprints(seen)}))
    write_whole(folder / CARD_NAME, render_card(card).encode())
    (folder / CHECKPOINT_NAME).unlink()
    return card


def architecture_for(
    seen: ImageSet, latent: int, width: int, *, conditional: bool = True
) -> Architecture:
    """The architecture that draws images like those of a set.

    Args:
        seen: what it is to be trained on.
        latent: the dimension of the latent.
        width: feature maps of the generator's first block.
        conditional: whether the generator takes a label.

    Raises:
        AuditError: the images cannot be trained on.
    """
    channels, height, across = seen.images.shape[1:]
    if height != across:
        raise AuditError(NOT_SQUARE(source=seen.source, height=height, width=across))
    counts = torch.bincount(seen.labels)
    if int(counts.min()) < 2:
        few = int(counts.argmin())
        raise AuditError(TOO_FEW_TO_TRAIN(source=seen.source, label=few, count=int(counts[few])))
    classes = seen.classes if conditional else None
    try:
        return Architecture(
            channels=channels, size=height, classes=classes, latent=latent, width=width
        )
    except ValidationError as error:
        _, said = first_problem(error, lambda _: Architecture.model_fields)
        raise AuditError(said.after(f"{seen.source}: ")) from None


def _balanced(data: ImageSet, count: int) -> ImageSet:
    """The first images of each class in turn, (count,) at most."""
    order = place_in_class(data.labels).argsort(stable=True)[:count]
    return ImageSet(data.images[order], data.labels[order], data.source)


def _fingerprints(seen: ImageSet) -> torch.Tensor:
    """By which an audit keeps the training images out of its candidates, (n,), int64."""
    return torch.tensor(sorted(set(fingerprints(seen.images))), dtype=torch.int64)


def _sample_sheet(generator: Generator) -> bytes:
    rows = min(generator.architecture.groups, MOST_ROWS)
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
