from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ggl_audit.case import preparation
from ggl_audit.case.preparation import prepare
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
    assert [*prepare(sample("undefended", **keys)).distances] == ["pixels"]
    with pytest.raises(SpecError, match="does not end in a trained linear layer"):
        prepare(sample("undefended", **keys, evidence__distance="representation"))


def test_several_captures_are_over_one_case_that_is_loaded_once(
    sample: Callable[..., Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    for name in ("load_client", "load_prior", "read_reference"):
        made = getattr(preparation, name)

        def counted(*args: Any, made: Any = made, name: str = name) -> Any:
            loaded.append(name)
            return made(*args)

        monkeypatch.setattr(preparation, name, counted)
    first = prepare(sample("undefended", evidence__truth=None))
    others = []
    for factor in (2, 3):
        others.append(str(tmp_path / f"{factor}.safetensors"))
        save_file(
            {name: factor * tensor for name, tensor in first.audited.observed.items()}, others[-1]
        )
    loaded.clear()
    case = prepare(sample("undefended", evidence__truth=None, capture__others=others))
    assert sorted(loaded) == ["load_client", "load_prior", "read_reference"]
    assert [capture.file for capture in case.captures[1:]] == others
    for factor, capture in enumerate(case.captures, start=1):
        assert capture.inferred
        for name, tensor in first.audited.observed.items():
            assert torch.allclose(capture.observed[name], factor * tensor)
