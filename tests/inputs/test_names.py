from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ggl_audit.errors import AuditError
from ggl_audit.inputs.names import unwrap_names

MODEL = ["0.weight", "0.bias", "bn.running_mean"]
WRAPPERS = st.lists(
    st.sampled_from(["module.", "_module.", "_orig_mod.", "model.", "net."]), max_size=4
)


def test_the_wrappers_of_real_tools_are_taken_off() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    wrapped = {
        "DataParallel": nn.DataParallel(plain),
        "compile": torch.compile(plain),
        "both": torch.compile(nn.DataParallel(plain)),
    }
    for module in wrapped.values():
        found = list(module.state_dict())
        assert found[0] != "0.weight"
        wanted = list(plain.state_dict())
        assert unwrap_names(found, wanted) == dict(zip(found, wanted, strict=True))


@given(WRAPPERS, st.integers(0, 4), st.booleans())
def test_a_wrapper_on_either_side_is_understood(
    words: list[str], inner: int, file_is_longer: bool
) -> None:
    long, short = ["".join(part) + "{}" for part in (words, words[len(words) - inner :])]
    wanted = [(short if file_is_longer else long).format(name) for name in MODEL]
    found = [(long if file_is_longer else short).format(name) for name in MODEL]
    assert unwrap_names(found, wanted) == dict(zip(found, wanted, strict=True))


def test_what_else_a_file_holds_is_left_out() -> None:
    found = [*("model." + name for name in MODEL), "loss_fn.weight", "epoch"]
    assert set(unwrap_names(found, MODEL)) == {"model." + name for name in MODEL}


def test_a_missing_name_is_no_match() -> None:
    assert list(unwrap_names(MODEL[:2], MODEL)) == MODEL[:2]
    assert unwrap_names([], MODEL) == {}
    assert unwrap_names(["x.0.weight"], MODEL) == {}


def test_two_models_in_one_file_are_refused() -> None:
    found = [wrapper + name for wrapper in ("module.", "net.") for name in MODEL]
    with pytest.raises(AuditError, match=r"'module.0.weight' and 'net.0.weight'"):
        unwrap_names(found, MODEL)
