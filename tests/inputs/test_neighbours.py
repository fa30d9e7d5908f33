"""A Python file of the user's own finds the files beside it, and nobody else does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ggl_audit.case.loading import load_client
from ggl_audit.errors import SpecError
from ggl_audit.inputs.factories import build_module, find_callable
from ggl_audit.inputs.neighbours import Neighbours
from ggl_audit.spec import Spec

KEY = ("model", "factory")

MODELS = "from blocks import Block\ndef net(**more):\n    return Block(**more)\n"
BLOCKS = """
from torch import nn
class Block(nn.Linear):
    def __init__(self):
        super().__init__({0}, 10)
"""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    path, modules = sys.path.copy(), dict(sys.modules)
    yield
    assert sys.path == path
    for name, module in modules.items():
        assert sys.modules.get(name) is module, name
    left = [getattr(sys.modules[n], "__file__", None) or "" for n in sys.modules.keys() - modules]
    assert [file for file in left if "pytest" in Path(file).parts[-3:-1] or "spec" in file] == []
    assert not {"models", "blocks", "lazily", "package"} & (sys.modules.keys() - modules)


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def size(folder: Path, factory: str = "models.py:net") -> int:
    module = build_module(factory, {}, folder, "model")
    features = module.in_features
    assert isinstance(features, int)
    return features


def test_two_folders_have_neighbours_of_one_name(tmp_path: Path) -> None:
    one = written(tmp_path / "one", models=MODELS, blocks=BLOCKS.format(3))
    two = written(tmp_path / "two", models=MODELS, blocks=BLOCKS.format(4))
    assert [size(folder) for folder in (one, two, one)] == [3, 4, 3]


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    folder = written(tmp_path, models=MODELS, blocks=BLOCKS.format(3))
    assert size(folder) == 3
    written(folder, blocks=BLOCKS.format(44))
    assert size(folder) == 44
    os.utime(folder / "blocks.py", (1, 1))
    assert size(folder) == 44


def test_packages_and_imports_when_it_is_called(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        models="def net():\n    from lazily import made\n    return made()\n"
        "class Net:\n    def __new__(cls):\n        import package.deep\n"
        "        return package.deep.made()\n"
        "def later():\n    import package.deep\n    return package.deep.made()\n",
        lazily="import package.deep as deep\ndef made():\n    return deep.made()\n",
    )
    package = written(folder / "package", __init__="from . import deep\n")
    written(package, deep="from torch import nn\ndef made():\n    return nn.Linear(5, 2)\n")
    assert [size(folder, f"models.py:{name}") for name in ("net", "Net", "later")] == [5, 5, 5]
    assert find_callable("models.py:later", folder, KEY)().in_features == 5


def test_the_files_share_what_they_import(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        models="from blocks import Block\nimport models\nfrom models import Block as Same\n"
        "def is_one():\n    return Same is Block\n",
        other="from blocks import Block\nimport models\n"
        "def is_one():\n    return models.Block is Block\n",
        blocks=BLOCKS.format(3),
    )
    for name in ("other", "models", "other"):
        assert find_callable(f"{name}.py:is_one", folder, KEY)() is True


def test_a_module_of_the_program_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, models=MODELS, blocks=BLOCKS.format(3))
    foreign = ModuleType("blocks")
    monkeypatch.setitem(sys.modules, "blocks", foreign)
    assert size(folder) == 3
    assert sys.modules["blocks"] is foreign


def test_libraries_do_not_give_way(tmp_path: Path) -> None:
    """Names that Python's own modules, or installed ones, have too."""
    folder = written(
        tmp_path,
        random="from torch import nn\nimport random\n"
        "def net():\n    assert random.random() < 1\n    return nn.Linear(2, 2)\n",
        torch="raise RuntimeError('not this one')\n",
        ggl_audit="raise RuntimeError('nor this one')\n",
        models="import ggl_audit.defenses, torch\ndef net():\n    return torch.nn.Linear(3, 2)\n",
    )
    assert size(folder, "random.py:net") == 2
    assert size(folder) == 3


def test_a_folder_around_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported while the folder is seen, from a place below it, is not put away."""
    written(tmp_path, models="import elsewhere\nfrom torch import nn\nnet = nn.Identity\n")
    below = written(tmp_path / "lib" / "site-packages", elsewhere="")
    monkeypatch.syspath_prepend(str(below))
    build_module("models.py:net", {}, tmp_path, "model")
    assert "elsewhere" in sys.modules
    monkeypatch.delitem(sys.modules, "elsewhere")


def test_what_fails_is_told_and_forgotten(tmp_path: Path) -> None:
    folder = written(tmp_path, models=MODELS, blocks="raise ValueError('no blocks')\n")
    for _ in range(2):
        with pytest.raises(SpecError, match=r"importing models\.py failed with ValueError: no bl"):
            size(folder)
    (folder / "blocks.py").unlink()
    with pytest.raises(SpecError, match="ModuleNotFoundError"):
        size(folder)
    written(folder, blocks=BLOCKS.format(3))
    assert size(folder) == 3


def test_what_is_drawn_while_a_file_is_imported_changes_no_model(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        models="import torch\ntorch.rand(5)\ndef net():\n    return torch.nn.Linear(2, 2)\n",
    )
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        weights.append(build_module("models.py:net", {}, folder, "model").weight)
    assert torch.equal(*weights)  # type: ignore[call-overload]


def test_a_call_within_a_call(tmp_path: Path) -> None:
    neighbours = Neighbours(written(tmp_path, blocks=BLOCKS.format(3)))

    def imported() -> str:
        import blocks  # type: ignore[import-not-found]

        return str(blocks.__name__)

    assert neighbours.runs(lambda: neighbours.runs(imported)())() == "blocks"
    with pytest.raises(ImportError):
        imported()


def test_models_and_losses_of_a_spec(sample: Callable[..., Spec], tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        models="from blocks import Net as net, Out\n",
        losses="from blocks import Out\nfrom torch.nn import functional as F\n"
        "def loss(out, y):\n    import models\n    assert type(out) is Out is models.Out\n"
        "    return F.cross_entropy(out.logits, y)\n",
        blocks="from collections import namedtuple\nfrom torch import nn\n"
        "Out = namedtuple('Out', 'logits aux')\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(256, 10)\n"
        "    def forward(self, x):\n        import blocks\n        h = self.fc(x.flatten(1))\n"
        "        return Out(h, h)\n",
    )
    spec = sample(
        "undefended",
        model__factory=f"{folder / 'models.py'}:net",
        model__loss=f"{folder / 'losses.py'}:loss",
        model__weights=None,
    )
    with pytest.raises(SpecError, match="ModuleNotFoundError: No module named 'blocks'"):
        load_client(spec, torch.device("cpu"))
    (folder / "blocks.py").write_text(
        (folder / "blocks.py").read_text().replace("import blocks", "")
    )
    _, model = load_client(spec, torch.device("cpu"))
    assert model.whole
