"""Reads a data set of torchvision that is already on disk; nothing is ever downloaded."""

from __future__ import annotations

import inspect

import numpy as np
import torch

from ggl_audit.errors import AuditError, InputError, nearest
from ggl_audit.inputs.images import ImageSet, as_images
from ggl_audit.messages import Message

PREFIX = "torchvision:"
FORM = "torchvision:NAME:FOLDER, or torchvision:NAME:FOLDER:test"

NAMES = ("FashionMNIST", "KMNIST", "MNIST", "SVHN", "USPS")
PICKLED = ("CIFAR10", "CIFAR100")

NAME_A_SET = (
    "Name one of FashionMNIST, KMNIST, MNIST, SVHN and USPS and its folder; save another set as "
    "an `.npz`."
)
NO_TORCHVISION_SET = Message(
    "training/no-torchvision-set",
    "{source}: expected {form}",
    advice=NAME_A_SET,
)
SET_OF_PICKLES = Message(
    "training/set-of-pickles",
    "{source}: {name} comes as pickles, which are not opened here",
    "Save it as an npz: data = torchvision.datasets.{name}(...); numpy.savez('data.npz', "
    "images=data.data, labels=data.targets).",
    advice="Save it as an `.npz` with `images` and `labels`, as the message shows.",
)
UNKNOWN_SET = Message(
    "training/unknown-set",
    "{source}: {name!r} cannot be read here",
    "{nearest}",
    advice=NAME_A_SET,
)
SET_NOT_WHOLE = Message(
    "training/set-not-whole",
    "torchvision finds no whole {name} there ({reason})",
    "Download it first: torchvision.datasets.{name}({folder!r}, download=True).",
    advice="Download the set first, as the message shows; nothing is downloaded here.",
)


def read_torchvision_set(source: str) -> ImageSet:
    """Reads a data set through torchvision.

    Args:
        source: ``torchvision:NAME:FOLDER``, the folder being torchvision's ``root``; the training
            part, unless ``:test`` follows.

    Raises:
        AuditError: not of that form, or no data set that can be read.
        InputError: the data set is not in the folder, or broken.
    """
    import torchvision

    name, _, place = source.removeprefix(PREFIX).partition(":")
    if not place:
        raise AuditError(NO_TORCHVISION_SET(source=source, form=FORM))
    if name in PICKLED:
        raise AuditError(SET_OF_PICKLES(source=source, name=name))
    if name not in NAMES:
        raise AuditError(UNKNOWN_SET(source=source, name=name, nearest=nearest(name, NAMES)))
    folder, colon, part = place.rpartition(":")
    if not colon or part not in ("train", "test"):
        folder, part = place, "train"
    kind = getattr(torchvision.datasets, name)
    takes_train = "train" in inspect.signature(kind).parameters
    chosen = {"train": part == "train"} if takes_train else {"split": part}
    try:
        pairs = [(np.asarray(image), int(label)) for image, label in kind(folder, **chosen)]
    except Exception as error:
        # What is missing or broken leads torchvision into any error.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(folder, SET_NOT_WHOLE(name=name, reason=reason, folder=folder)) from None
    pixels = np.stack([image for image, _ in pairs])
    return ImageSet(
        images=as_images(pixels if pixels.ndim == 4 else pixels[..., None]),
        labels=torch.tensor([label for _, label in pairs]),
        source=f"torchvision {name}, {part} part",
    )
