from __future__ import annotations

import collections
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import nn

from ggl_audit.errors import InputError
from ggl_audit.inputs.tensors import (
    READERS,
    is_ordered,
    npz_names,
    read_file,
    read_npz,
    read_tensors,
)

TORCH = [".pt", ".pth", ".th", ".ckpt", ".bin"]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}


def equal(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(read) == list(expected) and all(
        torch.equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype
        for name in expected
    )


def saved(folder: Path, content: object, *, archive: bool = True) -> Path:
    path = folder / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", *TORCH, ".PT"])
def test_all_formats_give_the_same(
    tmp_path: Path, tensors: dict[str, torch.Tensor], suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)
    read = read_tensors(path)
    assert equal(read, tensors)
    assert not is_ordered(read)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.head = nn.Linear(2, 3)
        self.tied = self.head
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).t())


CONTENTS: dict[str, Any] = {
    "a state dict": lambda: Net().state_dict(),
    "parameters": lambda: dict(Net().named_parameters()),
    "buffers": lambda: {"a": nn.Buffer(torch.ones(2))},
    "views of one storage": lambda: dict(enumerate(torch.arange(12.0).reshape(3, 4).unbind(1))),
    "other types": lambda: {
        str(dtype): torch.arange(3).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)
    },
    "unsigned types": lambda: {"a": torch.arange(4).to(torch.uint16)},
    "no numbers": lambda: {"a": torch.empty(0, 3), "b": torch.tensor(2.0)},
    "an attribute": lambda: {"a": _with_attribute(torch.ones(2))},
    "an attribute of a parameter": lambda: {"a": _with_attribute(nn.Parameter(torch.ones(2)))},
}


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.origin = "elsewhere"
    return tensor


@pytest.mark.parametrize(
    ("content", "archive"),
    [(content, True) for content in CONTENTS]
    # PyTorch cannot read unsigned types in its older format itself.
    + [(content, False) for content in CONTENTS if content != "unsigned types"],
)
def test_pytorch_itself_reads_the_same(tmp_path: Path, content: str, archive: bool) -> None:
    path = saved(tmp_path, CONTENTS[content](), archive=archive)
    expected = torch.load(path, weights_only=True)
    assert equal(read_tensors(path), {str(name): tensor for name, tensor in expected.items()})


def test_pytorch_reads_the_same_of_public_checkpoints(shared: Path) -> None:
    checked = 0
    for path in sorted(shared.rglob("*")):
        if path.suffix in READERS and path.suffix in TORCH:
            expected = torch.load(path, weights_only=True, map_location="cpu")
            expected = expected.get("state_dict", expected)
            assert equal(read_tensors(path), dict(expected)), path
            checked += 1
    assert checked >= 5


SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
TYPES = st.sampled_from(["<f2", "<f4", ">f4", "<f8", "|i1", "<i8", "|u1", "|b1", ">i2"])
ARRAYS = st.lists(TYPES.flatmap(lambda kind: arrays.arrays(kind, SHAPES)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(held=ARRAYS, column_major=st.booleans(), suffix=st.sampled_from([".npz", ".pt", "legacy"]))
def test_any_list_of_arrays_comes_back_in_its_order(
    tmp_path_factory: pytest.TempPathFactory,
    held: list[np.ndarray],
    column_major: bool,
    suffix: str,
) -> None:
    path = tmp_path_factory.mktemp("x") / f"x{suffix if suffix == '.npz' else '.pt'}"
    if column_major:
        held = [np.asfortranarray(array) for array in held]
    if suffix == ".npz":
        np.savez(path, *held)
    else:
        torch.save(held, path, _use_new_zipfile_serialization=suffix == ".pt")
    read = read_tensors(path)
    assert is_ordered(read)
    for found, array in zip(read.values(), held, strict=True):
        np.testing.assert_array_equal(found.numpy(), array)
        assert found.numpy().dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    "write",
    [
        lambda path, parts: torch.save(parts, path.with_suffix(".pt")),
        lambda path, parts: torch.save(tuple(parts), path.with_suffix(".pt")),
        lambda path, parts: np.savez(path.with_suffix(".npz"), *[p.numpy() for p in parts]),
        lambda path, parts: np.savez(
            path.with_suffix(".npz"),
            **{str(i): p.numpy() for i, p in reversed([*enumerate(parts)])},
        ),
        lambda path, parts: save_file(
            {str(i): part for i, part in enumerate(parts)}, path.with_suffix(".safetensors")
        ),
    ],
)
def test_a_list_is_in_numeric_order(tmp_path: Path, write: Any) -> None:
    parts = [torch.full((2,), float(place)) for place in range(12)]
    write(tmp_path / "x", parts)
    (path,) = tmp_path.iterdir()
    read = read_tensors(path)
    assert is_ordered(read)
    assert equal(read, {str(place): part for place, part in enumerate(parts)})


def test_names_are_no_list(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.ones(1), arr_2=np.ones(1))
    read = read_tensors(tmp_path / "x.npz")
    assert list(read) == ["arr_0", "arr_2"]
    assert not is_ordered(read)


def test_one_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3.0))
    read = read_tensors(tmp_path / "x.npy")
    assert equal(read, {"0": torch.arange(3, dtype=torch.float64)})
    assert equal(read_tensors(saved(tmp_path, torch.ones(2))), {"0": torch.ones(2)})


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but there are files of it
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


A, B = {"w": torch.ones(2)}, {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    "around",
    [
        lambda inside: {"state_dict": inside},
        lambda inside: {"model_state_dict": inside, "epoch": 3, "loss": 0.1},
        lambda inside: {"model": inside, "optimizer": {"state": {0: B}, "param_groups": []}},
        lambda inside: {"state_dict": inside, "ema_state_dict": B},
        lambda inside: {"state_dict": {"model": inside}, "note": "x"},
        lambda inside: {"whatever": inside, "best": 3},
        lambda inside: {"model": inside, "step": torch.tensor(7)},
        # PyTorch Lightning
        lambda inside: {
            "epoch": 1,
            "global_step": 100,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": inside,
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_k_models": {}}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": B["w"]}}}],
            "lr_schedulers": [{"milestones": collections.Counter([3, 5])}],
            "hparams": {"sizes": {1, 2}, "rate": np.float64(0.1)},
        },
    ],
)
def test_what_usual_tools_put_around_tensors(tmp_path: Path, around: Any) -> None:
    assert equal(read_tensors(saved(tmp_path, around(A))), A)


def test_breaching_and_its_kind(tmp_path: Path) -> None:
    gradients = [torch.ones(2), torch.zeros(3)]
    listed = {"0": gradients[0], "1": gradients[1]}
    user = {
        "gradients": gradients,
        "buffers": None,
        "metadata": {"labels": torch.tensor([1]), "n": 1},
    }
    with_buffers = {**user, "buffers": [torch.ones(1)]}
    payload = {"parameters": gradients, "buffers": [torch.ones(1)], "metadata": {"n": 1}}
    for content in ([user], (with_buffers,), user, payload):
        assert equal(read_tensors(saved(tmp_path, content)), listed)
    pairs = [("a", gradients[0]), ("b", gradients[1])]
    assert list(read_tensors(saved(tmp_path, pairs))) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"gradients": [A["w"]]}, {"gradients": [B["w"]]}], "a list of 2 collections"),
        ([[A["w"]], [B["w"]]], "a list of 2 collections"),
        ({"model_state_dict": A, "ema_state_dict": B}, "'model_state_dict', 'ema_state_dict'"),
        ({"gradients": [A["w"]], "parameters": [B["w"]]}, "'gradients', 'parameters'"),
        ({"w": A["w"], "extra": B}, "the tensor 'w' beside 'extra'"),
        ({"a": A["w"], "b": None}, "'b' is None: this gradient was never computed"),
        ([A["w"], None], "'1' is None"),
        ({"a": A["w"], "b": "text"}, "a dict whose 'b' is a str"),
        ({"a": "text"}, "a dict whose 'a' is a str"),
        ([A["w"], 3], "a list of 2, in which there is a int"),
        ({}, "no tensors"),
        (3, "a int"),
        ({0: A["w"], "0": B["w"]}, "stands there twice"),
        ({1.5: A["w"]}, "1.5 is no name"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is a sparse tensor"),
        ({"a": torch.empty(2, device="meta")}, "'a' is a tensor of the meta device"),
        ({"a": _quantized()}, "'a' is a quantized tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is complex64"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "'a' is a tensor that is conjug"),
        ({"a": torch.ones(1).expand(3)}, "'a' is a tensor that repeats its values"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "'a' is float8_e4m3fn"),
        ([np.array(["a"])], "'0' is an array of something else"),
        ([np.array([None])], "'0' is an array of something else"),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_what_is_no_collection_of_tensors_is_named(
    tmp_path: Path, content: object, words: str, archive: bool
) -> None:
    with pytest.raises(InputError) as error:
        read_tensors(saved(tmp_path, content, archive=archive))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([None]), "'a' is an array of |O"),
        (np.array(["x"]), "'a' is an array of <U1"),
        (np.ones(2, complex), "'a' is complex128"),
        (np.ones(2, "f4,f4"), "'a' is an array of"),
        (np.ones(2, np.longdouble), "not a whole .npz file"),
    ],
)
def test_arrays_of_no_real_numbers_are_named(tmp_path: Path, array: Any, words: str) -> None:
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path / "x.npz")
    assert words in str(error.value)


def test_some_arrays_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.ones(3), names=np.array(["one"]), labels=np.zeros(3))
    assert npz_names(path) == ["images", "names", "labels"]
    assert list(read_npz(path, ["labels", "images"])) == ["images", "labels"]
    with pytest.raises(InputError, match="'names' is an array"):
        read_npz(path, ["names"])


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".npy"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    marker = tmp_path / "was_here"
    if suffix == ".pt":
        torch.save({"a": Exploit(marker)}, path)
        words = "could run code"
    else:
        save = np.savez if suffix == ".npz" else np.save
        save(path, np.array([Exploit(marker)], dtype=object))
        words = "not of numbers"
    with pytest.raises(InputError, match=words):
        read_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    marker = tmp_path / "was_here"
    path.write_bytes(pickle.dumps({"a": Exploit(marker)}, protocol=protocol))
    with pytest.raises(InputError):
        read_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_a_truncated_file_is_one_message(
    tmp_path: Path, tensors: dict[str, torch.Tensor], suffix: str
) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, whole)
    elif suffix == ".pt":
        torch.save(tensors, whole)
    else:
        np.savez(whole, **{k: t.numpy() for k, t in tensors.items()})
    content = whole.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"x\."):
            read_tensors(path)


def test_a_file_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="holds no tensors"):
            read_tensors(path)


def test_unknown_endings_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(InputError, match="unknown format"):
        read_tensors(tmp_path / "x.csv")
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "y.pt")
    with pytest.raises(InputError, match="not a file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x/data.pkl", "x/constants.pkl", "x/code/net.py"], "a TorchScript file"),
        (["x/models/model.json"], r"not of tensors that torch\.save wrote"),
    ],
)
def test_programs_are_told_from_tensors(tmp_path: Path, names: list[str], words: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(InputError, match=words):
        read_tensors(tmp_path / "x.pt")


def test_what_a_storage_holds_beyond_its_tensors_is_said(tmp_path: Path) -> None:
    of_samples = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "gradient.pt"
    for legacy in (False, True):
        torch.save(
            {"w": of_samples[1], "b": torch.ones(2)},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        tensors, beside = read_file(path)
        assert tensors["w"].tolist() == [4, 5, 6, 7]
        assert beside == ["w (beyond what is shown of the storage)"]
    # Three views show all of it, in whatever order; a copy holds nothing else; nor do zeros.
    shown = {"w": of_samples.T[:, 1], "v": of_samples[:, ::2], "u": of_samples[:, 1::2]}
    for whole in (shown, {"w": of_samples[1].clone()}, {"w": torch.zeros(3, 4)[1]}):
        torch.save(whole, path)
        assert read_file(path)[1] == []


def test_long_texts_beside_tensors_are_said(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "name": "resnet", "notes": "0f" * 65}, path)
    assert read_file(path)[1] == ["notes"]
    torch.save({"state_dict": {"w": torch.ones(2)}, "notes": ["fine", b"\0" * 129]}, path)
    assert read_file(path)[1] == ["notes.1"]
    path = tmp_path / "gradient.safetensors"
    save_file({"w": torch.ones(2)}, path, {"format": "pt", "total_size": "4000"})
    assert read_file(path)[1] == []
    save_file({"w": torch.ones(2)}, path, {"format": "pt", "a": "0f" * 32, "b": "0f" * 32})
    assert read_file(path)[1] == ["__metadata__"]
