"""Reads images: labelled sets, and the one private image that an auditor may hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ggl_audit.errors import InputError, Key, SpecError, nearest
from ggl_audit.spec import ImageSetSpec

Shape = tuple[int, int, int]
Part = Literal["prior", "reference", "private"]

LARGEST_LABEL = 99_999
PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")

# Digits of each class, in file order: the first for the prior, the next for reference, the rest
# private.
PRIOR_DIGITS_A_CLASS = 110
REFERENCE_DIGITS_A_CLASS = 50


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (n, channels, height, width), float32 in [0, 1].
        labels: (n,), int64, class indices from 0.
        source: what it is, for the report.
        files: the files it was read from; none for a bundled set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    source: str
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def sets(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first images in sets, from the start again where they run out.

        Returns:
            Images (count, size, channels, height, width) and labels (count, size).
        """
        chosen = torch.arange(count * size, device=self.labels.device) % len(self)
        images, labels = self.images[chosen], self.labels[chosen]
        return images.unflatten(0, (count, size)), labels.unflatten(0, (count, size))

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def without(self, seen: frozenset[int]) -> ImageSet:
        """The set without the images that have one of these fingerprints."""
        if not seen:
            return self
        kept = [i for i, mark in enumerate(fingerprints(self.images)) if mark not in seen]
        return ImageSet(self.images[kept], self.labels[kept], self.source, self.files)

    def to(self, device: torch.device) -> ImageSet:
        """The same set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.source, self.files)


def fingerprints(images: torch.Tensor) -> list[int]:
    """Tells images apart: 63 bits of the SHA-256 of each image's shape and 8-bit pixels.

    Args:
        images: (n, channels, height, width) in [0, 1].
    """
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    shape = str(pixels.shape[1:]).encode()
    digests = [hashlib.sha256(shape + image.tobytes()).digest() for image in pixels]
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def digits(part: Part) -> ImageSet:
    """The bundled handwritten digits: 1,797 scans, of which each part holds its own.

    They ship with scikit-learn (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits,
    UCI, 1998, CC BY 4.0) as 8x8 images of 17 grey levels, and are resized here to 16x16 by bicubic
    interpolation in integers, so that they are the same on every machine.

    Args:
        part: ``prior`` (1,100 images, what the bundled generator was trained on), ``reference``
            (500, candidates and canaries) or ``private`` (197, what the sample captures are of).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    position_in_class = np.zeros(len(data.target), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(data.target == label)
        position_in_class[members] = np.arange(len(members))
    first, last = {
        "prior": (0, PRIOR_DIGITS_A_CLASS),
        "reference": (PRIOR_DIGITS_A_CLASS, PRIOR_DIGITS_A_CLASS + REFERENCE_DIGITS_A_CLASS),
        "private": (PRIOR_DIGITS_A_CLASS + REFERENCE_DIGITS_A_CLASS, len(data.target)),
    }[part]
    members = np.flatnonzero((position_in_class >= first) & (position_in_class < last))
    scans = np.rint(data.images[members] * (255 / 16)).astype(np.uint8)
    resized = [Image.fromarray(scan).resize((16, 16), Image.Resampling.BICUBIC) for scan in scans]
    return ImageSet(
        images=_as_images(np.stack([np.asarray(image) for image in resized])[..., None]),
        labels=torch.from_numpy(data.target[members].astype(np.int64)),
        source=f"bundled digits, {part} part",
    )


BUNDLED_SETS = {"digits": digits}


def read_image_set(
    spec: ImageSetSpec, folder: Path, key: Key, part: Part, shape: Shape | None = None
) -> ImageSet:
    """Reads a labelled set.

    Args:
        spec: where it is.
        folder: the folder that relative paths start from.
        key: the key of the spec, for messages.
        part: which part of a bundled set.
        shape: (channels, height, width) that the images must have; None takes any.

    Raises:
        SpecError: the bundled name is unknown.
        InputError: a file is missing, broken, or its images do not have the shape.
    """
    if spec.bundled is not None:
        if spec.bundled not in BUNDLED_SETS:
            raise SpecError(
                (*key, "bundled"),
                f"there is no bundled set {spec.bundled!r}",
                nearest(spec.bundled, BUNDLED_SETS),
            )
        image_set = BUNDLED_SETS[spec.bundled](part)
    elif spec.npz is not None:
        image_set = _read_npz(folder / spec.npz)
    else:
        assert spec.folder is not None
        image_set = _read_folder(folder / spec.folder, shape)
    if shape is not None and tuple(image_set.images.shape[1:]) != shape:
        raise SpecError(
            key,
            f"the images of {image_set.source} are {_size(image_set.images.shape[1:])}, "
            f"but the model takes {_size(shape)} (model.input.shape)",
            "Resize or convert them first; nothing is resized silently.",
        )
    return image_set


def read_image(path: Path, shape: Shape) -> torch.Tensor:
    """Reads one picture file of exactly the given shape.

    Returns:
        (channels, height, width), float32 in [0, 1].

    Raises:
        InputError: missing, not a picture, or of another size or number of channels.
    """
    pixels = _open(path)
    image = _as_images(pixels[None])[0]
    if image.shape[0] == 1 and shape[0] == 3:
        raise InputError(path, "a grey picture, but the model takes colour (model.input.shape)")
    if tuple(image.shape) != shape:
        raise InputError(
            path, f"a picture of {_size(image.shape)}, but the model takes {_size(shape)}"
        )
    return image


def write_image(path: Path, image: torch.Tensor) -> None:
    """Writes (channels, height, width) in [0, 1] as an 8-bit picture, format by the ending."""
    to_picture(image).save(path)


def to_picture(image: torch.Tensor) -> Image.Image:
    """Turns (channels, height, width) in [0, 1] into an 8-bit picture, rounding to nearest."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _open(path: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        with Image.open(path) as picture:
            if picture.mode not in PICTURE_MODES:
                raise InputError(
                    path,
                    f"a picture of mode {picture.mode}; expected 8 bits a channel, grey or RGB",
                )
            colour = picture.mode not in ("L", "1", "LA")
            pixels = np.asarray(picture.convert("RGB" if colour else "L"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(path, f"not a readable picture ({error})") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _read_npz(path: Path) -> ImageSet:
    from ggl_audit.inputs.tensors import read_tensors

    arrays = read_tensors(path)
    if "images" not in arrays or "labels" not in arrays:
        raise InputError(
            path, f"expected the arrays 'images' and 'labels', found {', '.join(arrays) or 'none'}"
        )
    images, labels = arrays["images"].numpy(), arrays["labels"].numpy().reshape(-1)
    if images.dtype != np.uint8:
        raise InputError(path, f"images are {images.dtype}; expected uint8, 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise InputError(
            path, f"images have the shape {images.shape}; expected (n, h, w) or (n, h, w, 1 or 3)"
        )
    if (
        len(labels) != len(images)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() <= LARGEST_LABEL
    ):
        raise InputError(
            path, f"labels must be {len(images)} class indices from 0, one for each image"
        )
    return ImageSet(
        _as_images(images), torch.from_numpy(labels.astype(np.int64)), path.name, (path,)
    )


def _read_folder(path: Path, shape: Shape | None) -> ImageSet:
    if not path.is_dir():
        raise InputError(path, "no such folder")
    files = sorted(
        file
        for folder in path.iterdir()
        if folder.is_dir() and folder.name.isdecimal() and int(folder.name) <= LARGEST_LABEL
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        raise InputError(
            path, f"no pictures; expected CLASS_INDEX/NAME with {', '.join(IMAGE_SUFFIXES)}"
        )
    pixels = [_open(file) for file in files]
    wanted = (shape[1], shape[2], shape[0]) if shape else pixels[0].shape
    for file, array in zip(files, pixels, strict=True):
        if array.shape != wanted:
            h, w, c = array.shape
            raise InputError(
                file,
                f"a picture of {_size((c, h, w))}, but the others are {_size(wanted)}"
                if shape is None
                else f"a picture of {_size((c, h, w))}, but the model takes {_size(shape)}",
            )
    labels = torch.tensor([int(file.parent.name) for file in files])
    return ImageSet(_as_images(np.stack(pixels)), labels, f"{path.name}/", tuple(files))


def _as_images(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
