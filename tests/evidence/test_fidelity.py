from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ggl_audit.errors import InputError
from ggl_audit.evidence.fidelity import candidate_distances, compare, load_lpips, mean_psnr
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel

CPU = torch.device("cpu")


def images() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 16, 16, generator=random)
    return (truth + 0.1 * torch.randn(1, 16, 16, generator=random)).clamp(0, 1), truth


def ssim_by_hand(one: torch.Tensor, other: torch.Tensor) -> float:
    """Wang et al. 2004, equation 13, uniform 7x7 windows, sample covariances."""
    a, b = (
        sliding_window_view(t[0].double().numpy(), (7, 7)).reshape(-1, 49) for t in (one, other)
    )
    c1, c2 = 0.01**2, 0.03**2
    covariance = ((a - a.mean(1, keepdims=True)) * (b - b.mean(1, keepdims=True))).sum(1) / 48
    luminance = (2 * a.mean(1) * b.mean(1) + c1) / (a.mean(1) ** 2 + b.mean(1) ** 2 + c1)
    structure = (2 * covariance + c2) / (a.var(1, ddof=1) + b.var(1, ddof=1) + c2)
    return float(np.mean(luminance * structure))


def test_the_metrics_are_those_calculated_by_hand(model: ClientModel) -> None:
    image, truth = images()
    found = compare(image, truth, model, "none")
    mse = float(((image - truth) ** 2).mean())
    assert found.mse == pytest.approx(mse)
    assert found.psnr_db == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert found.ssim == pytest.approx(ssim_by_hand(image, truth), abs=1e-6)
    with torch.no_grad():
        features = model.module[:-1]((torch.stack([image, truth]) - 0.5) / 0.5)
    expected = float((features[0] - features[1]).square().mean())
    assert found.mse_representation == pytest.approx(expected, rel=1e-4)


def test_what_is_not_measured_is_null_with_a_reason(model: ClientModel) -> None:
    _, truth = images()
    same = compare(truth, truth, model, "no weights")
    assert same.psnr_db is None
    assert same.lpips is None
    assert set(same.not_measured) == {"psnr_db", "lpips"}
    assert same.not_measured["lpips"] == "no weights"


def test_the_mean_psnr_is_the_mean_of_the_psnrs(model: ClientModel) -> None:
    image, truth = images()
    other = (truth + 0.3).clamp(0, 1)
    both = [compare(x, truth, model, "none").psnr_db for x in (image, other)]
    mean = mean_psnr(torch.stack([image, other]), torch.stack([truth, truth]))
    assert mean == pytest.approx(sum(both) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("net", "file", "far", "near"),
    [
        ("squeeze", "squeezenet1_1_features.pth", 0.71105, 0.14790),
        ("alex", "alexnet_features.pth", 0.72188, 0.13757),
    ],
)
def test_lpips_gives_the_published_figures(
    shared: Path, net: Any, file: str, far: float, near: float
) -> None:
    folder = shared / "lpips"
    distance = load_lpips(net, folder / file, CPU)

    def read(name: str) -> torch.Tensor:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)

    pictures = torch.stack([read("ex_p0.png"), read("ex_p1.png")])
    references = torch.stack([read("ex_ref.png")] * 2)
    assert distance(pictures, references).tolist() == pytest.approx([far, near], abs=2e-5)


def test_lpips_takes_small_grey_images(shared: Path) -> None:
    path = shared / "lpips" / "alexnet_features.pth"
    distance = load_lpips("alex", path, CPU)
    image, truth = images()
    assert float(distance(truth[None], truth[None])) == pytest.approx(0, abs=1e-6)
    assert float(distance(image[None], truth[None])) > 0.01


def test_lpips_weights_of_another_network_are_refused(shared: Path, tmp_path: Path) -> None:
    path = shared / "lpips" / "alexnet_features.pth"
    with pytest.raises(InputError, match=r"not torchvision's squeeze backbone"):
        load_lpips("squeeze", path, CPU)
    missing = tmp_path / "none.pth"
    with pytest.raises(InputError, match="no such file"):
        load_lpips("alex", missing, CPU)


def test_each_distance_picks_the_candidate_that_the_picture_shows(
    model: ClientModel, shared: Path
) -> None:
    path = shared / "lpips" / "squeezenet1_1_features.pth"
    lpips = load_lpips("squeeze", path, CPU)
    candidates = digits("reference").images[:12].reshape(3, 4, 1, 16, 16)
    shown = torch.tensor([2, 0, 3])
    pictures = (candidates[torch.arange(3), shown] + 0.02).clamp(0, 1)
    distances = candidate_distances(model, lpips)
    assert list(distances) == ["pixels", "representation", "lpips"]
    for distance in distances.values():
        found = distance(candidates, pictures)
        assert found.shape == (3, 4)
        assert torch.equal(found.argmin(1), shown)


def test_distances_are_those_of_a_plain_loop(model: ClientModel) -> None:
    candidates = digits("reference").images[:6].reshape(2, 3, 1, 16, 16)
    pictures = digits("private").images[:2]
    distances = candidate_distances(model, None)
    assert list(distances) == ["pixels", "representation"]
    for t in range(2):
        for n in range(3):
            metrics = compare(pictures[t], candidates[t, n], model, "none")
            pixels = distances["pixels"](candidates, pictures)[t, n]
            features = distances["representation"](candidates, pictures)[t, n]
            assert float(pixels) == pytest.approx(metrics.mse, rel=1e-5)
            assert float(features) == pytest.approx(metrics.mse_representation, rel=1e-4)
