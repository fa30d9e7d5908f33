from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ggl_audit.cli.options import image_set
from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.images import DIGITS, digits, read_image, read_image_set, write_image
from ggl_audit.spec import ImageSetSpec

KEY = ("evidence", "reference")


def read(base: Path, shape: tuple[int, int, int] | None = None, **source: object) -> object:
    spec = ImageSetSpec.model_validate(source)
    return read_image_set(spec, base, KEY, "reference", shape)


def test_the_three_parts_of_the_digits_share_no_image_and_are_all_of_them() -> None:
    parts = {part: digits(part) for part in ("prior", "reference", "private")}
    contents = {
        part: {image.numpy().tobytes() for image in images.images} for part, images in parts.items()
    }
    assert not contents["prior"] & contents["reference"]
    assert not contents["prior"] & contents["private"]
    assert not contents["reference"] & contents["private"]
    assert sum(map(len, parts.values())) == len(load_digits().target) == 1797
    assert sum(map(len, contents.values())) == 1797
    for images in parts.values():
        assert images.images.shape[1:] == (1, 16, 16)
        assert 0 <= float(images.images.min()) <= float(images.images.max()) <= 1


def test_the_digits_are_the_scans_and_carry_their_labels() -> None:
    images = digits("private")
    scans = load_digits()
    small = torch.nn.functional.avg_pool2d(images.images, 2)[:, 0].numpy()
    nearest = [
        int(np.abs(scans.images / 16 - image).reshape(1797, -1).sum(1).argmin()) for image in small
    ]
    assert scans.target[nearest].tolist() == images.labels.tolist()


def test_the_file_of_digits_is_what_scikit_learn_has() -> None:
    scans, file = load_digits(), np.load(DIGITS)
    assert np.array_equal(file["images"], scans.images)
    assert np.array_equal(file["labels"], scans.target)


def test_the_sample_picture_is_a_private_one(samples: Path) -> None:
    picture = read_image(samples / "captures" / "private.png", (1, 16, 16))
    assert any(torch.equal(picture, image) for image in digits("private").images)


def test_an_image_survives_writing_and_reading(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7)) / 255
    write_image(tmp_path / "x.png", image)
    torch.testing.assert_close(read_image(tmp_path / "x.png", (3, 5, 7)), image)


def test_pictures_that_do_not_fit_are_named(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "grey.png")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(InputError, match="a grey picture"):
        read_image(tmp_path / "grey.png", (3, 16, 16))
    with pytest.raises(InputError, match="16x16 with 1 channel, but the model takes 8x8"):
        read_image(tmp_path / "grey.png", (1, 8, 8))
    with pytest.raises(InputError, match="not a readable picture"):
        read_image(tmp_path / "text.png", (1, 8, 8))
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "none.png", (1, 8, 8))


def test_an_npz_and_a_folder_give_the_same_set(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    labels = np.array([0, 0, 1, 1])
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "set" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    one = read(tmp_path, (3, 6, 6), npz="set.npz")
    other = read(tmp_path, (3, 6, 6), folder="set")
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "expected the arrays"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "expected uint8"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": np.zeros(2, int)}, "have the shape"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "class indices"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": -np.ones(2, int)}, "class indices"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "have the shape"),
    ],
)
def test_a_broken_set_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(InputError, match=words):
        read(tmp_path, npz="set.npz")


def medmnist(folder: Path, *splits: str) -> dict[str, np.ndarray]:
    """A file with MedMNIST's keys, of pictures that are all different."""
    random = np.random.default_rng(0)
    arrays = {}
    for place, split in enumerate(splits):
        arrays[f"{split}_images"] = random.integers(0, 256, (3 + place, 6, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(3 + place, dtype=np.uint8)[:, None] % 3
    np.savez_compressed(folder / "set.npz", **arrays)
    return arrays


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_of_medmnist(tmp_path: Path, split: str) -> None:
    arrays = medmnist(tmp_path, "train", "val", "test")
    read_set = read(tmp_path, (1, 6, 6), npz="set.npz", split=split)
    expected = torch.from_numpy(arrays[f"{split}_images"].astype(np.float32) / 255)[:, None]
    assert torch.equal(read_set.images, expected)
    assert read_set.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    assert read_set.source == f"set.npz, {split} split"


def test_a_split_has_to_be_named_where_there_are_some(tmp_path: Path) -> None:
    medmnist(tmp_path, "train", "test")
    with pytest.raises(
        InputError, match=r"holds the splits train, test\. Say which: .*split: test"
    ):
        read(tmp_path, npz="set.npz")
    with pytest.raises(InputError, match="holds the splits train, test, and no val"):
        read(tmp_path, npz="set.npz", split="val")
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, int))
    assert len(read(tmp_path, npz="set.npz")) == 2
    with pytest.raises(InputError, match="'test_images' and 'test_labels', found 'images', 'label"):
        read(tmp_path, npz="set.npz", split="test")
    with pytest.raises(ValueError, match="split is for an npz"):
        read(tmp_path, folder=".", split="test")


def test_a_split_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = medmnist(tmp_path, "train", "test")
    monkeypatch.chdir(tmp_path)
    named = image_set("set.npz:test", "reference")
    assert named.labels.tolist() == arrays["test_labels"][:, 0].tolist()
    with pytest.raises(SpecError, match="split: input should be 'train', 'val' or 'test'"):
        image_set("set.npz:tset", "reference")


def test_other_arrays_of_an_npz_do_not_matter(tmp_path: Path) -> None:
    pixels, labels = np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)
    names = np.array(["cat", "dog"])
    np.savez(tmp_path / "set.npz", images=pixels, class_names=names, labels=labels)
    assert len(read(tmp_path, npz="set.npz")) == 2


def test_several_labels_an_image_are_refused(tmp_path: Path) -> None:
    several = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros((2, 5), int)}
    np.savez(tmp_path / "set.npz", **several)
    with pytest.raises(InputError, match="labels must be 2 class indices"):
        read(tmp_path, npz="set.npz")


def test_public_medical_images(shared: Path) -> None:
    spec = ImageSetSpec(npz=shared / "medmnist" / "pneumoniamnist.npz", split="test")
    read_set = read_image_set(spec, Path(), KEY, "reference", (1, 28, 28))
    assert torch.bincount(read_set.labels).tolist() == [234, 390]  # Yang et al. 2023, table 2


def test_a_set_of_another_size_is_not_resized(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="16x16 with 1 channel, but the model takes 32x32"):
        read(tmp_path, (1, 32, 32), bundled="digits")
    with pytest.raises(SpecError, match="Did you mean 'digits'"):
        read(tmp_path, bundled="digit")
    with pytest.raises(InputError, match="no pictures"):
        read(tmp_path, folder=".")


def test_sixteen_bit_pictures_are_refused_and_not_saturated(tmp_path: Path) -> None:
    deep = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="expected 8 bits a channel"):
        read_image(tmp_path / "x.png", (1, 8, 8))
