"""Trains a conditional generator: a spectrally normalized GAN that must also reconstruct its data.

The discriminator is that of Miyato and Koyama (cGANs with Projection Discriminator, ICLR 2018) with
spectral normalization and the hinge loss. An adversarial loss alone leaves out much of a small data
set, and what a prior cannot draw an audit cannot find. So an encoder is trained along, as in
VAE-GANs (Larsen et al., ICML 2016): its codes must decode to the images they came from. It is
dropped at the end; the Gaussian of each class' codes stays in the generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ggl_audit.inputs.images import ImageSet
from ggl_audit.priors.card import Inversion
from ggl_audit.priors.generator import Architecture, Generator, activate, initialize

REFRESH_STEPS = 200
AUGMENTED_PASSES = 4


@dataclass(frozen=True)
class Schedule:
    """How a prior is trained; the defaults were chosen on the bundled digits.

    Attributes:
        steps: updates of each network.
        seed: decides the initial weights and all draws.
        batch: images in a step.
        generator_rate: Adam's learning rate of generator and encoder.
        discriminator_rate: Adam's learning rate of the discriminator.
        reconstruction: weight of the reconstruction loss against the adversarial one.
        pixel_variance: of the reconstruction's Gaussian likelihood, images in [0, 1].
        averaging: decay of the generator's moving average, which is what is kept.
        shrinkage: share of the common covariance in that of each class' codes.
    """

    steps: int = 4000
    seed: int = 0
    batch: int = 64
    generator_rate: float = 2e-3
    discriminator_rate: float = 1.5e-3
    reconstruction: float = 0.03
    pixel_variance: float = 0.002
    averaging: float = 0.998
    shrinkage: float = 0.1


class Discriminator(nn.Module):
    """Image and label to a score, higher for real ones."""

    def __init__(self, architecture: Architecture, features: int = 128) -> None:
        super().__init__()
        self.convolutions = _halvings(architecture, first=32)
        for layer in self.convolutions:
            spectral_norm(layer)
        flat = _flat_size(self.convolutions, architecture)
        self.features = spectral_norm(nn.Linear(flat, features))
        self.score = spectral_norm(nn.Linear(features, 1))
        self.classes = spectral_norm(nn.Embedding(architecture.classes, features))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps (n, channels, size, size) in [-1, 1] and (n,) to (n,)."""
        features = activate(self.features(_convolve(self.convolutions, images).flatten(1)))
        class_score = (features * self.classes(labels)).sum(dim=1)
        score: torch.Tensor = self.score(features)[:, 0] + class_score
        return score


class Encoder(nn.Module):
    """Image and label to the mean and log-variance of the image's code; needed in training only."""

    def __init__(self, architecture: Architecture, hidden: int = 128) -> None:
        super().__init__()
        self.classes = architecture.classes
        self.convolutions = _halvings(architecture, first=24)
        flat = _flat_size(self.convolutions, architecture)
        self.hidden = nn.Linear(flat + architecture.classes, hidden)
        self.code = nn.Linear(hidden, 2 * architecture.latent)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (n, channels, size, size) in [-1, 1] and (n,) to two of (n, latent)."""
        features = _convolve(self.convolutions, images).flatten(1)
        labels_hot = F.one_hot(labels, self.classes).to(features.dtype)
        hidden = activate(self.hidden(torch.cat([features, labels_hot], dim=1)))
        mean, log_variance = self.code(hidden).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 2)


def train_generator(
    data: ImageSet,
    architecture: Architecture,
    schedule: Schedule,
    device: torch.device,
    advance: Callable[[], None],
) -> Generator:
    """Trains a generator.

    Args:
        data: the images that it may see, of the architecture's size, every class among them.
        architecture: of the generator.
        schedule: how long and how.
        device: where to train.
        advance: told after each step.

    Returns:
        The moving average of the generator, on the device, in eval mode.
    """
    torch.manual_seed(schedule.seed)
    images, labels = data.images.to(device), data.labels.to(device)
    generator = Generator(architecture)
    discriminator, encoder = Discriminator(architecture), Encoder(architecture)
    initialize(discriminator)
    initialize(encoder)
    generator.to(device)
    discriminator.to(device)
    encoder.to(device)
    average = copy.deepcopy(generator)
    makers = [*generator.parameters(), *encoder.parameters()]
    maker = torch.optim.Adam(makers, schedule.generator_rate, betas=(0.5, 0.99))
    judge = torch.optim.Adam(
        discriminator.parameters(), schedule.discriminator_rate, betas=(0.0, 0.9)
    )

    def decay(step: int) -> float:
        return min(1.0, 2 * (1 - step / schedule.steps) + 0.05)

    decays = [torch.optim.lr_scheduler.LambdaLR(optimizer, decay) for optimizer in (maker, judge)]

    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(labels), (schedule.batch,), device=device)
        latents = torch.randn(schedule.batch, architecture.latent, device=device)
        return augment(images[chosen]) * 2 - 1, labels[chosen], latents

    for step in range(schedule.steps):
        real, drawn, latents = draw()
        with torch.no_grad():
            fake = generator(latents, drawn)
        scores = discriminator(torch.cat([real, fake]), torch.cat([drawn, drawn]))
        real_score, fake_score = scores.chunk(2)
        judge.zero_grad()
        (F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()).backward()
        judge.step()

        real, drawn, latents = draw()
        discriminator.requires_grad_(requires_grad=False)
        adversarial = -discriminator(generator(latents, drawn), drawn).mean()
        mean, log_variance = encoder(real, drawn)
        codes = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        # Half the difference: the likelihood's variance is for images in [0, 1].
        difference = (generator.decode(codes, drawn) - real) / 2
        likelihood = difference.square().flatten(1).sum(1).mean() / (2 * schedule.pixel_variance)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        maker.zero_grad()
        (adversarial + schedule.reconstruction * (likelihood + divergence)).backward()
        maker.step()
        discriminator.requires_grad_(requires_grad=True)

        for schedule_of in decays:
            schedule_of.step()
        with torch.no_grad():
            rate = 1 - min(schedule.averaging, (step + 1) / (step + 10))
            for kept, current in zip(average.parameters(), generator.parameters(), strict=True):
                kept.lerp_(current, rate)
        if (step + 1) % REFRESH_STEPS == 0 or step + 1 == schedule.steps:
            _fit_codes(generator, encoder, images, labels, schedule.shrinkage)
            average.code_mean.copy_(generator.code_mean)
            average.code_axes.copy_(generator.code_axes)
        advance()
    return average.eval().requires_grad_(requires_grad=False)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Varies images as handwriting varies: a mild affine map, a smooth bend, and contrast.

    Args:
        images: (n, channels, height, width) in [0, 1].

    Returns:
        The same shape and range.
    """
    count, device = len(images), images.device

    def vary(most: float) -> torch.Tensor:
        return (torch.rand(count, device=device) * 2 - 1) * most

    angle, shear = vary(0.07), vary(0.08)
    width, height = vary(0.04).exp(), vary(0.032).exp()
    right, down = vary(0.04), vary(0.024)
    rows = [
        torch.stack([angle.cos() * width, -angle.sin() * height + shear, right], dim=1),
        torch.stack([angle.sin() * width, angle.cos() * height, down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    bend = F.interpolate(
        torch.randn(count, 2, 4, 4, device=device) * 0.025,
        size=images.shape[-2:],
        mode="bicubic",
        align_corners=False,
    )
    moved = F.grid_sample(
        images, grid + bend.permute(0, 2, 3, 1), "bicubic", "zeros", align_corners=False
    )
    return moved.clamp(0, 1).pow(vary(0.1).exp()[:, None, None, None])


def invert(
    generator: Generator, data: ImageSet, starts: int = 8, steps: int = 300
) -> tuple[Inversion, torch.Tensor]:
    """Finds out how well a generator can represent images at best, by Adam on the latent.

    Args:
        generator: in eval mode.
        data: n held-out images.
        starts: random latents that each image is tried from; the best counts.
        steps: of Adam, for each start.

    Returns:
        The figures, and the best pictures (n, channels, size, size) in [0, 1].
    """
    device = generator.code_mean.device
    random = torch.Generator(device=device).manual_seed(0)
    count, latent = len(data), generator.architecture.latent
    images = data.images.to(device).repeat_interleave(starts, dim=0)
    labels = data.labels.to(device).repeat_interleave(starts)
    latents = torch.randn(count * starts, latent, generator=random, device=device) / 2
    latents.requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        drawn = (generator(latents, labels) + 1) / 2
        (drawn - images).square().flatten(1).mean(1).sum().backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            latents.clamp_(-3, 3)  # beyond, the prior would hardly ever draw it
    with torch.no_grad():
        drawn = (generator(latents, labels) + 1) / 2
    errors = (drawn - images).square().flatten(1).mean(1).view(count, starts)
    psnr = -10 * errors.min(dim=1).values.log10()
    best = errors.argmin(dim=1) + torch.arange(count, device=device) * starts
    figures = Inversion(
        images=count,
        psnr_db=round(float(psnr.mean()), 2),
        psnr_db_tenth=round(float(psnr.quantile(0.1)), 2),
    )
    return figures, drawn[best]


@torch.no_grad()
def _fit_codes(
    generator: Generator,
    encoder: Encoder,
    images: torch.Tensor,
    labels: torch.Tensor,
    shrinkage: float,
) -> None:
    """Fits a Gaussian to the codes of each class, along its principal axes, the largest first."""
    labels = labels.repeat(AUGMENTED_PASSES)
    means, log_variances = [], []
    for batch, batch_labels in zip(
        images.repeat(AUGMENTED_PASSES, 1, 1, 1).split(500), labels.split(500), strict=True
    ):
        mean, log_variance = encoder(augment(batch) * 2 - 1, batch_labels)
        means.append(mean)
        log_variances.append(log_variance)
    mean, variance = torch.cat(means), torch.cat(log_variances).exp()
    members = [labels == label for label in range(generator.architecture.classes)]
    covariance = torch.stack([torch.cov(mean[m].T) + variance[m].mean(0).diag() for m in members])
    covariance = covariance.lerp(covariance.mean(0, keepdim=True), shrinkage)
    sizes, axes = torch.linalg.eigh(covariance)
    signs = torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
    generator.code_axes.copy_((axes * signs * sizes.clamp(min=1e-6).sqrt()[:, None]).flip(2))
    generator.code_mean.copy_(torch.stack([mean[m].mean(0) for m in members]))


def _halvings(architecture: Architecture, first: int) -> nn.ModuleList:
    widths = [architecture.channels]
    widths += [min(first << i, 4 * first) for i in range(architecture.doublings)]
    return nn.ModuleList(nn.Conv2d(before, after, 4, 2, 1) for before, after in pairwise(widths))


def _flat_size(convolutions: nn.ModuleList, architecture: Architecture) -> int:
    last = convolutions[-1]
    assert isinstance(last, nn.Conv2d)
    return int(last.out_channels) * architecture.start**2


def _convolve(convolutions: nn.ModuleList, images: torch.Tensor) -> torch.Tensor:
    for layer in convolutions:
        images = activate(layer(images))
    return images
