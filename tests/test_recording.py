"""What a client's own code writes is what it has, and nothing that no audit could use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ggl_audit
from ggl_audit.errors import AuditError
from ggl_audit.inputs.tensors import is_ordered, read_tensors


def trained() -> nn.Module:
    """A small model after a backward pass, with running statistics and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model(torch.randn(5, 4)).square().sum().backward()
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "capture.safetensors"


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_the_package_is_cheap_to_import() -> None:
    """A client pays for nothing before it captures."""
    program = (
        "import sys, ggl_audit\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "from ggl_audit import capture, capture_update\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(ggl_audit, 'captures')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_gradient_of_a_module(path: Path) -> None:
    model = trained()
    assert ggl_audit.capture(model, path) == path
    names = ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert_holds(path, {name: model.get_parameter(name).grad for name in names})


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_a_wrapped_module_keeps_its_names(wrap: Callable[..., nn.Module], path: Path) -> None:
    model = trained()
    wrapped = wrap(model)
    ggl_audit.capture(wrapped, str(path))
    own = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert_holds(path, own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype, path: Path) -> None:
    gradient = {"weight": torch.randn(3, 2).to(dtype)}
    ggl_audit.capture(gradient, path)
    assert_holds(path, gradient)


def test_a_list_is_read_in_its_order(path: Path) -> None:
    """Beyond ten, names are not in the order of their numbers."""
    gradient = [torch.full((2,), float(place + 1)) for place in range(12)]
    ggl_audit.capture([t.numpy() if i % 2 else t for i, t in enumerate(gradient)], path)
    found = read_tensors(path)
    assert is_ordered(found)
    assert [float(tensor[0]) for tensor in found.values()] == [float(t[0]) for t in gradient]


def test_tensors_may_share_their_memory(path: Path) -> None:
    """As the gradients of DistributedDataParallel do, and those of tied weights."""
    bucket = torch.arange(1.0, 7.0)
    gradient = {"0": bucket[:4].view(2, 2).t(), "1": bucket[3:], "2": bucket[3:]}
    ggl_audit.capture(gradient, path)
    assert_holds(path, {"0": torch.tensor([[1.0, 3], [2, 4]]), "1": bucket[3:], "2": bucket[3:]})


FINE = torch.ones(2)


@pytest.mark.parametrize(
    ("gradient", "said"),
    [
        ({"a": FINE, "b": None}, "'b' has no gradient"),
        ([FINE, None], "'1' has no gradient"),
        (nn.Linear(2, 2), "'weight' has no gradient"),
        (nn.Linear(2, 2).requires_grad_(False), "no tensor"),
        ({}, "no tensor"),
        ([], "no tensor"),
        ({"a": FINE, "b": torch.tensor([1.0, float("nan")])}, "'b' holds 1 values that are NaN"),
        ({"a": np.array([np.inf, 1])}, "'a' holds 1 values that are NaN or infinite"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "every value of the gradient is zero"),
        ({"a": FINE.to_sparse()}, "'a' is sparse"),
        ({"a": torch.ones(2, device="meta")}, "without values"),
        ({"a": FINE.to(torch.complex64)}, "'a' is complex64"),
        ({"a": FINE.long()}, "'a' is int64"),
        ({"a": np.array(["x"])}, "'a' is no array of numbers"),
        ({"a": [[1.0], [1.0, 2.0]]}, "'a' is no array of numbers"),
        (FINE, "got a Tensor"),
        (np.ones(2), "got a ndarray"),
        ("gradient", "got a str"),
        (None, "got a NoneType"),
    ],
)
def test_what_no_audit_could_use_is_refused(gradient: Any, said: str, path: Path) -> None:
    path.write_text("what was there")
    with pytest.raises(AuditError, match=said):
        ggl_audit.capture(gradient, path)
    assert [file.read_text() for file in path.parent.iterdir()] == ["what was there"]


@pytest.mark.parametrize("name", ["capture.pt", "missing/capture.safetensors"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=name):
        ggl_audit.capture({"a": FINE}, tmp_path / name)


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layer = nn.BatchNorm1d(3)
    state = {name: tensor + torch.rand(()) for name, tensor in layer.state_dict().items()}
    return {**state, "num_batches_tracked": torch.tensor(seed)}


def as_module(state: dict[str, torch.Tensor]) -> nn.Module:
    layer = nn.BatchNorm1d(3)
    layer.load_state_dict(state)
    return layer


def as_arrays(state: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in state.values()]


@pytest.mark.parametrize(
    ("form_before", "form_after", "named"),
    [
        (dict, dict, True),
        (as_module, as_module, True),
        (dict, as_module, True),
        (as_arrays, as_arrays, False),
        (as_arrays, lambda state: list(state.values()), False),
    ],
)
def test_an_update_is_before_minus_after(
    form_before: Callable[..., Any], form_after: Callable[..., Any], named: bool, path: Path
) -> None:
    before, after = weights(1), weights(2)
    assert ggl_audit.capture_update(form_before(before), form_after(after), path) == path
    expected = {name: before[name] - after[name] for name in before}
    expected["num_batches_tracked"] = torch.tensor(2)
    if not named:
        expected = {str(place): tensor for place, tensor in enumerate(expected.values())}
    assert_holds(path, expected)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": FINE}, {"a": FINE}, "the same before and after training"),
        ({"a": FINE, "n": torch.tensor(1)}, {"a": FINE, "n": torch.tensor(2)}, "the same before"),
        ({"a": FINE, "b": FINE}, {"a": 2 * FINE}, "'b' is only in the weights before training"),
        ({"a": FINE}, {"a": 2 * FINE, "c": FINE}, "'c' is only in the weights after training"),
        ([FINE], {"a": 2 * FINE}, "two state dicts, or two lists"),
        ([FINE, FINE], [2 * FINE], "'1' is only in the weights before"),
        ({"a": FINE}, {"a": torch.ones(1)}, r"shape \(2,\) before training and \(1,\) after"),
        ({"a": FINE}, {"a": FINE * float("inf")}, "'a' holds 2 values"),
    ],
)
def test_weights_that_are_no_pair_are_refused(
    before: Any, after: Any, said: str, path: Path
) -> None:
    with pytest.raises(AuditError, match=said):
        ggl_audit.capture_update(before, after, path)
    assert not path.exists()
