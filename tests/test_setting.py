from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ggl_audit.case.setting import prepare
from ggl_audit.errors import SpecError
from ggl_audit.spec import Spec


def test_a_distance_that_the_model_does_not_have_is_refused(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10), nn.ReLU())\n"
    )
    model = {"factory": f"{tmp_path / 'net.py'}:net", "input": {"shape": [1, 16, 16]}}

    torch.manual_seed(0)
    save_file(
        {"1.weight": torch.randn(10, 256), "1.bias": torch.randn(10)}, tmp_path / "g.safetensors"
    )
    keys = {
        "model": model,
        "capture__gradient": str(tmp_path / "g.safetensors"),
        "capture__labels": [3],
        "evidence__truth": None,
    }
    assert prepare(sample("undefended", **keys)).distance == "pixels"
    with pytest.raises(SpecError, match="does not end in a trained linear layer"):
        prepare(sample("undefended", **keys, evidence__distance="representation"))
