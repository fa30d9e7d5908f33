"""From the standard normal coordinates of a search to what a generator takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ggl_audit.basics.device import widened
from ggl_audit.spec import LatentSpec

LEAST_VARIANCE = 1e-6
"""The least variance of an axis of W, relative to the largest: less is rounding or idle."""


@dataclass(frozen=True)
class DeclaredLatents:
    """Latents of a declared distribution, each value the quantile of its own coordinate.

    Attributes:
        declared: the shape, and the distribution of every value.
    """

    declared: LatentSpec

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return math.prod(self.declared.shape)

    def __call__(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Maps (n, size), standard normal, to (n, *shape)."""
        return self._values(coordinates).reshape(-1, *self.declared.shape)

    def _values(self, coordinates: torch.Tensor) -> torch.Tensor:
        if self.declared.distribution == "normal":
            return coordinates
        # 2 Phi(u) - 1; in double precision, as the tails of the quantiles are steep.
        values = torch.erf(widened(coordinates) / math.sqrt(2))
        if self.declared.distribution == "truncated":
            # Phi^-1(Phi(-t) + Phi(u) (Phi(t) - Phi(-t))), written without the two small ends.
            within = math.erf(self.declared.truncation / math.sqrt(2))
            values = math.sqrt(2) * torch.erfinv(within * values)
        return values.to(coordinates.dtype)


@dataclass(frozen=True)
class GaussianLatents:
    """Latents of a Gaussian: what a mapping network makes of its own latents (StyleGAN's W).

    PULSE (Menon et al., CVPR 2020) models W by a Gaussian too: coordinate by coordinate, with the
    mapping's last nonlinearity undone. Here nothing is known of the mapping, so the Gaussian has
    the mean and the covariance of W as it is.

    Attributes:
        mean: (d,).
        axes: (size, d), the principal axes, each as long as its standard deviation.
        shape: of what the generator takes, without the batch; d values.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return len(self.axes)

    def __call__(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Maps (n, size), standard normal, to (n, *shape)."""
        return (self.mean + coordinates @ self.axes).reshape(-1, *self.shape)


LatentSpace = DeclaredLatents | GaussianLatents


def fit_gaussian(mapped: torch.Tensor) -> GaussianLatents:
    """Fits a Gaussian to what a mapping made of n latents.

    Args:
        mapped: (n, *shape), n at least 2.

    Returns:
        The mean, and the axes along which the variance is at least ``LEAST_VARIANCE`` of the
        largest; at most n - 1 of them, or none where there is no variance.
    """
    values = widened(mapped.flatten(1))
    mean = values.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(
        (values - mean) / math.sqrt(len(values) - 1), full_matrices=False
    )
    kept = (sizes.square() >= LEAST_VARIANCE * sizes[0].square()) & (sizes > 0)
    kept &= torch.arange(len(sizes), device=sizes.device) < len(values) - 1
    signs = torch.where(axes.sum(dim=1) < 0, -1.0, 1.0)  # a singular vector has either sign
    scaled = axes * (signs * sizes)[:, None]
    return GaussianLatents(
        mean.to(mapped.dtype), scaled[kept].to(mapped.dtype), tuple(mapped.shape[1:])
    )
