"""LPIPS with the weights in PyTorch's cache, or fetched where that is allowed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision.models import alexnet

from ggl_audit.audit import run_audit
from ggl_audit.basics.files import sha256
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import SpecError
from ggl_audit.inputs.hub_cache import BACKBONES, find_backbone
from ggl_audit.messages import Said
from ggl_audit.spec import Spec
from tests.conftest import Counter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of checkpoints, and nothing that could be fetched."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of random weights."""
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.manual_seed(0)
    features = alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    return path


def put(weights: Path, folder: Path, stem: str = "alexnet-owt-{}") -> Path:
    return Path(shutil.copy(weights, folder / f"{stem.format(sha256([weights])[:8])}.pth"))


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("alex", "alexnet-owt-7be5be79.pth"),
        ("squeeze", "squeezenet1_1-b8a52dc0.pth"),
        ("vgg", "vgg16-397923af.pth"),
    ],
)
def test_what_lacks_is_named_with_the_command_that_helps(cache: Path, net: str, name: str) -> None:
    assert net in BACKBONES
    found = find_backbone(net, download=False)
    expected = f"{name} is not in PyTorch's cache: --set evidence.lpips.download=true fetches it"
    assert str(found) == expected
    shutil.rmtree(cache)
    assert str(find_backbone(net, download=False)) == expected


def test_a_file_counts_if_it_is_what_its_name_says(cache: Path, weights: Path) -> None:
    for stem in ("alexnet-owt-7be5be79", "alexnet-owt-", "alexnet-owt-7"):
        put(weights, cache, stem)
    found = find_backbone("alex", download=False)
    assert isinstance(found, Said)
    assert "is not the file that its name says" in found.text
    good = put(weights, cache)
    put(weights, cache, "vgg16-{}")
    assert find_backbone("alex", download=False) == good
    assert find_backbone("alex", download=True) == good  # and nothing is fetched


def test_it_is_fetched_only_where_that_is_allowed(
    cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(url: str, path: str, own_hash: str, **_: Any) -> None:
        asked.append((url, own_hash))
        shutil.copy(weights, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    assert isinstance(find_backbone("alex", download=False), Said)
    assert asked == []
    assert find_backbone("alex", download=True) == cache / "alexnet-owt-7be5be79.pth"
    assert asked == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")]


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("invalid hash value")]
)
def test_what_cannot_be_fetched_is_one_message(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(SpecError, match=r"cannot be fetched \(.*(no route|invalid hash)") as raised:
        find_backbone("alex", download=True)
    assert raised.value.key == ("evidence", "lpips", "download")


FEW = {
    "evidence__matching_trials": 2,
    "evidence__reconstruction_trials": 0,
    "attack__method": "ggl",
}


def test_the_cache_is_used_without_being_asked_for(
    cache: Path, weights: Path, sample: Callable[..., Spec]
) -> None:
    name = put(weights, cache).name
    report = run_audit(sample("undefended", **FEW), Counter())
    metrics = report.captured.reconstructions[0].metrics
    assert metrics is not None
    assert metrics.lpips is not None
    assert [one.sha256 for one in report.inputs if one.path == name] == [sha256([weights])]


def test_without_it_the_figure_is_null_with_the_command(
    cache: Path, sample: Callable[..., Spec]
) -> None:
    report = run_audit(sample("undefended", **FEW), Counter())
    metrics = report.captured.reconstructions[0].metrics
    assert metrics is not None
    assert metrics.lpips is None
    assert metrics.not_measured["lpips"].endswith("--set evidence.lpips.download=true fetches it")


def test_canaries_are_compared_by_it_only_where_it_is_declared(
    cache: Path, weights: Path, sample: Callable[..., Spec]
) -> None:
    put(weights, cache)
    assert "lpips" not in prepare(sample("undefended")).distances
    assert "lpips" in prepare(sample("undefended", evidence__lpips={})).distances
    by_lpips = sample("undefended", evidence__distance="lpips", evidence__truth=None)
    assert "lpips" in prepare(by_lpips).distances


def test_a_declared_distance_needs_it(cache: Path, sample: Callable[..., Spec]) -> None:
    with pytest.raises(
        SpecError, match=r"lpips, but alexnet-owt-7be5be79\.pth is not in"
    ) as raised:
        prepare(sample("undefended", evidence__distance="lpips"))
    assert raised.value.key == ("evidence", "distance")
    with pytest.raises(SpecError, match="cannot be fetched"):
        prepare(sample("undefended", evidence__lpips__download=True))


def test_given_weights_are_not_downloaded(sample: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match="nothing to download"):
        sample("undefended", evidence__lpips={"weights": "a.pth", "download": True})
