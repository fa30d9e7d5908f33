from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ggl_audit.errors import InputError
from ggl_audit.inputs.tensors import READERS, read_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}


def test_the_three_formats_give_the_same(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", **{k: t.numpy() for k, t in tensors.items()})
    for suffix in (".safetensors", ".pt", ".npz"):
        read = read_tensors(tmp_path / f"x{suffix}")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    marker = tmp_path / "was_here"
    if suffix == ".pt":
        torch.save({"a": Exploit(marker)}, path)
        words = "could run code"
    else:
        np.savez(path, a=np.array([Exploit(marker)], dtype=object))
        words = "hold more than tensors"
    with pytest.raises(InputError, match=words):
        read_tensors(path)
    assert not marker.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    marker = tmp_path / "was_here"
    path.write_bytes(pickle.dumps({"a": Exploit(marker)}))
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


def test_a_list_says_that_names_are_needed(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.pt")
    with pytest.raises(InputError, match="a list of 1"):
        read_tensors(tmp_path / "x.pt")


def test_unknown_endings_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(InputError, match="unknown format"):
        read_tensors(tmp_path / "x.csv")
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "y.pt")
    with pytest.raises(InputError, match="not a file"):
        read_tensors(tmp_path)


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_bytes_never_escape_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    suffix = data.draw(st.sampled_from(sorted(READERS)))
    whole = folder / f"w{suffix}"
    values = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    if suffix == ".safetensors":
        save_file(values, whole)
    elif suffix == ".npz":
        np.savez(whole, **{k: t.numpy() for k, t in values.items()})
    else:
        torch.save(values, whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"x{suffix}"
    path.write_bytes(bytes(content))
    try:
        read = read_tensors(path)
    except InputError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


def test_tensors_without_dense_values_are_refused(tmp_path: Path) -> None:
    for name, tensor in (
        ("sparse", torch.eye(3).to_sparse()),
        ("meta", torch.empty(2, device="meta")),
    ):
        torch.save({"a": tensor}, tmp_path / f"{name}.pt")
        with pytest.raises(InputError):
            read_tensors(tmp_path / f"{name}.pt")
