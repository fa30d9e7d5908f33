from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ggl_audit.errors import InputError
from ggl_audit.inputs.capture import read_capture, write_capture
from ggl_audit.inputs.model import ClientModel
from tests.conftest import plain_gradient


@pytest.fixture
def good(model: ClientModel) -> dict[str, torch.Tensor]:
    return plain_gradient(model, torch.rand(1, 16, 16), 4)


def test_a_capture_comes_back_in_the_order_of_the_model(
    model: ClientModel, good: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "g.safetensors"
    write_capture(path, dict(reversed(good.items())))
    read = read_capture(path, model)
    assert list(read) == list(model.parameters)
    assert all(torch.equal(read[name], good[name]) for name in good)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.pop("0.bias"), [r"has no '0.bias' \(16,\)", "7 tensors captured"]),
        (lambda g: g.update(x=torch.ones(9)), ["holds 'x'", "another model"]),
        (
            lambda g: g.update({"module.0.bias": g.pop("0.bias")}),
            ["holds 'module.0.bias'", "'0.bias' has that shape"],
        ),
        (
            lambda g: g.update({"0.bias": torch.ones(32)}),
            [r"'0.bias' has the shape \(32,\)", "'2.bias' or '5.bias' has that shape"],
        ),
        (lambda g: g.update({"0.bias": torch.ones(16, dtype=torch.int8)}), ["'0.bias' is int8"]),
        (lambda g: g["2.bias"].__setitem__(3, torch.nan), ["'2.bias' holds 1 values", "NaN"]),
        (lambda g: g["2.bias"].__setitem__(3, torch.inf), ["infinite"]),
        (lambda g: [t.zero_() for t in g.values()], ["every value is zero"]),
    ],
)
def test_a_capture_that_does_not_fit_is_named(
    model: ClientModel,
    good: dict[str, torch.Tensor],
    tmp_path: Path,
    change: object,
    words: list[str],
) -> None:
    change(good)
    path = tmp_path / "g.safetensors"
    save_file(good, path)
    for word in words:
        with pytest.raises(InputError, match=word):
            read_capture(path, model)


def test_a_capture_is_written_whole_or_not_at_all(
    good: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"is written as \.safetensors"):
        write_capture(tmp_path / "g.pt", good)
    with pytest.raises(InputError, match="there is no folder"):
        write_capture(tmp_path / "none" / "g.safetensors", good)
    assert list(tmp_path.iterdir()) == []
