"""Training a prior: from what, with what held out, and interrupted at any place."""

from __future__ import annotations

import gzip
import os
import re
import signal
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from typer.testing import CliRunner, Result

from ggl_audit.cli import app
from ggl_audit.errors import AuditError, InputError
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image_set
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.torchvision_set import read_torchvision_set
from ggl_audit.priors import making
from ggl_audit.priors import training as training_module
from ggl_audit.priors.card import read_card
from ggl_audit.priors.checkpoint import CHECKPOINT_NAME
from ggl_audit.priors.held_out import apart, hold_out
from ggl_audit.priors.loading import bundled_folder, load_prior, load_trained
from ggl_audit.priors.making import architecture_for, make_prior
from ggl_audit.priors.training import Schedule, Training, invert
from ggl_audit.spec import ImageSetSpec, Spec

CPU = torch.device("cpu")
FINISHED = {"card.yaml", "generator.safetensors", "samples.png", "seen.safetensors"}


def pictures(count: int, seed: int = 0, channels: int = 1, size: int = 16) -> ImageSet:
    """Random 8-bit pictures of two classes."""
    random = np.random.default_rng(seed)
    pixels = random.integers(256, size=(count, channels, size, size))
    return ImageSet(torch.from_numpy(pixels).float() / 255, torch.arange(count) % 2, "pictures")


def make(folder: Path, data: ImageSet, stop_after: int | None = None, **changes: object) -> None:
    """Seven small steps, with a checkpoint every second; an interrupt after some."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    resume = bool(changes.pop("resume", False))
    device = CPU
    schedule = Schedule(**{"steps": 7, "batch": 8, **changes})  # type: ignore[arg-type]
    architecture = architecture_for(data, 6, 16)
    make_prior(
        folder, data, None, architecture, schedule, device, "a test", "none", advance, 2,
        resume=resume,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refreshed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes are fitted anew within the seven steps too, which draws at random."""
    monkeypatch.setattr(training_module, "REFRESH_STEPS", 3)


@pytest.mark.usefixtures("refreshed_often")
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    data = pictures(30)
    make(tmp_path / "whole", data)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", data, stop_after)
    assert set(contents(tmp_path / "parts")) == {CHECKPOINT_NAME}
    torch.manual_seed(99)  # what other programs do to the global generator
    make(tmp_path / "parts", data, resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert set(contents(tmp_path / "parts")) == FINISHED


@pytest.mark.usefixtures("refreshed_often")
def test_a_killed_training_goes_on_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures(30)
    make(tmp_path / "whole", data)
    steps = []
    advance = Training.advance

    def die_in_the_sixth(self: Training) -> None:
        steps.append(self.done)
        if len(steps) == 6:
            self._labels = self._labels[:0]  # the step fails halfway
        advance(self)

    monkeypatch.setattr(Training, "advance", die_in_the_sixth)
    with pytest.raises(RuntimeError):
        make(tmp_path / "parts", data)
    monkeypatch.setattr(Training, "advance", advance)
    make(tmp_path / "parts", data, resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_only_the_same_training_can_be_resumed(tmp_path: Path) -> None:
    data = pictures(30)
    folder = tmp_path / "p"
    with pytest.raises(InputError, match="nothing to go on from"):
        make(folder, data, resume=True)
    with pytest.raises(KeyboardInterrupt):
        make(folder, data, 3)
    with pytest.raises(InputError, match=r"interrupted here.*--resume"):
        make(folder, data)
    with pytest.raises(InputError, match="steps 7, not 8"):
        make(folder, data, steps=8, resume=True)
    with pytest.raises(InputError, match="seed 0, not 1"):
        make(folder, data, seed=1, resume=True)
    with pytest.raises(InputError, match="other images or labels"):
        make(folder, pictures(30, seed=1), resume=True)
    with pytest.raises(InputError, match="other images or labels"):
        make(folder, ImageSet(data.images, 1 - data.labels, "swapped"), resume=True)
    make(folder, data, resume=True)


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    data, path = pictures(30), tmp_path / CHECKPOINT_NAME
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, data, 3)
    whole = path.read_bytes()
    good = load(whole)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole"):
        make(tmp_path, data, resume=True)
    changes: list[dict[str, torch.Tensor]] = [
        {"done": torch.tensor(8)},
        {"done": torch.tensor([1, 2])},
        {"random": torch.zeros(3, dtype=torch.uint8)},
        {"maker.0.exp_avg": torch.zeros(2)},
        {"average.code_mean": torch.zeros(2)},
    ]
    broken = [{**good, **change} for change in changes]
    broken.append({name: t for name, t in good.items() if name != "judge.2.exp_avg_sq"})
    for state in broken:
        save_file(state, path, metadata=metadata)
        with pytest.raises(InputError, match="not a whole checkpoint"):
            make(tmp_path, data, resume=True)
    save_file(good, path)
    with pytest.raises(InputError, match="missing, not"):
        make(tmp_path, data, resume=True)
    save_file(good, path, metadata=metadata)
    make(tmp_path, data, resume=True)


def test_a_finished_folder_is_not_resumed_but_made_anew(tmp_path: Path) -> None:
    make(tmp_path, pictures(30))
    with pytest.raises(InputError, match="nothing to go on from"):
        make(tmp_path, pictures(30), resume=True)
    before = contents(tmp_path)
    make(tmp_path, pictures(30), seed=1)
    assert contents(tmp_path)["generator.safetensors"] != before["generator.safetensors"]


def test_a_training_that_diverges_makes_no_prior(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="diverged before step 7"):
        make(tmp_path, pictures(30), reconstruction=float("inf"))
    assert not (tmp_path / "card.yaml").exists()


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=80))
def test_every_tenth_image_of_each_class_is_held_out(labels: list[int]) -> None:
    pixels = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 1, 4, 4) / 255
    data = ImageSet(pixels.clone(), torch.tensor(labels), "these")
    seen, unseen = hold_out(data)
    counts, taken = dict.fromkeys(labels, 0), []
    for index, label in enumerate(labels):
        counts[label] += 1
        if counts[label] % 10 == 0:
            taken.append(index)
    kept = [index for index in range(len(labels)) if index not in taken]
    assert (seen.images[:, 0, 0, 0] * 255).round().int().tolist() == kept
    assert seen.labels.tolist() == [labels[index] for index in kept]
    if unseen is None:
        assert not taken
    else:
        assert (unseen.images[:, 0, 0, 0] * 255).round().int().tolist() == taken
        assert unseen.labels.tolist() == [labels[index] for index in taken]


def test_no_copy_of_a_held_out_image_is_trained_on() -> None:
    data = pictures(40)
    data.images[25] = data.images[18]  # 18 is the tenth of its class
    seen, unseen = hold_out(data)
    assert unseen is not None
    assert not set(fingerprints(seen.images)) & set(fingerprints(unseen.images))
    assert (len(seen), len(unseen)) == (40 - 4 - 1, 4)


def test_images_that_are_trained_on_are_not_held_out() -> None:
    seen, other = pictures(20), pictures(20, seed=1)
    assert apart(other, seen) is other
    mixed = ImageSet(torch.cat([other.images, seen.images[:3]]), torch.zeros(23).long(), "mixed")
    rest = apart(mixed, seen)
    assert torch.equal(rest.images, other.images)
    assert rest.source == "mixed but for 3 that are trained on"
    with pytest.raises(AuditError, match="all images of pictures are also in pictures"):
        apart(seen, seen)
    with pytest.raises(AuditError, match="differ in size"):
        apart(pictures(20, size=20), seen)


runner = CliRunner()


def train(folder: Path, *arguments: object) -> Result:
    small = ["--latent", 5, "--width", 16, "--steps", 4, "--device", "cpu"]
    return runner.invoke(app, [*map(str, ["prior", "train", folder, *small, *arguments])])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def fast_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "invert", partial(invert, starts=2, steps=5))


def save_npz(path: Path, data: ImageSet, **labels: NDArray[np.int64]) -> Path:
    pixels = (data.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(path, images=pixels, **labels)
    return path


@pytest.mark.usefixtures("fast_inversion")
def test_the_same_command_makes_the_same_files(tmp_path: Path) -> None:
    data = pictures(60)
    source = save_npz(tmp_path / "public.npz", data, labels=data.labels.numpy())
    for name in "ab":
        result = train(tmp_path / name / "prior", "--data", source)
        assert result.exit_code == 0, result.output
        assert "held-out images at best" in result.stderr
    assert contents(tmp_path / "a" / "prior") == contents(tmp_path / "b" / "prior")
    card = read_card(tmp_path / "a" / "prior")
    assert card.data == "public.npz, 54 images"
    assert card.held_out == "every tenth image of public.npz, 6 images"
    assert card.inversion is not None
    assert card.inversion.images == 6
    assert str(tmp_path) not in (tmp_path / "a" / "prior" / "card.yaml").read_text()
    # Canaries may be what was held out, and nothing else of the data.
    seen = load_trained(tmp_path / "a" / "prior").seen
    assert seen is not None
    marks = fingerprints(data.images)
    assert [i for i, mark in enumerate(marks) if mark not in seen] == [18, 19, 38, 39, 58, 59]


def test_nothing_is_held_out_where_that_is_asked_for(tmp_path: Path) -> None:
    source = save_npz(tmp_path / "d.npz", pictures(30), labels=np.arange(30) % 2)
    result = train(tmp_path / "p", "--data", source, "--held-out", "none")
    assert result.exit_code == 0, result.output
    card = read_card(tmp_path / "p")
    assert (card.data, card.held_out, card.inversion) == ("d.npz, 30 images", "none", None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["flat folder", "class folders", "npz"])
def test_an_unconditional_prior_needs_no_labels(tmp_path: Path, channels: int, form: str) -> None:
    data = pictures(12, channels=channels)
    source = tmp_path / "pictures"
    if form == "npz":
        source = save_npz(tmp_path / "pictures.npz", data)
    else:
        for index, image in enumerate(data.images):
            place = (
                source / ("cats" if index % 2 else "dogs") if form == "class folders" else source
            )
            place.mkdir(parents=True, exist_ok=True)
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels.squeeze()).save(place / f"{index}.png")
    options = ("--data", source, "--held-out", "none")
    assert "labels" in refused(train(tmp_path / "p", *options)) or form != "npz"
    result = train(tmp_path / "p", *options, "--unconditional")
    assert result.exit_code == 0, result.output
    card = read_card(tmp_path / "p")
    assert card.architecture.classes is None
    assert "--unconditional" in card.command
    prior = load_trained(tmp_path / "p")
    assert prior.classes is None
    assert prior.decode(torch.randn(3, 5), torch.tensor([7, 8, 9])).shape == (3, channels, 16, 16)
    assert prior.seen == frozenset(fingerprints(data.images))


@pytest.mark.usefixtures("fast_inversion")
def test_an_unconditional_prior_can_be_audited_with(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    source = save_npz(tmp_path / "pictures.npz", pictures(12))
    assert train(tmp_path / "p", "--data", source, "--unconditional").exit_code == 0
    card = read_card(tmp_path / "p")
    assert card.inversion is not None  # the tenth of twelve
    spec = sample("undefended", prior={"trained": str(tmp_path / "p")})
    prior = load_prior(spec, load_model(spec, CPU))
    latents = torch.randn(2, 5)
    drawn = prior.decode(latents, torch.tensor([3, 9]))
    assert torch.equal(drawn, prior.decode(latents, torch.tensor([0, 0])))


def test_a_conditional_generator_is_not_drawn_from_without_labels(tmp_path: Path) -> None:
    make(tmp_path, pictures(30))
    with pytest.raises(ValueError, match="latents and labels"):
        load_trained(tmp_path).generator(torch.randn(2, 6))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    source = save_npz(tmp_path / "d.npz", pictures(30), labels=np.arange(30) % 2)
    options = ("--data", source, "--held-out", "none")
    assert train(tmp_path / "whole" / "p", *options).exit_code == 0
    before, draw, folder = signal.getsignal(kind), Training._draw, tmp_path / "parts" / "p"
    signals = iter([kind])

    def signalled_amid_the_second_step(self: Training) -> tuple[torch.Tensor, ...]:
        if self.done == 1 and (now := next(signals, None)):
            os.kill(os.getpid(), now)
        return draw(self)

    monkeypatch.setattr(Training, "_draw", signalled_amid_the_second_step)
    result = train(folder, *options)
    assert result.exit_code == 3
    assert "interrupted; the same command with --resume goes on" in result.stderr
    assert int(load_file(folder / CHECKPOINT_NAME)["done"]) == 2
    assert signal.getsignal(kind) is before
    assert train(folder, *options, "--resume").exit_code == 0
    assert contents(folder) == contents(tmp_path / "whole" / "p")


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_npz(tmp_path / "d.npz", pictures(30), labels=np.arange(30) % 2)

    def hang(self: Training) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not end it")

    monkeypatch.setattr(Training, "_draw", hang)
    result = train(tmp_path / "p", "--data", source)
    assert result.exit_code == 3
    assert "interrupted; start anew" in result.stderr


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """The format of the MNIST files (LeCun), big-endian."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, parts: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> str:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, (images, labels) in parts.items():
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return f"torchvision:MNIST:{root}"


@pytest.mark.usefixtures("fast_inversion")
def test_a_torchvision_set_is_read_from_disk(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = {
        part: (random.integers(256, size=(n, 28, 28), dtype=np.uint8), np.arange(n, dtype="u1") % 3)
        for part, n in (("train", 30), ("t10k", 20))
    }
    source = write_mnist(tmp_path / "a:root", parts)
    for end, part in (("", "train"), (":train", "train"), (":test", "t10k")):
        data = read_torchvision_set(source + end)
        pixels, labels = parts[part]
        assert torch.equal(data.images, torch.from_numpy(pixels)[:, None] / 255)
        assert data.labels.tolist() == labels.tolist()
    result = train(tmp_path / "p", "--data", source, "--held-out", f"{source}:test", "--steps", 1)
    assert result.exit_code == 0, result.output
    card = read_card(tmp_path / "p")
    assert card.data == "torchvision MNIST, train part, 30 images"
    assert card.held_out == "torchvision MNIST, test part, 20 images"
    assert (card.architecture.size, card.architecture.classes) == (28, 3)
    assert str(tmp_path) not in card.command


def test_real_mnist_files(shared: Path, tmp_path: Path) -> None:
    def read(name: str, header: int) -> bytes:
        return gzip.decompress((shared / "mnist" / f"t10k-{name}-ubyte.gz").read_bytes())[header:]

    images = np.frombuffer(read("images-idx3", 16), np.uint8).reshape(-1, 28, 28)[:500]
    labels = np.frombuffer(read("labels-idx1", 8), np.uint8)[:500]
    data = read_torchvision_set(
        write_mnist(tmp_path, {"train": (images, labels), "t10k": (images[:9], labels[:9])})
    )
    assert data.images.shape == (500, 1, 28, 28)
    assert float(data.images[0, 0].mean()) == pytest.approx(images[0].mean() / 255)
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]  # the first of the test part, as all know


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:MNIST:FOLDER", "no whole MNIST there .*download=True"),
        ("torchvision:CIFAR10:FOLDER", "pickles, which are not opened.*savez"),
        ("torchvision:KMNIST:FOLDER", "no whole KMNIST there"),
        ("torchvision:SVHN:FOLDER:test", "no whole SVHN there"),
        ("torchvision:USPS:FOLDER", "no whole USPS there"),
        ("torchvision:MNITS:FOLDER", "Did you mean 'MNIST'"),
        ("torchvision:ImageNet:FOLDER", "Known are|Did you mean"),
        ("torchvision:MNIST", "expected torchvision:NAME:FOLDER"),
    ],
)
def test_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("it goes to the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    said = refused(train(tmp_path / "p", "--data", source.replace("FOLDER", str(tmp_path))))
    assert re.search(words, said)
    assert not any(tmp_path.iterdir())


def test_broken_torchvision_files_are_named(tmp_path: Path) -> None:
    images, labels = np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8)
    source = write_mnist(tmp_path, {"train": (images, labels), "t10k": (images, labels)})
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    assert "no whole MNIST there" in refused(train(tmp_path / "p", "--data", source))


def pneumonia(shared: Path, split: str) -> ImageSet:
    path = shared / "medmnist" / "pneumoniamnist.npz"
    spec = ImageSetSpec.model_validate({"npz": path, "split": split})
    return read_image_set(spec, Path(), ("data",), "reference")


def test_the_bundled_radiographs_are_small_and_credited() -> None:
    folder = bundled_folder() / "pneumonia"
    assert (folder / "generator.safetensors").stat().st_size < 3_000_000
    card = read_card(folder)
    for words in ("CC BY 4.0", "MedMNIST v2", "Yang et al., Scientific Data 2023", "Kermany"):
        assert words in card.licence
    assert card.architecture.classes == 2
    assert set(yaml.safe_load((folder / "card.yaml").read_text())) >= {"held_out", "inversion"}


def test_the_bundled_radiographs_represent_what_they_have_not_seen(shared: Path) -> None:
    prior = load_trained(bundled_folder() / "pneumonia")
    card = read_card(bundled_folder() / "pneumonia")
    assert card.inversion is not None
    unseen = pneumonia(shared, "val")
    some = ImageSet(unseen.images[:8], unseen.labels[:8], "some")
    figures, pictures = invert(prior.generator, some, starts=2, steps=150)  # type: ignore[arg-type]
    errors = (pictures - some.images).square().flatten(1).mean(1)
    assert figures.psnr_db == pytest.approx(float((-10 * errors.log10()).mean()), abs=0.01)
    assert figures.psnr_db > card.inversion.psnr_db - 3
    assert prior.seen is not None
    trained_on = pneumonia(shared, "train")
    assert set(fingerprints(trained_on.images)) == set(prior.seen)


def test_the_bundled_radiographs_draw_the_class_they_are_asked_for(shared: Path) -> None:
    """Judged by the nearest neighbours among real images that the prior has not seen."""
    prior = load_trained(bundled_folder() / "pneumonia")
    labels = torch.arange(2).repeat_interleave(100)
    random = torch.Generator().manual_seed(0)
    drawn = prior.decode(torch.randn(200, prior.size, generator=random), labels)
    real = pneumonia(shared, "val")
    for label in range(2):
        own, known = drawn[labels == label].flatten(1), real.images[real.labels == label].flatten(1)
        # As varied as real ones, and in the middle like them.
        assert float(own.std(dim=0).mean()) > 0.7 * float(known.std(dim=0).mean())
        other = real.images[real.labels != label].flatten(1).mean(dim=0)
        middle = own.mean(dim=0)
        assert float((middle - known.mean(dim=0)).norm()) < float((middle - other).norm())
