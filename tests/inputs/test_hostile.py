"""Files that somebody made to break the reader, or to make it do something else."""

from __future__ import annotations

import base64
import datetime
import functools
import importlib.util
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from ggl_audit.audit import run_audit
from ggl_audit.cli import app
from ggl_audit.errors import REFUSED, AuditError, InputError, SpecError
from ggl_audit.inputs.images import read_image, read_image_set
from ggl_audit.inputs.spec_file import parse_defense, parse_override, read_spec
from ggl_audit.inputs.tensors import npz_names, read_tensors
from ggl_audit.inputs.yaml_file import NotYamlError, parse_yaml
from ggl_audit.priors.card import read_card
from ggl_audit.report.console import render_console
from ggl_audit.report.formats import read_report, render_json
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report
from ggl_audit.spec import ImageSetSpec
from tests.conftest import SAMPLES, Counter

FUZZ = Path(__file__).parent.parent.parent / "benchmarks" / "fuzz.py"
STEER = "\x1b[31m\x07\u202e<u x>&'\""


def load_fuzz() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = module
    specification.loader.exec_module(module)
    return module


fuzz = load_fuzz()
# The one that runs native code, and the one that takes an audit to make, have the benchmark alone.
READERS = [name for name in fuzz.READERS if name not in ("torch.export", "report")]


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_nearly_right_are_read_or_refused(tmp_path: Path, name: str) -> None:
    reader = fuzz.READERS[name]
    seeds = reader.seeds()
    path = tmp_path / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes = set()
    for number in range(200):
        random = Random(f"test {number}")
        path.write_bytes(fuzz.mutated(reader, seeds, random))
        how, _, why = fuzz.outcome(reader, path)
        assert how in ("read", "refused"), f"{number}: {why}"
        assert "\x1b" not in why
        outcomes.add(how)
    assert outcomes == {"read", "refused"}


def test_what_is_read_of_a_damaged_file_is_what_pytorch_reads(tmp_path: Path) -> None:
    reader = fuzz.READERS["pt"]
    content = {name: tensor.float() for name, tensor in fuzz._tensors().items()}
    compared = 0
    for number in range(400):
        random = Random(f"same {number}")
        path = tmp_path / "x.pt"
        seed = fuzz._saved(content, archive=random.random() < 0.5)
        plain = fuzz.Reader("x.pt", list, read_tensors, None, reader.words)
        path.write_bytes(fuzz.mutated(plain, [seed], random))
        try:
            read = read_tensors(path)
            expected = torch.load(path, weights_only=True)
        except Exception:  # noqa: S112
            continue
        assert list(read) == list(map(str, expected))
        for found, other in zip(read.values(), expected.values(), strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
        compared += 1
    assert compared >= 20


# Pickles


def pickled(instructions: bytes) -> bytes:
    """A zip archive of torch.save with these instructions for a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + instructions + b".")
        archive.writestr("x/data/0", bytes(16))
    return buffer.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape: bytes, strides: bytes, count: bytes = b"K\x04") -> bytes:
    """The instructions for a tensor in the storage 0, of 16 bytes."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count
    rest = b"\x89ccollections\nOrderedDict\n)Rt"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"tQK\x00"
        + shape
        + strides
        + rest
        + b"R"
    )


def test_the_instructions_are_those_of_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickled(tensor(b"K\x04\x85", b"K\x01\x85")))
    assert torch.equal(read_tensors(tmp_path / "x.pt")["0"], torch.zeros(4))


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x40"  # 2**46
PICKLES = {
    "a shape larger than its storage": (
        tensor(HUGE + b"\x85", b"K\x01\x85"),
        "reaches beyond its storage",
    ),
    "strides that leave its storage": (
        tensor(b"K\x04\x85", HUGE + b"\x85"),
        "reaches beyond its storage",
    ),
    "a shape of one number again and again": (
        tensor(HUGE + b"\x85", b"K\x00\x85"),
        "repeats its values",
    ),
    "a negative shape": (
        tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        "that no tensor has",
    ),
    "negative strides": (
        tensor(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
        "that no tensor has",
    ),
    "a shape of text": (
        tensor(text("4") + b"\x85", b"K\x01\x85"),
        "that no tensor has",
    ),
    "a hundred dimensions": (
        tensor(b"(" + b"K\x01" * 100 + b"t", b"(" + b"K\x01" * 100 + b"t"),
        "do not go together",
    ),
    "a storage larger than its member": (
        tensor(b"K\x04\x85", b"K\x01\x85", HUGE),
        "has 16 bytes, not",
    ),
    "a storage of a negative size": (
        tensor(b"K\x04\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),
        "something else than a storage",
    ),
    "bytes that multiply": (
        b"c_codecs\nencode\n" + text("ab" * 9) + text("hex") + b"\x86R",
        "calls _codecs.encode",
    ),
    "so many zeros": (
        b"c__builtin__\nbytearray\n" + HUGE + b"\x85R",
        "'__builtin__.bytearray'",
    ),
    "a tensor of so many numbers": (
        b"ctorch\nFloatTensor\n" + HUGE + b"\x85R",
        "'torch.FloatTensor'",
    ),
    "a tuple of tuples as a key": (
        b"})q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns",
        "a key that is a tuple",
    ),
    "a set of tuples of tuples": (
        b"c__builtin__\nset\n](" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"e\x85R",
        "expected tensors",
    ),
    "a list that holds itself": (
        b"]q\x00h\x00a",
        "expected tensors",
    ),
    "a dict that holds itself": (
        b"}q\x00" + text("state_dict") + b"h\x00s",
        "expected tensors",
    ),
    "lists as deep as it is long": (
        b"]" * 5_000 + b"a" * 4_999,
        "expected tensors",
    ),
    "more instructions than tensors need": (
        b"]" + b"Na" * 300_000,
        "more than 500,000 instructions",
    ),
    "a name of the system": (
        b"cos\nsystem\n" + text("true") + b"\x85R",
        "'os.system', which could run code",
    ),
    "a name that is put together": (
        text("os") + text("system") + b"\x93" + text("true") + b"\x85R",
        "the instruction STACK_GLOBAL",
    ),
    "an attribute of a class": (
        b"ctorch\nTensor.__reduce__\n)R",
        "'torch.Tensor.__reduce__'",
    ),
    "code of PyTorch": (
        b"ctorch\nload\n" + text("x") + b"\x85R",
        "'torch.load'",
    ),
    "a class without a call": (
        b"(ios\nsystem\n.",
        "the instruction INST",
    ),
    "nothing on the stack": (
        b"0",
        "the instruction POP",
    ),
    "no mark": (
        b"t",
        "its parts do not go together",
    ),
    "a memory that is not there": (
        b"h\x07",
        "its parts do not go together",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_lies_is_refused_at_once(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.pt"
    instructions, words = PICKLES[case]
    path.write_bytes(pickled(instructions))
    start = time.monotonic()
    with pytest.raises(InputError, match=re.escape(words)):
        read_tensors(path)
    assert time.monotonic() - start < 2


def test_a_pickle_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    long = b"X" + struct.pack("<I", 2**24) + b"x" * 2**24
    path = tmp_path / "x.pt"
    whole = legacy({"a": 1})
    for content in (pickled(long), whole.replace(b"X\x01\x00\x00\x00a", long)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="its pickle is longer than"):
            read_tensors(path)


def test_a_name_that_could_be_code_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickled(b"cposix\nsystem\n" + text("touch it") + b"\x85R"))
    with pytest.raises(InputError, match=r"names 'posix\.system', which could run code"):
        read_tensors(path)


class Touch:
    """Touches a file when it is unpickled, in one of the ways that pickles have."""

    def __init__(self, way: str, marker: Path) -> None:
        self.way, self.marker = way, marker

    def __reduce__(self) -> tuple[Any, ...]:
        touch = (Path.touch, (self.marker,))
        return {
            "a call": touch,
            "a state": (Path, ("x",), self.marker),
            "items": (list, (), None, iter([self.marker])),
            "pairs": (dict, (), None, None, iter([(self.marker, Touch("a call", self.marker))])),
        }[self.way]


BESIDE = {
    "paths": {"data_dir": Path("/data/train"), "logs": {Path("a"): 1}},
    "a namespace": SimpleNamespace(lr=0.1, seen={(1, 2): "a tuple"}, inner=[range(3)]),
    "a path as a key": {Path("a"): {"b": Path("c")}},
    "a partial": functools.partial(min, 3, key=abs),
    "a date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "an enumeration": re.RegexFlag.IGNORECASE,
    **{way: way for way in ("a call", "a state", "items", "pairs")},
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_state_dict_stays_closed(
    tmp_path: Path, name: str, archive: bool
) -> None:
    marker = tmp_path / "was_here"
    beside = Touch(name, marker) if name == BESIDE[name] else BESIDE[name]
    state = {"0.weight": torch.rand(3, 2), "criterion.pos_weight": torch.ones(1)}
    checkpoint = {
        "epoch": 1,
        "hyper_parameters": {"given": beside},
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"dirpath": beside, "best": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3, 2)}}}],
    }
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=archive)
    read = read_tensors(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert not marker.exists()
    for whole in (beside, {"state_dict": beside}, {**state, "more": beside}, [beside]):
        torch.save(whole, path, _use_new_zipfile_serialization=archive)
        with pytest.raises(InputError):
            read_tensors(path)
    assert not marker.exists()


# What is allocated

IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from ggl_audit.errors import REFUSED, InputError
from ggl_audit.inputs.images import read_image
from ggl_audit.inputs.tensors import read_tensors
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try:
        read_image(Path(path), (1, 8, 8)) if path.endswith("png") else read_tensors(Path(path))
    except InputError as error:
        print(error)
    else:
        print("read", path)
"""


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def npy_header(shape: str) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def said_to_have(archive: bytes, size: int) -> bytes:
    """The archive whose directory says that its first member has so many bytes unpacked."""
    place = archive.index(b"PK\x01\x02") + 24
    return archive[:place] + struct.pack("<I", size) + archive[place + 4 :]


def test_nothing_is_allocated_because_a_header_says_so(tmp_path: Path) -> None:
    """With 256 MiB to spare, each of these files claims gigabytes."""
    tensor_file = legacy({"a": torch.ones(4)})
    many = {"a": torch.zeros(1)}
    noise = np.random.default_rng(0).bytes(2**19)
    member = npy_header("(1,)") + bytes(8)
    files = {
        "storage.pt": (
            tensor_file.replace(b"K\x04Nt", b"J\x00\x00\x00\x7fNt"),
            "it ends before its tensors do",
        ),
        "string.pt": (
            tensor_file.replace(b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\x7fa"),
            "expected",
        ),
        "many.pt": (
            legacy(many).replace(b"K\x01Nt", b"J\x00\x00\x00\x10Nt"),
            "it ends before its tensors do",
        ),
        "array.npy": (
            npy_header("(2**33,)".replace("2**33", str(2**33))) + bytes(8),
            "the header of '0' says",
        ),
        "array.npz": (
            zipped({"a.npy": npy_header(f"({2**33},)") + bytes(8)}),
            "the header of 'a' says",
        ),
        "stored.npz": (
            said_to_have(zipped({"a.npy": member}), 2**31),
            "larger than it can be",
        ),
        "deflated.npz": (
            said_to_have(zipped({"a.npy": member}, zipfile.ZIP_DEFLATED), 2**31),
            "larger than it can be",
        ),
        "bomb.npz": (
            said_to_have(zipped({"a.npy": noise}, zipfile.ZIP_DEFLATED), 2**29),
            "that expands to",
        ),
        "bomb.pt": (
            said_to_have(zipped({"x/data.pkl": noise}, zipfile.ZIP_DEFLATED), 2**29),
            "unusual way",
        ),
        "pickle.pt": (
            said_to_have(zipped({"x/data.pkl": b"\x80\x02N."}), 2**31),
            "larger than it can be",
        ),
        "header.safetensors": (
            struct.pack("<Q", 2**33) + b"{}",
            "not a whole",
        ),
        "offsets.safetensors": (
            _claiming(2**33),
            "not a whole",
        ),
        "chunk.png": (
            png(8, 8, data=bytes(72)).replace(b"\0\0\0\x0cIDAT", b"\x7f\0\0\x0cIDAT"),
            "read",
        ),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in files]
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, *paths], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(files), done.stdout
    for (name, (_, words)), line in zip(files.items(), lines, strict=True):
        assert name in line
        assert words in line
        assert "memory" not in line.lower()


def _claiming(count: int) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
    return struct.pack("<Q", len(header)) + header.encode()


def test_files_are_bounded_as_asked(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1000)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", a=np.zeros(1000, np.float32))
    np.save(tmp_path / "x.npy", np.zeros(1000, np.float32))
    (tmp_path / "old.pt").write_bytes(legacy(tensors))
    twice = {"a": tensors["a"], "b": tensors["a"]}  # a storage that two tensors share
    torch.save(twice, tmp_path / "twice.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="at most 3,999 are read"):
            read_tensors(path, most_bytes=3_999)
        read_tensors(path, most_bytes=20_000)
    with pytest.raises(InputError, match="at most 7,999 are read"):
        read_tensors(tmp_path / "twice.pt", most_bytes=7_999)


# Zip archives


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    member = npy_header("(1,)") + bytes(8)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", member)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", member)
    with pytest.raises(InputError, match=r"holds 'a\.npy' twice"):
        read_tensors(tmp_path / "x.npz")


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A zip bomb of Fifield's kind (WOOT 2019): many names for one member."""
    content = zipped({"a.npy": npy_header("(1000,)") + bytes(8000)})
    place = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[place:end]
    entries = b"".join(entry.replace(b"a.npy", f"{i}.npy".encode()) for i in range(9))
    tail = struct.pack("<HHII", 9, 9, len(entries), place)
    (tmp_path / "x.npz").write_bytes(
        content[:place] + entries + content[end : end + 8] + tail + b"\0\0"
    )
    with pytest.raises(InputError, match="overlap"):
        read_tensors(tmp_path / "x.npz")


def test_zeros_may_be_compressed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2_000_000))
    assert (tmp_path / "x.npz").stat().st_size < 20_000
    assert torch.equal(read_tensors(tmp_path / "x.npz")["a"], torch.zeros(2_000_000).double())


def test_a_directory_of_millions_is_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    entries = b"PK\x01\x02".ljust(46, b"\0") * 100_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, len(entries), 0, 0)
    path.write_bytes(entries + end)
    with pytest.raises(InputError, match="directory is larger than"):
        npz_names(path)


def test_members_with_the_names_of_other_folders_are_only_names(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    np.savez(inside / "x.npz", **{"../../up": np.ones(1), "/etc/x": np.ones(1)})
    assert list(read_tensors(inside / "x.npz")) == ["../../up", "/etc/x"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Names


def files_with_a_name(folder: Path, name: str) -> list[Path]:
    content = {name: torch.ones(2)}
    save_file(content, folder / "x.safetensors")
    torch.save(content, folder / "x.pt")
    np.savez(folder / "x.npz", **{name: np.ones(2)})
    return sorted(folder.glob("x.*"))


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def test_a_name_cannot_steer_the_terminal(samples: Path, tmp_path: Path) -> None:
    for path in files_with_a_name(tmp_path, STEER):
        assert list(read_tensors(path)) == [STEER]
        spec = samples / "digits_undefended.yaml"
        message = refused(CliRunner().invoke(app, ["run", str(spec), "--gradient", str(path)]))
        assert r"\x1b[31m\x07\u202e" in message
        assert not set(message) & {"\x1b", "\x07", "\u202e"}


def steering(report: Report) -> Report:
    """The report with what steers a terminal or a page in every text that may hold anything."""
    data = json.loads(render_json(report))
    places: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        part = waiting.pop()
        for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
            if isinstance(value, str):
                places.append((part, key))
            elif isinstance(value, (dict, list)):
                waiting.append(value)
    changed = 0
    for part, key in places:
        before, part[key] = part[key], f"{part[key]}{STEER}"
        try:
            Report.model_validate(data)
            changed += 1
        except ValidationError:
            part[key] = before
    assert changed > 50
    return Report.model_validate(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of an audit of a capture whose file has such a name."""
    path = tmp_path_factory.mktemp("captures") / f"{STEER}.safetensors"
    shutil.copy(SAMPLES / "captures" / "undefended.safetensors", path)
    overrides = {
        "attack.evaluations": 60,
        "attack.steps": 2,
        "evidence.matching_trials": 2,
        "evidence.reconstruction_trials": 1,
        "evidence.control_trials": 1,
        "device": "cpu",
        "capture.gradient": str(path),
    }
    return run_audit(read_spec(SAMPLES / "digits_undefended.yaml", overrides.items()), Counter())


def test_names_reach_the_page_and_the_terminal_escaped(report: Report) -> None:
    assert any(STEER in file.path for file in report.inputs)
    for shown in (report, steering(report)):
        page = render_html(shown)
        assert "<u x>" not in page
        assert "&lt;u x&gt;&amp;" in page
        stream = io.StringIO()
        render_console(shown, Console(file=stream, width=100))
        assert not set(stream.getvalue()) & {"\x1b", "\x07", "\u202e"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5_000])
def test_a_number_that_no_audit_measures_is_refused(
    report: Report, tmp_path: Path, number: str
) -> None:
    path = tmp_path / "report.json"
    text = render_json(report)
    path.write_text(text)
    assert read_report(path) == report
    path.write_text(re.sub(r'"seconds": [0-9.]+', f'"seconds": {number}', text))
    with pytest.raises(InputError, match="not a report of schema version 1"):
        read_report(path)


def test_a_report_with_a_picture_that_is_a_bomb_is_refused(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    bomb = base64.b64encode(png(30_000, 4_000)).decode()
    image = f'"image": "data:image/png;base64,{bomb}"'
    path.write_text(re.sub(r'"image": "data[^"]*"', image, render_json(report), count=1))
    with pytest.raises(InputError, match=r"captured\..*\.image: not a PNG"):
        read_report(path)


@settings(max_examples=50)
@given(words=st.text(max_size=30))
def test_no_message_has_a_character_that_is_not_shown(words: str) -> None:
    said = REFUSED(reason=words)
    for error in (AuditError(said), InputError(words, said), SpecError((words,), said)):
        assert all(c.isprintable() or c == "\n" for c in str(error))


def test_the_name_of_a_file_cannot_add_a_line() -> None:
    error = InputError("x\nggl-audit: A", REFUSED(reason="no such file"))
    assert str(error) == r"x\nggl-audit: A: no such file."


# Pictures


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _gif(folder: Path) -> bytes:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(folder / "animation.png", save_all=True, append_images=frames[1:])
    return (folder / "animation.png").read_bytes()


def _as(kind: str, mode: str) -> Callable[[Path], bytes]:
    def made(_: Path) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (8, 8)).save(buffer, format=kind)
        return buffer.getvalue()

    return made


PICTURES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a bomb": (lambda _: png(60_000, 60_000), "Image size (3600000000 pixels) exceeds limit"),
    "a bomb below Pillow's own limit": (lambda _: png(9_000, 9_000), "expected at most 2048"),
    "a long one": (lambda _: png(1, 2**20), "expected at most 2048"),
    "cut off": (lambda _: png(8, 8, data=bytes(20)), "not a readable picture"),
    "16 bits, grey": (lambda _: png(8, 8, 16, 0, bytes(8 * 17)), "16 bits a channel"),
    "16 bits, grey and alpha": (lambda _: png(8, 8, 16, 4, bytes(8 * 33)), "16 bits a channel"),
    "16 bits, colour": (lambda _: png(8, 8, 16, 2, bytes(8 * 49)), "16 bits a channel"),
    "16 bits, colour and alpha": (lambda _: png(8, 8, 16, 6, bytes(8 * 65)), "16 bits a channel"),
    "an animation": (_gif, "several pictures in one file"),
    "for print": (_as("JPEG", "CMYK"), "mode CMYK"),
    "another format": (_as("TIFF", "L"), "expected PNG or JPEG or BMP"),
    "a program for Ghostscript": (
        lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "expected PNG or JPEG or BMP",
    ),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_that_is_not_plain_is_refused(tmp_path: Path, case: str) -> None:
    make, words = PICTURES[case]
    path = tmp_path / "x.png"
    path.write_bytes(make(tmp_path))
    with pytest.raises(InputError) as error:
        read_image(path, (1, 8, 8))
    assert words in str(error.value)


def test_a_link_out_of_a_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    def read() -> object:
        spec = ImageSetSpec.model_validate({"folder": "set"})
        return read_image_set(spec, tmp_path, ("data",), "reference")

    (tmp_path / "set" / "0").mkdir(parents=True)
    (tmp_path / "other" / "1").mkdir(parents=True)
    for path in ("set/0/a.png", "other/secret.png", "other/1/b.png"):
        Image.new("L", (8, 8)).save(tmp_path / path)
    (tmp_path / "set" / "0" / "within.png").symlink_to(tmp_path / "set" / "0" / "a.png")
    read()
    link = tmp_path / "set" / "0" / "without.png"
    link.symlink_to(tmp_path / "other" / "secret.png")
    with pytest.raises(InputError, match="leaves the folder"):
        read()
    link.unlink()
    (tmp_path / "set" / "1").symlink_to(tmp_path / "other" / "1")
    with pytest.raises(InputError, match="leaves the folder"):
        read()


# YAML


def laughs(levels: int) -> str:
    lists = [f"&a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return f"[&a0 [x, x], {', '.join(lists)}]"


def merges(levels: int) -> str:
    parts = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    return f"{{a0: &a0 {{x: 1}}, {', '.join(parts)}}}"


def chain(levels: int) -> str:
    return "[&a0 [x]" + "".join(f", &a{i} [*a{i - 1}]" for i in range(1, levels)) + "]"


LONG = 99_000
YAML = {
    "a billion laughs": laughs(40),
    "merges that multiply": merges(20),
    "a chain of aliases": chain(3_000),
    "a list that holds itself": "&x [*x]",
    "brackets": "[" * LONG,
    "braces": "{a: " * (LONG // 4),
    "dashes": "- " * (LONG // 2),
    "closed brackets": "[" * 400 + "]" * 400,
    "many values": "[" + "1," * (LONG // 2) + "]",
    "many keys": "{" + ", ".join(f"k{i}: 1" for i in range(9_000)) + "}",
    "questions": "{" + "? a," * (LONG // 4),
    "a number of many digits": "9" * LONG,
    "the same in hexadecimal": "0x" + "F" * LONG,
    "the same in sixties": "1" + ":59" * (LONG // 3),
    "a list as a key": "{[1]: 2}",
    "a mapping as a key": "{? {a: 1} : 2}",
    "a date": "2020-01-01",
    "a date that is none": "2020-99-99",
    "bytes": "!!binary aaaa",
    "a set": "!!set {a, b}",
    "an ordered mapping": "!!omap [a: 1]",
    "code": "!!python/object/apply:os.system ['true']",
    "a tag that does not fit": "!!bool maybe",
    "a number that is none": "!!int ''",
    "an escape of no character": '"\\UFFFFFFFF"',
    "a key twice": "{a: 1, a: 2}",
    "a long key": "{" + "a" * 500 + ": 1}",
    "a tab": "{\n\t- a\n}",
    "a NUL": "\0",
    "an escape": "\x1b[31m",
    "half of a character": "\ud800",
    "two documents": "1\n--- \n2",
    "an alias of nothing": "*x",
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_is_a_trap_is_one_message_within_a_second(tmp_path: Path, case: str) -> None:
    start = time.process_time()
    with pytest.raises(NotYamlError) as error:
        parse_yaml(f"a: 1\nb: {YAML[case]}\n")
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 300


def test_yaml_has_what_json_has(tmp_path: Path) -> None:
    text = "a: &x {b: [1, 2.5, yes, null, 'x']}\nc: *x\nd: {<<: *x, e: ''}\n"
    inside = {"b": [1, 2.5, True, None, "x"]}
    assert parse_yaml(text).data == {"a": inside, "c": inside, "d": {**inside, "e": ""}}
    assert parse_yaml("\ufeffa: 1").data == {"a": 1}
    assert parse_yaml("").data is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda parts: (
        st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=9), parts, max_size=4)
    ),
    max_leaves=20,
)


@given(JSON)
def test_yaml_of_any_value_gives_the_value(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)).data == value


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (parse_yaml, parse_override, parse_defense):
        try:
            read(text)
        except AuditError:
            continue


SPEC = """\
version: 1
model:
  factory: models.py:net
  kwargs: {a: VALUE}
  input: {shape: [1, 8, 8]}
capture: {gradient: g.safetensors}
prior: {bundled: digits}
evidence: {reference: {bundled: digits}}
"""


@pytest.mark.parametrize("value", [".nan", "[1, .inf]", "{b: -.inf}"])
def test_a_number_that_no_report_can_repeat_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(SPEC.replace("VALUE", value))
    with pytest.raises(SpecError, match=r"audit\.yaml:4: model\.kwargs\.a.*finite number"):
        read_spec(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfev\x00", "not a text in UTF-8"),
        (b"a" * 200_000, "larger than 100,000 bytes"),
        (b"a: \x00", r"audit\.yaml:1: not valid YAML: the character '\\x00'"),
        (b"{}\n\n\x1b", r"audit\.yaml:3: not valid YAML: the character '\\x1b'"),
        (b"1: 2\n" + SPEC.replace("VALUE", "1").encode(), "keys should be strings"),
    ],
)
def test_a_spec_of_bytes_is_one_message(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "audit.yaml"
    path.write_bytes(content)
    with pytest.raises(AuditError, match=words):
        read_spec(path)


@pytest.mark.parametrize("path", ["a\\0b", "a" * 5_000, "\\ud800"])
def test_a_path_that_cannot_be_one_is_named(tmp_path: Path, path: str) -> None:
    spec = tmp_path / "audit.yaml"
    spec.write_text(SPEC.replace("VALUE", "1").replace("g.safetensors", f'"{path}"'))
    with pytest.raises(SpecError):
        read_spec(spec)


def test_a_card_is_read_as_carefully(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text("data: " + laughs(40))
    with pytest.raises(InputError, match="keys and values"):
        read_card(tmp_path)
    (tmp_path / "card.yaml").write_text("data: 1\ndata: 2")
    with pytest.raises(InputError, match="stands here twice"):
        read_card(tmp_path)
