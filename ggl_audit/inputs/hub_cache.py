"""Weights that torchvision has left in PyTorch's hub cache, which most users have."""

from __future__ import annotations

from pathlib import Path

import torch

from ggl_audit.basics.files import sha256
from ggl_audit.errors import SpecError
from ggl_audit.messages import Message, Said

BACKBONES = {
    "alex": "AlexNet_Weights.IMAGENET1K_V1",
    "squeeze": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
    "vgg": "VGG16_Weights.IMAGENET1K_V1",
}
"""The backbones of LPIPS, by torchvision's names."""

SHORTEST_HASH = 8
"""Characters of the SHA-256 that torchvision puts into a name."""

COMMAND = "--set evidence.lpips.download=true"

CANNOT_BE_FETCHED = Message(
    "image/cannot-be-fetched",
    "{url} cannot be fetched ({reason})",
    "Fetch it elsewhere and name it in evidence.lpips.weights, or leave LPIPS out.",
    advice="Fetch the file elsewhere and name it in `evidence.lpips.weights`.",
)

FETCH_IT = (
    "Let it be fetched as the message says, give `evidence.lpips.weights`, or declare another "
    "distance."
)
NOT_IN_CACHE = Message(
    "image/not-in-cache",
    "{file} is not in PyTorch's cache: {command} fetches it",
    advice=FETCH_IT,
)
OTHER_IN_CACHE = Message(
    "image/other-in-cache",
    "{file} in PyTorch's cache is not the file that its name says: {command}",
    advice=FETCH_IT,
)


def find_backbone(net: str, *, download: bool) -> Path | Said:
    """The file of a backbone's weights, or why there is none.

    A file in the cache counts if its SHA-256 begins as its name says; it is not read here.

    Args:
        net: alex, squeeze or vgg.
        download: whether it may be fetched, once, from where torchvision has it.

    Raises:
        SpecError: it cannot be fetched.
    """
    from torchvision.models import get_weight

    url = get_weight(BACKBONES[net]).url
    name = url.rpartition("/")[2]
    stem, _, own_hash = name.removesuffix(".pth").rpartition("-")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # Files of older versions of torchvision have other hashes in their names.
    found = [path for path in sorted(folder.glob(f"{stem}-*.pth")) if path.is_file()]
    found.sort(key=lambda path: path.name != name)
    for path in found:
        told = path.stem.rpartition("-")[2]
        if len(told) >= SHORTEST_HASH and sha256([path]).startswith(told):
            return path
    if download:
        return _fetch(url, folder / name, own_hash)
    if found:
        return OTHER_IN_CACHE(file=found[0].name, command=COMMAND)
    return NOT_IN_CACHE(file=name, command=COMMAND)


def _fetch(url: str, path: Path, own_hash: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), own_hash, progress=False)
    except (OSError, RuntimeError) as error:
        # urllib's errors are OSErrors; a wrong hash is a RuntimeError.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecError(
            ("evidence", "lpips", "download"), CANNOT_BE_FETCHED(url=url, reason=reason)
        ) from None
    return path
