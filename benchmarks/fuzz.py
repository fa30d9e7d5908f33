"""Gives every reader of ggl-audit files that are nearly right, and counts what becomes of them.

    python benchmarks/fuzz.py                        # 10,000 inputs a reader
    python benchmarks/fuzz.py --only npz --inputs 500 --keep found

Each reader works in a process of its own, in little more memory than it starts with and against a
clock, so that a crash or a hang costs one input. An input is made of a valid file by one to four
changes; in zip archives, pictures and pickles also of what the checksums protect, which are then
mended. The same reader, number and seed make the same changes.

Exit: 0, or 1 where an input was met with a traceback, a hang, a crash, or more memory than is
allowed.
"""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import save as save_safetensors
from torch import nn

from ggl_audit.errors import AuditError
from ggl_audit.inputs.images import read_image, read_image_set
from ggl_audit.inputs.programs import load_exported
from ggl_audit.inputs.spec_file import parse_defense, parse_override, read_spec
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.priors.card import CARD_NAME, read_card
from ggl_audit.report.console import render_console
from ggl_audit.report.formats import read_report
from ggl_audit.report.html import render_html
from ggl_audit.spec import ImageSetSpec

SAMPLES = Path(__file__).resolve().parent.parent / "sample_specs"
DIGITS = SAMPLES.parent / "gan_weights" / "digits"

SECONDS = 10
"""That one input may take."""

ROOM = 512 * 2**20
"""Bytes of address space beyond what a process starts with."""

MOST_OVER = 32 * 2**20
"""Bytes beyond twice what an input declares that are still noise: caches, pools of memory."""

NO_ROOM = re.compile(r"needs more memory|can't allocate|cannot allocate|MemoryError|bad_alloc")
"""What is said where more was asked for than there was."""

OUTCOMES = ("read", "refused", "traceback", "hang", "crash")
EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
DIGITS_IN_TEXT = re.compile(rb"\d+")
NUMBERS_IN_TEXT = (b"0", b"-1", b"1e999", b"NaN", b"99999999999999999999", b"9" * 5000, b"0x7f")

PICKLE = (
    b"(",
    b")",
    b"}",
    b"]",
    b"R",
    b"Q",
    b"b",
    b"\x85",
    b"\x86",
    b"h\x00",
    b"t",
    b"s",
    b"u",
    b"N",
)
YAML = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"- ",
        b": ",
        b"? ",
        b"[",
        b"{",
        b"]",
        b"}",
        b"\t",
        b"\0",
        b"---\n",
    ),
    *(b"!!python/object:os.system", b"!!binary ", b"!!set ", b"\xef\xbb\xbf", b".nan", b".inf"),
    *(b"2020-99-99", b"\x1b[31m", b"../../etc/passwd", b"/etc/passwd", b'"\\0"', b"1:59:59"),
)
JSON = (
    b"null",
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e400",
    b"[]",
    b"{}",
    b'""',
    b'"\\u001b[31m"',
    b"true",
)


@dataclass(frozen=True)
class Reader:
    """What is given inputs.

    Attributes:
        file: the name of the input's file.
        seeds: makes valid inputs.
        read: reads a file and returns what it holds.
        parts: takes an input apart into what checksums protect, and what puts it together again.
        words: that belong to the format.
    """

    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    parts: Callable[[bytes], tuple[list[bytes], Callable[[list[bytes]], bytes]]] | None = None
    words: tuple[bytes, ...] = ()


@dataclass
class Tally:
    """What became of the inputs of one reader.

    Attributes:
        outcomes: how often each of :data:`OUTCOMES`.
        most_over: bytes of memory beyond twice what the input declares, at most.
        bad: the numbers of inputs that must be looked at, with the reason.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    most_over: int = 0
    bad: dict[int, str] = field(default_factory=dict)


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "0.weight": torch.arange(24.0).reshape(2, 3, 4),
        "0.bias": torch.ones(3, dtype=torch.float16),
        "steps": torch.tensor([1, 2, 3]),
    }


def _saved(content: object, *, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def _torch_seeds(*, archive: bool) -> list[bytes]:
    tensors = _tensors()
    several = [
        tensors,
        list(tensors.values()),
        {"state_dict": tensors, "epoch": 3, "optimizer_states": [{"state": {0: tensors}}]},
        [{"gradients": list(tensors.values()), "buffers": None, "metadata": {"labels": (1, 2)}}],
        {name: nn.Parameter(tensor.float()) for name, tensor in tensors.items()},
        [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, dtype=np.int64)],
    ]
    return [_saved(content, archive=archive) for content in several]


def _npz_seeds() -> list[bytes]:
    seeds = []
    for save in (np.savez, np.savez_compressed):
        for arrays in (
            {name: tensor.numpy() for name, tensor in _tensors().items()},
            {f"arr_{i}": np.ones((2, i)) for i in range(12)},
        ):
            buffer = io.BytesIO()
            save(buffer, **arrays)
            seeds.append(buffer.getvalue())
    return seeds


def _image_npz_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6), dtype=np.uint8)
    labels = np.array([0, 0, 1, 1])
    plain, medmnist = io.BytesIO(), io.BytesIO()
    np.savez(plain, images=pixels, labels=labels)
    np.savez_compressed(
        medmnist,
        **{f"{split}_images": pixels for split in ("train", "val", "test")},
        **{f"{split}_labels": labels[:, None] for split in ("train", "val", "test")},
    )
    return [plain.getvalue(), medmnist.getvalue()]


def _npy_seeds() -> list[bytes]:
    seeds = []
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 2), ">f4"))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        seeds.append(buffer.getvalue())
    return seeds


def _picture_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    seeds = []
    for picture in (colour, colour.convert("L"), colour.convert("P"), colour.convert("1")):
        for kind in ("PNG", "BMP", "JPEG"):
            if kind != "JPEG" or picture.mode in ("L", "RGB"):
                buffer = io.BytesIO()
                picture.save(buffer, format=kind)
                seeds.append(buffer.getvalue())
    return seeds


def _spec_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(SAMPLES.glob("*.yaml"))]


def _argument_seeds() -> list[bytes]:
    return [
        b"attack.evaluations=500",
        b"model.input.mean=[0.1, 0.2]",
        b"defense.0.fraction=0.5",
        b"prior={bundled: digits}",
        b"clip:bound=1+noise:std=0.1",
        b"sparsify:fraction=0.9,scope=global",
        b"none",
    ]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.relu(self.first(images.flatten(1))))
        return result


def _exported_seeds() -> list[bytes]:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        _Net(), (torch.zeros(2, 1, 2, 2),), dynamic_shapes={"images": {0: batch}}
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return [buffer.getvalue()]


def _report_seeds() -> list[bytes]:
    from ggl_audit.audit import run_audit
    from ggl_audit.report.formats import render_json

    class Silent:
        def start(self, evaluations: int) -> None: ...
        def stage(self, name: str) -> None: ...
        def advance(self, evaluations: int) -> None: ...

        def say(self, sentence: str) -> None: ...

    small = {
        "attack.evaluations": 60,
        "evidence.matching_trials": 4,
        "evidence.reconstruction_trials": 2,
        "evidence.control_trials": 1,
        "device": "cpu",
    }
    names = ("digits_dp", "digits_sparsified")
    specs = (read_spec(SAMPLES / f"{name}.yaml", small.items()) for name in names)
    return [render_json(run_audit(spec, Silent())).encode() for spec in specs]


def _read_spec(path: Path) -> object:
    return read_spec(path)


def _read_argument(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    refusals = []
    for use in (_as_set, parse_defense):
        try:
            use(text)
        except AuditError as error:
            refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]
    return text


def _as_set(text: str) -> object:
    return read_spec(SAMPLES / "digits_sparsified.yaml", [parse_override(text)])


def _read_picture(path: Path) -> object:
    try:
        return read_image(path, (3, 16, 16))
    except AuditError:
        return read_image(path, (1, 16, 16))


def _read_npz_images(path: Path) -> object:
    text = path.read_bytes()
    split = "test" if b"test_images" in text else None
    spec = ImageSetSpec.model_validate({"npz": path, "split": split})
    return read_image_set(spec, Path(), ("data",), "reference").images


def _read_folder(path: Path) -> object:
    """Reads a folder that holds the input beside a whole picture."""
    whole = path.parent / "0" / "whole.png"
    whole.parent.mkdir(exist_ok=True)
    if not whole.exists():
        Image.new("RGB", (16, 16)).save(whole)
    spec = ImageSetSpec.model_validate({"folder": path.parent.parent})
    return read_image_set(spec, Path(), ("data",), "reference").images


def _read_and_render(path: Path) -> object:
    report = read_report(path)
    render_html(report)
    render_console(report, Console(file=io.StringIO(), width=100))
    return report.model_dump_json()


def _zip_parts(content: bytes) -> tuple[list[bytes], Callable[[list[bytes]], bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        parts = [archive.read(member) for member in members]

    def together(changed: list[bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, part in zip(members, changed, strict=True):
                archive.writestr(member.filename, part, member.compress_type)
        return buffer.getvalue()

    return parts, together


def _png_parts(content: bytes) -> tuple[list[bytes], Callable[[list[bytes]], bytes]]:
    if content[:4] != b"\x89PNG":
        return [content], lambda changed: changed[0]
    kinds, parts, place = [], [], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kinds.append(content[place + 4 : place + 8])
        data = content[place + 8 : place + 8 + length]
        parts.append(zlib.decompress(data) if kinds[-1] == b"IDAT" else data)
        place += 12 + length

    def together(changed: list[bytes]) -> bytes:
        pieces = [content[:8]]
        for kind, part in zip(kinds, changed, strict=True):
            data = zlib.compress(part) if kind == b"IDAT" else part
            checksum = struct.pack(">I", zlib.crc32(kind + data))
            pieces += [struct.pack(">I", len(data)), kind, data, checksum]
        return b"".join(pieces)

    return parts, together


READERS = {
    "spec": Reader("audit.yaml", _spec_seeds, _read_spec, words=YAML),
    "--set, --defense": Reader("argument", _argument_seeds, _read_argument, words=YAML),
    "safetensors": Reader(
        "x.safetensors", lambda: [save_safetensors(_tensors())], read_tensors, words=JSON
    ),
    "pt": Reader("x.pt", partial(_torch_seeds, archive=True), read_tensors, _zip_parts, PICKLE),
    "pt before 1.6": Reader(
        "x.pt", partial(_torch_seeds, archive=False), read_tensors, words=PICKLE
    ),
    "npz": Reader("x.npz", _npz_seeds, read_tensors, _zip_parts),
    "npz of images": Reader("x.npz", _image_npz_seeds, _read_npz_images, _zip_parts),
    "npy": Reader("x.npy", _npy_seeds, read_tensors),
    "picture": Reader("x.png", _picture_seeds, _read_picture, _png_parts),
    "folder of images": Reader("set/0/x.png", _picture_seeds, _read_folder, _png_parts),
    "card": Reader(
        CARD_NAME,
        lambda: [(DIGITS / CARD_NAME).read_bytes()],
        lambda path: read_card(path.parent),
        words=YAML,
    ),
    "report": Reader("report.json", _report_seeds, _read_and_render, words=JSON),
    "torch.export": Reader("x.pt2", _exported_seeds, load_exported, _zip_parts, JSON),
}


def mutated(reader: Reader, seeds: list[bytes], random: Random) -> bytes:
    """A valid input with one to four changes, half of them below the checksums."""
    content = random.choice(seeds)
    changes = random.choice((1, 1, 1, 2, 4))
    if reader.parts is None or random.random() < 0.5:
        for _ in range(changes):
            content = _changed(content, random.choice(seeds), reader.words, random)
        return content
    parts, together = reader.parts(content)
    for _ in range(changes):
        place = random.randrange(len(parts))
        parts[place] = _changed(parts[place], random.choice(parts), reader.words, random)
    return together(parts)


def _changed(content: bytes, other: bytes, words: tuple[bytes, ...], random: Random) -> bytes:
    start = random.randint(0, len(content))
    stop = min(len(content), start + random.choice((1, 2, 4, 8, 64, 1024)))
    piece = content[start:stop]
    match random.randrange(10):
        case 0:  # flip a bit of each byte
            return (
                content[:start]
                + bytes(b ^ (1 << random.randrange(8)) for b in piece)
                + content[stop:]
            )
        case 1:
            return content[:start]
        case 2:  # splice
            return content[:start] + other[random.randint(0, len(other)) :]
        case 3:  # duplicate
            return content[:stop] + piece * random.choice((1, 1, 2, 100)) + content[stop:]
        case 4:  # zero
            return content[:start] + bytes(len(piece)) + content[stop:]
        case 5:  # insert
            return content[:start] + random.randbytes(random.choice((1, 4, 40))) + content[start:]
        case 6:  # delete
            return content[:start] + content[stop:]
        case 7 if words:
            return content[:start] + random.choice(words) + content[start:]
        case 8:  # a number in digits
            found = list(DIGITS_IN_TEXT.finditer(content))
            if found:
                at = random.choice(found)
                return content[: at.start()] + random.choice(NUMBERS_IN_TEXT) + content[at.end() :]
    size = random.choice((1, 2, 4, 8))
    number = random.choice(EDGES) % 2 ** (8 * size)
    order = random.choice(("little", "big"))
    return content[:start] + number.to_bytes(size, order) + content[start + size :]


class _LateError(BaseException):
    """Raised by the clock; a reader that turns any error into a message lets it through."""


def outcome(reader: Reader, path: Path) -> tuple[str, int, str]:
    """Reads one input.

    Returns:
        One of :data:`OUTCOMES`, the bytes of what was read, and a reason.
    """
    try:
        return "read", _bytes(reader.read(path)), ""
    except AuditError as error:
        return "refused", 0, str(error)
    except _LateError:
        return "hang", 0, f"longer than {SECONDS} s"
    except Exception as error:
        return "traceback", 0, f"{type(error).__name__}: {error}"[:300]


def _bytes(value: Any) -> int:
    """The size of what was read, as far as it is large."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, nn.Module):
        return _bytes([*value.parameters(), *value.buffers()])
    if isinstance(value, dict):
        return _bytes(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, str) else 0


def _kib(name: str) -> int:
    """A figure of this process, as Linux keeps them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def work(name: str, folder: Path, seed: int, start: int, stop: int) -> None:
    """Reads inputs in this process and prints a line before and after each.

    Args:
        name: of the reader.
        folder: of its valid inputs.
        seed: of the inputs.
        start: number of the first input.
        stop: number after the last one.
    """

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise _LateError

    reader = READERS[name]
    seeds = _read_seeds(folder)
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / reader.file
        path.parent.mkdir(parents=True, exist_ok=True)
        for content in seeds:  # what is loaded once is not the input's
            path.write_bytes(content)
            how, _, why = outcome(reader, path)
            assert how == "read", f"{name}: a valid input was {how} ({why})"
        limit = 1024 * _kib("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(start, stop):
            print(number, flush=True)  # noqa: T201
            content = mutated(reader, seeds, Random(f"{name} {seed} {number}"))  # noqa: S311
            path.write_bytes(content)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
            before = _kib("VmRSS")
            signal.alarm(SECONDS)
            how, read, why = outcome(reader, path)
            signal.alarm(0)
            over = 1024 * (_kib("VmHWM") - before) - 2 * max(read, len(content))
            if NO_ROOM.search(why):
                over = max(over, ROOM)
            print(json.dumps([how, over, why]), flush=True)  # noqa: T201


def _read_seeds(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def fuzz(name: str, folder: Path, seed: int, inputs: int) -> Tally:
    """Gives a reader its inputs, in as many processes as it takes.

    Args:
        name: of the reader.
        folder: takes its valid inputs.
        seed: of the inputs.
        inputs: how many.
    """
    tally = Tally()
    torch.manual_seed(0)
    for place, content in enumerate(READERS[name].seeds()):
        (folder / f"{place:02}").write_bytes(content)
    number = 0
    while number < inputs:
        command = [sys.executable, __file__, "--work", name, "--seeds", str(folder)]
        command += ["--seed", str(seed), "--start", str(number), "--inputs", str(inputs)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            assert process.stdout is not None
            finished = False
            started = 0
            watch = _Watch(process)
            for line in process.stdout:
                watch.seen()
                if not line.startswith("["):
                    number, finished, started = int(line), False, started + 1
                    continue
                how, over, why = json.loads(line)
                finished = True
                tally.outcomes[how] += 1
                tally.most_over = max(tally.most_over, over)
                if how in OUTCOMES[2:] or over > MOST_OVER:
                    tally.bad[number] = f"{how}, {over >> 20} MiB over: {why}"
            watch.stop()
        if not started:
            raise RuntimeError(f"{name} cannot be started")
        if not finished:
            how = "hang" if watch.late else "crash"
            tally.outcomes[how] += 1
            tally.bad[number] = f"{how}, exit {process.returncode}"
        number += 1
    return tally


class _Watch:
    """Ends a process that has said nothing for a while, as one that hangs in C does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        import threading

        self.late = False
        self._process = process
        self._last = time.monotonic() + 60  # to start
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def seen(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(1):
            if time.monotonic() - self._last > 2 * SECONDS:
                self.late = True
                self._process.kill()
                return


def main(
    inputs: Annotated[int, typer.Option(help="For each reader.")] = 10_000,
    only: Annotated[list[str] | None, typer.Option(help="A reader. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    keep: Annotated[
        Path | None, typer.Option(help="A folder for the inputs that must be looked at.")
    ] = None,
    work_on: Annotated[str | None, typer.Option("--work", hidden=True)] = None,
    seeds: Annotated[Path, typer.Option(hidden=True)] = Path(),
    start: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Fuzzes the readers and prints a table."""
    torch.set_num_threads(1)
    if work_on is not None:
        work(work_on, seeds, seed, start, inputs)
        return
    unknown = set(only or []) - set(READERS)
    if unknown:
        raise typer.BadParameter(f"no reader {min(unknown)!r}; there are {', '.join(READERS)}")
    good = True
    typer.echo(f"| reader | inputs | {' | '.join(OUTCOMES)} | most memory over declared |")
    typer.echo(f"| --- |{' ---: |' * (len(OUTCOMES) + 2)}")
    for name in only or READERS:
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(name, Path(folder), seed, inputs)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for number in tally.bad:
                    random = Random(f"{name} {seed} {number}")  # noqa: S311
                    content = mutated(READERS[name], _read_seeds(Path(folder)), random)
                    (keep / f"{number}-{Path(READERS[name].file).name}").write_bytes(content)
        counts = " | ".join(str(tally.outcomes[how]) for how in OUTCOMES)
        typer.echo(f"| {name} | {inputs} | {counts} | {max(0, tally.most_over) / 2**20:.1f} MiB |")
        for number, why in list(tally.bad.items())[:20]:
            typer.echo(f"{name} {number}: {why!r}", err=True)
        good = good and not tally.bad
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
