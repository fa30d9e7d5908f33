"""The checkpoint of a training: all that is needed to go on as if it had never been interrupted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ggl_audit import __version__
from ggl_audit.basics.files import write_whole
from ggl_audit.errors import InputError
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.messages import Message
from ggl_audit.priors.generator import Architecture
from ggl_audit.priors.training import Schedule, Training

CHECKPOINT_NAME = "checkpoint.safetensors"
AGAIN = "Give the settings and the data of its start, or delete it to start anew."

Settings = dict[str, str]

NOTHING_TO_GO_ON_FROM = Message(
    "training/nothing-to-go-on-from",
    "no such file: there is nothing to go on from",
    "Leave out --resume to start.",
    advice="Leave out `--resume`.",
)
CHECKPOINT_CANNOT_BE_READ = Message(
    "training/checkpoint-cannot-be-read",
    "cannot be read",
    "Delete it to start anew.",
    advice="Delete the checkpoint to start anew.",
)
AS_AT_THE_START = (
    "Give the command of the start with `--resume`, or delete the checkpoint to start anew."
)
OTHER_IMAGES = Message(
    "training/other-images",
    "is of a training on other images or labels",
    AGAIN,
    advice=AS_AT_THE_START,
)
OTHER_SETTINGS = Message(
    "training/other-settings",
    "is of a training with other settings: {name} {there}, not {value}",
    AGAIN,
    advice=AS_AT_THE_START,
)
NOT_A_WHOLE_CHECKPOINT = Message(
    "training/not-a-whole-checkpoint",
    "not a whole checkpoint ({reason})",
    "Delete it to start anew.",
    advice="Delete the checkpoint to start anew.",
)


def settings_of(
    data: ImageSet, architecture: Architecture, schedule: Schedule, device: torch.device
) -> Settings:
    """What decides the result of a training, by name: a checkpoint fits these alone."""
    pixels = (data.images * 255).round().to(torch.uint8).numpy()
    digest = hashlib.sha256(pixels.tobytes() + data.labels.numpy().tobytes())
    declared = {**architecture.model_dump(), **vars(schedule), "device": device.type}
    return {
        "version": __version__,
        **{name: str(value) for name, value in declared.items()},
        "images": str(len(data)),
        "data": digest.hexdigest(),
    }


def write_checkpoint(folder: Path, training: Training, settings: Settings) -> None:
    """Writes a training's state, whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    write_whole(folder / CHECKPOINT_NAME, save(training.state(), metadata=settings))


def restore_checkpoint(folder: Path, training: Training, settings: Settings) -> None:
    """Goes on from the checkpoint in a folder.

    Raises:
        InputError: there is none, it is broken, or of other settings or data.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        raise InputError(path, NOTHING_TO_GO_ON_FROM())
    state = read_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            began: Settings = file.metadata() or {}
    except (SafetensorError, OSError):
        raise InputError(path, CHECKPOINT_CANNOT_BE_READ()) from None
    for name, value in settings.items():
        if began.get(name) == value:
            continue
        if name == "data":
            raise InputError(path, OTHER_IMAGES())
        there = began.get(name, "missing")[:40]
        raise InputError(path, OTHER_SETTINGS(name=name, there=there, value=value))
    try:
        training.restore(state)
    except ValueError as error:
        raise InputError(path, NOT_A_WHOLE_CHECKPOINT(reason=error)) from None
