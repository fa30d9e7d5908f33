"""How alike two images are. These figures illustrate; identification decides the grade."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict

from ggl_audit.basics.device import widened
from ggl_audit.errors import InputError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.tensors import read_tensors
from ggl_audit.messages import Message

SSIM_WINDOW = 7
LPIPS_SMALLEST = 64
FEATURES_TOGETHER = 256

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""LPIPS of pairs: from images (n, channels, height, width) twice to (n,)."""

LACKS_BACKBONE = Message(
    "image/lacks-backbone",
    "has no {name!r}: not torchvision's {net} backbone",
    advice="Give torchvision's ImageNet weights of the network in `evidence.lpips.net`.",
)
OTHER_BACKBONE = Message(
    "image/other-backbone",
    "does not fit torchvision's {net} backbone",
    advice="Give torchvision's ImageNet weights of the network in `evidence.lpips.net`.",
)


class Fidelity(BaseModel):
    """Metrics between a reconstruction and the truth, images in [0, 1].

    Attributes:
        mse: mean squared error over pixels.
        psnr_db: peak signal-to-noise ratio with peak 1, in dB (Li et al. 2022 computed it on
            [-1, 1] with peak 1: add 6.02 dB to their figures).
        ssim: structural similarity (Wang et al. 2004), 7x7 windows, in [-1, 1].
        lpips: learned perceptual distance (Zhang et al. 2018), 0 for identical images.
        mse_representation: mean squared error between what the model's head takes (MSE-R).
        not_measured: the reason for each metric that is null.
    """

    model_config = ConfigDict(frozen=True)

    mse: float
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    mse_representation: float | None = None
    not_measured: dict[str, str] = {}


def compare(
    image: torch.Tensor, truth: torch.Tensor, model: ClientModel, lpips: Perceptual | str
) -> Fidelity:
    """Measures a reconstruction.

    Args:
        image: (channels, height, width) in [0, 1].
        truth: the same shape.
        model: gives the representations.
        lpips: from :func:`load_lpips`, or why there is none.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    reasons: dict[str, str] = {}
    mse = float((image - truth).square().mean())
    pixels, true_pixels = (
        widened(t.detach().cpu()).permute(1, 2, 0).numpy() for t in (image, truth)
    )
    psnr = ssim = representation = None
    if mse > 0:
        psnr = float(peak_signal_noise_ratio(true_pixels, pixels, data_range=1))
    else:
        reasons["psnr_db"] = "the two images are identical"
    if min(truth.shape[1:]) >= SSIM_WINDOW:
        ssim = float(
            structural_similarity(
                true_pixels, pixels, data_range=1, channel_axis=2, win_size=SSIM_WINDOW
            )
        )
    else:
        reasons["ssim"] = f"images smaller than {SSIM_WINDOW} pixels"
    if isinstance(lpips, str):
        reasons["lpips"] = lpips
    # One by one, as images of a batch may share their statistics.
    with torch.no_grad():
        features, true_features = (model.representation(one[None]) for one in (image, truth))
    if features is not None and true_features is not None:
        representation = float((features - true_features).square().mean())
    else:
        reasons["mse_representation"] = "the model has no linear head"
    return Fidelity(
        mse=mse,
        psnr_db=psnr,
        ssim=ssim,
        lpips=None if isinstance(lpips, str) else float(lpips(image[None], truth[None])),
        mse_representation=representation,
        not_measured=reasons,
    )


def mean_psnr(images: torch.Tensor, truths: torch.Tensor) -> float:
    """The PSNR in dB of the geometric mean error over n images (n, channels, height, width)."""
    errors = (images - truths).square().flatten(1).mean(1).clamp(min=1e-12)
    return float((-10 * errors.log10()).mean())


def nearest(pictures: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """The one with the smallest squared error of k pictures each.

    Args:
        pictures: (t, k, channels, height, width).
        truths: (t, channels, height, width).

    Returns:
        (t, channels, height, width).
    """
    best = (pictures - truths[:, None]).square().flatten(2).sum(2).argmin(1)
    return pictures[torch.arange(len(pictures), device=pictures.device), best]


def candidate_distances(
    model: ClientModel, lpips: Perceptual | None
) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The distances by which a picture can pick a candidate, by name.

    Each maps candidates (t, N, channels, height, width) and pictures (t, channels, height, width)
    to (t, N): mean squared error over pixels; the same over what the model's head takes, where it
    has one; LPIPS, where its weights are there.

    Args:
        model: gives the representations.
        lpips: from :func:`load_lpips`, or None.
    """

    def pixels(candidates: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        errors: torch.Tensor = (candidates - pictures[:, None]).square().flatten(2).mean(2)
        return errors

    def features(images: torch.Tensor) -> torch.Tensor:
        # One by one, as images of a batch may share their statistics.
        together = 1 if model.mixes else FEATURES_TOGETHER
        with torch.no_grad():
            parts = [model.representation(part) for part in images.split(together)]
        return torch.cat([part for part in parts if part is not None])

    def representation(candidates: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        theirs = features(candidates.flatten(0, 1)).unflatten(0, candidates.shape[:2])
        errors: torch.Tensor = (theirs - features(pictures)[:, None]).square().mean(2)
        return errors

    distances: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"pixels": pixels}
    if model.head is not None:
        distances["representation"] = representation
    if lpips is not None:
        perceptual = lpips

        def by_lpips(candidates: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
            rows = zip(candidates, pictures, strict=True)
            return torch.stack([perceptual(row, one.expand_as(row)) for row, one in rows])

        distances["lpips"] = by_lpips
    return distances


def load_lpips(
    net: Literal["alex", "squeeze", "vgg"], path: Path, device: torch.device
) -> Perceptual:
    """Loads LPIPS v0.1 with the given backbone weights; the heads come with the lpips package.

    Grey images are repeated to three channels, and images below 64 pixels are enlarged to 64 by
    bilinear interpolation, which the backbones need.

    Args:
        net: which backbone.
        path: torchvision's weights of it, keys ``features.N.*`` (others are ignored).
        device: where to compute.

    Raises:
        InputError: the weights are missing or are of another network.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about arguments that lpips passes to torchvision
        import lpips

        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    weights = read_tensors(path)
    # lpips cuts the backbone's `features` into slices and keeps their indices.
    backbone = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
    missing = [name for name in backbone.values() if name not in weights]
    if missing:
        raise InputError(path, LACKS_BACKBONE(name=missing[0], net=net))
    try:
        network.net.load_state_dict({name: weights[key] for name, key in backbone.items()})
    except RuntimeError:
        raise InputError(path, OTHER_BACKBONE(net=net)) from None
    network.to(device).eval()

    def prepared(images: torch.Tensor) -> torch.Tensor:
        images = images.float().to(device).expand(-1, 3, -1, -1)
        if min(images.shape[2:]) < LPIPS_SMALLEST:
            images = F.interpolate(images, (LPIPS_SMALLEST, LPIPS_SMALLEST), mode="bilinear")
        return images

    def distance(images: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = network(prepared(images), prepared(truths), normalize=True)
        distances: torch.Tensor = found.flatten()
        return distances

    return distance
