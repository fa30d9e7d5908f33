"""Reads images: labelled sets, and the one private image that an auditor may hold."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from ggl_audit.basics.files import CANNOT_BE_READ, no_file
from ggl_audit.errors import AuditError, InputError, Key, SpecError, nearest
from ggl_audit.inputs.tensors import npz_names, read_npz
from ggl_audit.messages import Message
from ggl_audit.spec import ImageSetSpec, Split

Shape = tuple[int, int, int]
Part = Literal["prior", "reference", "private"]

DIGITS = Path(__file__).parent / "digits.npz"

LARGEST_LABEL = 99_999
LONGEST_SIDE = 2048
LARGEST_PICTURE_BYTES = 4 * LONGEST_SIDE**2 + 100_000
PICTURE_FORMATS = ("PNG", "JPEG", "BMP")
PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")

# Digits of each class, in file order: the first for the prior, the next for reference, the rest
# private.
PRIOR_DIGITS_A_CLASS = 110
REFERENCE_DIGITS_A_CLASS = 50

NO_BUNDLED_SET = Message(
    "image/no-bundled-set",
    "there is no bundled set {name!r}",
    "{nearest}",
    advice="Give `digits`, or the path of an `.npz` or a folder (which has to be there).",
)
AS_THE_CLIENT_DOES = (
    "Prepare the pictures as the client does, resizing and cropping included, and save them in "
    "the model's size and channels."
)
SET_OF_OTHER_SIZE = Message(
    "image/set-of-other-size",
    "the images of {source} are {size}, but the model takes {expected} (model.input.shape)",
    "Resize or convert them first; nothing is resized silently.",
    advice=AS_THE_CLIENT_DOES,
)
GREY = Message(
    "image/grey",
    "a grey picture, but the model takes colour (model.input.shape)",
    advice=AS_THE_CLIENT_DOES,
)
OTHER_SIZE = Message(
    "image/other-size",
    "a picture of {size}, but the model takes {expected}",
    advice=AS_THE_CLIENT_DOES,
)
NO_PICTURE = Message(
    "image/no-picture",
    "not a readable picture; expected {formats}",
    advice="Save it anew as PNG.",
)
BROKEN_PICTURE = Message(
    "image/broken-picture",
    "not a readable picture ({reason})",
    advice="Save it anew as PNG.",
)
TOO_LONG_SIDES = Message(
    "image/too-long-sides",
    "a picture of {height}x{width}; expected at most {limit} pixels a side",
    "Resize it to what the model takes.",
)
SEVERAL_PICTURES = Message(
    "image/several-pictures",
    "several pictures in one file, or an animation; expected one",
    advice="Save one picture alone.",
)
DEEP_PICTURE = Message(
    "image/deep-picture",
    "a picture of {mode}; expected 8 bits a channel, grey or RGB",
    "Convert it first; nothing is converted silently.",
    advice="Convert it (CMYK, 16 bits) first; nothing is converted silently.",
)
LARGE_PICTURE = Message(
    "image/large-picture",
    "larger than {limit:,} bytes",
    advice="Resize it to what the model takes.",
)
NOT_8_BIT = Message(
    "image/not-8-bit",
    "{name} are {dtype}; expected uint8, 0 to 255",
    advice="Save 8-bit images, grey or RGB, channels last and not normalized.",
)
NO_IMAGES_SHAPE = Message(
    "image/no-images-shape",
    "{name} have the shape {shape}; expected (n, h, w) or (n, h, w, 1 or 3)",
    advice="Save 8-bit images, grey or RGB, channels last and not normalized.",
)
OTHER_ROWS = Message(
    "image/other-rows",
    "{name} has {count} rows; expected {expected}, one an image",
    advice="Save a finite target for each image, in the same order.",
)
TARGETS_NOT_FINITE = Message(
    "image/targets-not-finite",
    "{name} holds values that are NaN or infinite",
    advice="Save a finite target for each image, in the same order.",
)
SAY_WHICH = (
    "Say which: {{npz: {file}, split: {last}}} in the spec, {file}:{last} on the command line."
)
SPLITS = Message(
    "image/splits",
    "holds the splits {splits}",
    SAY_WHICH,
    advice="Say which: `split: test` in the spec, `FILE.npz:test` on the command line.",
)
NO_SPLIT = Message(
    "image/no-split",
    "holds the splits {splits}, and no {split}",
    SAY_WHICH,
    advice="Say which: `split: test` in the spec, `FILE.npz:test` on the command line.",
)
UNLIKE_OTHERS = Message(
    "image/unlike-others",
    "a picture of {size}, but the others are {others}",
    advice=AS_THE_CLIENT_DOES,
)
OTHER_ARRAYS = Message(
    "image/other-arrays",
    "expected the arrays {expected}, found {found}",
    advice="Name the arrays of the `.npz` `images` and `labels`, or as MedMNIST does.",
)
NO_CLASS_INDICES = Message(
    "image/no-class-indices",
    "{name} must be {count} class indices from 0, one for each image",
    advice="Save whole numbers from 0, one an image, in the same order.",
)
NO_PICTURES_FOLDER = Message(
    "file/no-pictures-folder",
    "no such folder",
    advice="Correct the path of the folder of pictures.",
)
LINK_LEADS_OUT = Message(
    "image/link-leads-out",
    "a symbolic link that leaves the folder of pictures",
    advice="Copy the picture into the folder.",
)
NO_PICTURES = Message(
    "image/no-pictures",
    "no pictures; expected {form} with {endings}",
    advice="Put the pictures into one folder for each class, named 0, 1, 2; without classes a "
    "folder is enough.",
)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (n, channels, height, width), float32 in [0, 1].
        labels: (n,), int64, class indices from 0, or rows of a table of targets.
        source: what it is, for the report.
        files: the files it was read from; none for a bundled set.
        one_group: whether all images are candidates for one another, as each has targets of its
            own, and not only those of a class.
    """

    images: torch.Tensor
    labels: torch.Tensor
    source: str
    files: tuple[Path, ...] = ()
    one_group: bool = False

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

    @property
    def groups(self) -> torch.Tensor:
        """(n,), equal for images that are candidates for one another."""
        return torch.zeros_like(self.labels) if self.one_group else self.labels

    def without(self, seen: frozenset[int]) -> ImageSet:
        """The set without the images that have one of these fingerprints."""
        if not seen:
            return self
        kept = [i for i, mark in enumerate(fingerprints(self.images)) if mark not in seen]
        return replace(self, images=self.images[kept], labels=self.labels[kept])

    def to(self, device: torch.device) -> ImageSet:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


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

    They are the test part of Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI,
    1998 (CC BY 4.0), 8x8 images of 17 grey levels, as scikit-learn has them; and are resized here
    to 16x16 by bicubic interpolation in integers, so that they are the same on every machine.

    Args:
        part: ``prior`` (1,100 images, what the bundled generator was trained on), ``reference``
            (500, candidates and canaries) or ``private`` (197, what the sample captures are of).
    """
    scans = read_npz(DIGITS, ("images", "labels"))
    greys, digit = scans["images"].numpy(), scans["labels"].numpy().astype(np.int64)
    position_in_class = np.zeros(len(digit), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(digit == label)
        position_in_class[members] = np.arange(len(members))
    first, last = {
        "prior": (0, PRIOR_DIGITS_A_CLASS),
        "reference": (PRIOR_DIGITS_A_CLASS, PRIOR_DIGITS_A_CLASS + REFERENCE_DIGITS_A_CLASS),
        "private": (PRIOR_DIGITS_A_CLASS + REFERENCE_DIGITS_A_CLASS, len(digit)),
    }[part]
    members = np.flatnonzero((position_in_class >= first) & (position_in_class < last))
    bright = np.rint(greys[members] * (255 / 16)).astype(np.uint8)
    resized = [Image.fromarray(scan).resize((16, 16), Image.Resampling.BICUBIC) for scan in bright]
    return ImageSet(
        images=as_images(np.stack([np.asarray(image) for image in resized])[..., None]),
        labels=torch.from_numpy(digit[members]),
        source=f"bundled digits, {part} part",
    )


BUNDLED_SETS = {"digits": digits}
REFERENCE: Key = ("evidence", "reference")


def read_image_set(
    spec: ImageSetSpec,
    folder: Path,
    key: Key,
    part: Part,
    shape: Shape | None = None,
    *,
    labelled: bool = True,
    targets: bool = False,
) -> ImageSet:
    """Reads a labelled set.

    Args:
        spec: where it is.
        folder: the folder that relative paths start from.
        key: the key of the spec, for messages.
        part: which part of a bundled set.
        shape: (channels, height, width) that the images must have; None takes any.
        labelled: False where labels are not needed: those of a file or folder are then all 0.
        targets: whether the labels of a file may be more than class indices (:func:`index_rows`).

    Raises:
        SpecError: the bundled name is unknown.
        InputError: a file is missing, broken, or its images do not have the shape.
    """
    if spec.bundled is not None:
        if spec.bundled not in BUNDLED_SETS:
            raise SpecError(
                (*key, "bundled"),
                NO_BUNDLED_SET(name=spec.bundled, nearest=nearest(spec.bundled, BUNDLED_SETS)),
            )
        image_set = BUNDLED_SETS[spec.bundled](part)
    elif spec.npz is not None:
        if key == REFERENCE:
            _check_reference(folder / spec.npz)
        image_set = _read_npz(folder / spec.npz, spec.split, labelled, targets)
    else:
        assert spec.folder is not None
        image_set = _read_folder(folder / spec.folder, shape, labelled)
    if shape is not None and tuple(image_set.images.shape[1:]) != shape:
        raise SpecError(
            key,
            SET_OF_OTHER_SIZE(
                source=image_set.source,
                size=_size(image_set.images.shape[1:]),
                expected=_size(shape),
            ),
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
    image = as_images(pixels[None])[0]
    if image.shape[0] == 1 and shape[0] == 3:
        raise InputError(path, GREY())
    if tuple(image.shape) != shape:
        raise InputError(path, OTHER_SIZE(size=_size(image.shape), expected=_size(shape)))
    return image


def write_image(path: Path, image: torch.Tensor) -> None:
    """Writes (channels, height, width) in [0, 1] as an 8-bit picture, format by the ending."""
    to_picture(image).save(path)


def to_picture(image: torch.Tensor) -> Image.Image:
    """Turns (channels, height, width) in [0, 1] into an 8-bit picture, rounding to nearest."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def decode_picture(content: bytes, formats: tuple[str, ...] = PICTURE_FORMATS) -> Image.Image:
    """Decodes one picture whose header is as small and plain as expected.

    Pillow makes room for the length that a chunk says it has, if it reads from a file.

    Raises:
        AuditError: broken, too large, animated, or not of 8 bits a channel, grey or RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is fine or refused
            with Image.open(io.BytesIO(content), formats=formats) as picture:
                _check_picture(picture)
                picture.load()
                return picture
    except AuditError:
        raise
    except UnidentifiedImageError:
        raise AuditError(NO_PICTURE(formats=" or ".join(formats))) from None
    except Exception as error:
        # A broken file can lead the decoder into any error.
        reason = str(error) or type(error).__name__
        raise AuditError(BROKEN_PICTURE(reason=reason)) from None


def _check_picture(picture: ImageFile.ImageFile) -> None:
    """Looks at the header, before anything is decoded."""
    width, height = picture.size
    if max(width, height) > LONGEST_SIDE:
        raise AuditError(TOO_LONG_SIDES(height=height, width=width, limit=LONGEST_SIDE))
    if getattr(picture, "n_frames", 1) > 1:
        raise AuditError(SEVERAL_PICTURES())
    deep = picture.format == "PNG" and any("16" in str(tile[3]) for tile in picture.tile)
    if picture.mode not in PICTURE_MODES or deep:
        found = "16 bits a channel" if deep else f"mode {picture.mode}"
        raise AuditError(DEEP_PICTURE(mode=found))


def _open(path: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise no_file(path)
    try:
        if path.stat().st_size > LARGEST_PICTURE_BYTES:
            raise AuditError(LARGE_PICTURE(limit=LARGEST_PICTURE_BYTES))
        picture = decode_picture(path.read_bytes())
    except OSError as error:
        raise InputError(path, CANNOT_BE_READ(reason=error.strerror)) from None
    except AuditError as error:
        raise InputError(path, error.said) from None
    colour = picture.mode not in ("L", "1", "LA")
    pixels = np.asarray(picture.convert("RGB" if colour else "L"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


@dataclass(frozen=True)
class Rows:
    """Targets as a table.

    Attributes:
        labels: (n,), which row is an image's.
        rows: (K, ...).
        shared: whether images share rows, as images of a class do; else each has its own.
    """

    labels: torch.Tensor
    rows: torch.Tensor
    shared: bool


def index_rows(targets: torch.Tensor) -> Rows:
    """Makes a table of targets that are more than class indices.

    Args:
        targets: (n, C) of 0 and 1, several labels an image, whose equal rows are one; or one target
            for each image: (n, height, width) integers or any floating point.
    """
    if targets.is_floating_point():
        return Rows(torch.arange(len(targets)), targets.float(), shared=False)
    targets = targets.long()
    if targets.ndim == 2 and bool((targets == targets.clamp(0, 1)).all()):
        rows, labels = torch.unique(targets, dim=0, return_inverse=True)
        return Rows(labels, rows.float(), shared=True)
    return Rows(torch.arange(len(targets)), targets, shared=False)


def read_labels(spec: ImageSetSpec, folder: Path) -> torch.Tensor | None:
    """The labels of a reference file, as they stand in it, where they are more than class indices.

    Raises:
        InputError: the file is missing or broken.
    """
    if spec.npz is None:
        return None
    path = folder / spec.npz
    _check_reference(path)
    prefix = _prefix(path, npz_names(path), spec.split, ("images", "labels"))
    labels = read_npz(path, [f"{prefix}labels"])[f"{prefix}labels"]
    return labels if _is_more(labels) else None


def count_classes(spec: ImageSetSpec, folder: Path) -> int:
    """One more than the largest class index of a reference set.

    Raises:
        InputError: the set is missing or broken.
    """
    if spec.bundled is not None:
        return read_image_set(spec, folder, REFERENCE, "reference").classes
    if spec.npz is None:
        assert spec.folder is not None
        return 1 + max(int(file.parent.name) for file in _pictures(folder / spec.folder, True))
    path = folder / spec.npz
    _check_reference(path)
    prefix = _prefix(path, npz_names(path), spec.split, ("images", "labels"))
    name = f"{prefix}labels"
    labels = read_npz(path, [name])[name].numpy()
    # What else is wrong with the set is told where its images are read.
    return 1 + int(_class_indices(path, name, labels, len(labels)).max()) if labels.size else 1


def _check_reference(path: Path) -> None:
    """Public images are often not beside the spec, but where whoever runs it has them."""
    if not path.is_file():
        raise no_file(path, "Say where the public images are: --reference PATH.")


def _is_more(labels: torch.Tensor) -> bool:
    """Whether labels are more than class indices, (n,) or (n, 1)."""
    return labels.is_floating_point() or math.prod(labels.shape[1:]) > 1


def _read_npz(path: Path, split: Split | None, labelled: bool, targets: bool) -> ImageSet:
    needed = ("images", "labels") if labelled else ("images",)
    prefix = _prefix(path, npz_names(path), split, needed)
    image_name, label_name = f"{prefix}images", f"{prefix}labels"
    arrays = read_npz(path, [prefix + name for name in needed])
    images = arrays[image_name].numpy()
    if images.dtype != np.uint8:
        raise InputError(path, NOT_8_BIT(name=image_name, dtype=images.dtype))
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise InputError(path, NO_IMAGES_SHAPE(name=image_name, shape=images.shape))
    source = path.name if split is None else f"{path.name}, {split} split"
    if labelled and targets and _is_more(arrays[label_name]):
        table = index_rows(_checked(path, label_name, arrays[label_name], len(images)))
        one_group = not table.shared
        return ImageSet(as_images(images), table.labels, source, (path,), one_group)
    labels = torch.zeros(len(images), dtype=torch.int64)
    if labelled:
        labels = _class_indices(path, label_name, arrays[label_name].numpy(), len(images))
    return ImageSet(as_images(images), labels, source, (path,))


def _checked(path: Path, name: str, targets: torch.Tensor, count: int) -> torch.Tensor:
    if len(targets) != count:
        raise InputError(path, OTHER_ROWS(name=name, count=len(targets), expected=count))
    if not bool(torch.isfinite(targets.double()).all()):
        raise InputError(path, TARGETS_NOT_FINITE(name=name))
    return targets


def _prefix(
    path: Path, names: Collection[str], split: Split | None, needed: Collection[str]
) -> str:
    """What stands before ``images`` and ``labels`` in the names of an npz."""
    prefixes = ["" if split is None else f"{split}_", *(f"{name}_" for name in get_args(Split))]
    there = [prefix for prefix in prefixes if {prefix + name for name in needed} <= {*names}]
    if there and there[0] == prefixes[0]:
        return there[0]
    if there:
        splits = [prefix[:-1] for prefix in there]
        names, file, last = ", ".join(splits), path.name, splits[-1]
        if split:
            raise InputError(path, NO_SPLIT(splits=names, split=split, file=file, last=last))
        raise InputError(path, SPLITS(splits=names, file=file, last=last))
    expected = " and ".join(repr(prefixes[0] + name) for name in needed)
    found = ", ".join(map(repr, names)) or "none"
    raise InputError(path, OTHER_ARRAYS(expected=expected, found=found))


def _class_indices(path: Path, name: str, labels: NDArray[Any], count: int) -> torch.Tensor:
    """Labels (n,), or (n, 1) as MedMNIST has them, as (n,) int64."""
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if (
        labels.shape != (count,)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() <= LARGEST_LABEL
    ):
        raise InputError(path, NO_CLASS_INDICES(name=name, count=count))
    return torch.from_numpy(labels.astype(np.int64))


def _pictures(path: Path, labelled: bool) -> list[Path]:
    """The files of a folder of pictures, in the folders of their classes."""
    if not path.is_dir():
        raise InputError(path, NO_PICTURES_FOLDER())
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    if labelled:
        folders = [f for f in folders if f.name.isdecimal() and int(f.name) <= LARGEST_LABEL]
    else:
        folders.append(path)
    files = sorted(
        file
        for folder in folders
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES
    )
    inside = path.resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside):
            raise InputError(file, LINK_LEADS_OUT())
    if not files:
        form = "CLASS_INDEX/NAME" if labelled else "NAME or FOLDER/NAME"
        raise InputError(path, NO_PICTURES(form=form, endings=", ".join(IMAGE_SUFFIXES)))
    return files


def _read_folder(path: Path, shape: Shape | None, labelled: bool) -> ImageSet:
    files = _pictures(path, labelled)
    pixels = [_open(file) for file in files]
    wanted = (shape[1], shape[2], shape[0]) if shape else pixels[0].shape
    for file, array in zip(files, pixels, strict=True):
        if array.shape != wanted:
            h, w, c = array.shape
            if shape is None:
                raise InputError(file, UNLIKE_OTHERS(size=_size((c, h, w)), others=_size(wanted)))
            raise InputError(file, OTHER_SIZE(size=_size((c, h, w)), expected=_size(shape)))
    labels = torch.tensor([int(file.parent.name) if labelled else 0 for file in files])
    return ImageSet(as_images(np.stack(pixels)), labels, f"{path.name}/", tuple(files))


def as_images(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Turns 8-bit (n, height, width, channels) into (n, channels, height, width) in [0, 1]."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 255


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
