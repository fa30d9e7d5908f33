"""Trains a generator: a spectrally normalized GAN that must also reconstruct its data.

The discriminator is that of Miyato and Koyama (cGANs with Projection Discriminator, ICLR 2018) with
spectral normalization and the hinge loss. An adversarial loss alone leaves out much of a small data
set, and what a prior cannot draw an audit cannot find. So an encoder is trained along, as in
VAE-GANs (Larsen et al., ICML 2016): its codes must decode to the images they came from. It is
dropped at the end; the Gaussian of each class' codes stays in the generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ggl_audit.basics.device import CPU, random_state, restore_random_state, settle
from ggl_audit.errors import AuditError, ReasonError
from ggl_audit.inputs.images import ImageSet
from ggl_audit.messages import Message
from ggl_audit.priors.card import Inversion
from ggl_audit.priors.classes import place_in_class
from ggl_audit.priors.generator import Architecture, Generator, activate, initialize

REFRESH_STEPS = 200
AUGMENTED_PASSES = 4
MOST_FITTED = 8000
INVERSION_STEPS = 300
ADAM_SLOTS = ("step", "exp_avg", "exp_avg_sq")

OTHER_MOMENTS = Message(
    "training/other-moments",
    "the moments of the {network} have other shapes",
    advice="Delete the checkpoint to start anew.",
)
STATE_IS_MISSING = Message(
    "training/state-is-missing",
    "{name} is missing",
    advice="Delete the checkpoint to start anew.",
)
IMPOSSIBLE_STEPS = Message(
    "training/impossible-steps",
    "{done} steps of {steps} cannot be",
    advice="Delete the checkpoint to start anew.",
)
DIVERGED = Message(
    "training/diverged",
    "the training diverged before step {step}: its weights are not finite",
    "Give another --seed or a smaller --reconstruction.",
    advice="Give another `--seed`, a smaller `--width` or less `--augmentation`; look at the "
    "images.",
)


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
        augmentation: how much images are varied: 0 not at all, 1 as handwriting varies.
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
    augmentation: float = 1.0


class Discriminator(nn.Module):
    """Image and label to a score, higher for real ones."""

    def __init__(self, architecture: Architecture, features: int = 128) -> None:
        super().__init__()
        self.convolutions = _halvings(architecture, first=architecture.width * 2 // 3)
        for layer in self.convolutions:
            spectral_norm(layer)
        flat = _flat_size(self.convolutions, architecture)
        self.features = spectral_norm(nn.Linear(flat, features))
        self.score = spectral_norm(nn.Linear(features, 1))
        self.classes = spectral_norm(nn.Embedding(architecture.groups, features))

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
        self.groups = architecture.groups
        self.convolutions = _halvings(architecture, first=architecture.width // 2)
        flat = _flat_size(self.convolutions, architecture)
        self.hidden = nn.Linear(flat + architecture.groups, hidden)
        self.code = nn.Linear(hidden, 2 * architecture.latent)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (n, channels, size, size) in [-1, 1] and (n,) to two of (n, latent)."""
        features = _convolve(self.convolutions, images).flatten(1)
        labels_hot = F.one_hot(labels, self.groups).to(features.dtype)
        hidden = activate(self.hidden(torch.cat([features, labels_hot], dim=1)))
        mean, log_variance = self.code(hidden).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 2)


class Training:
    """A training under way: the networks, their optimizers, and how far they are.

    What is drawn is drawn from PyTorch's global generators, which nothing else may use meanwhile.

    Attributes:
        done: the steps so far.
    """

    def __init__(
        self, data: ImageSet, architecture: Architecture, schedule: Schedule, device: torch.device
    ) -> None:
        """Begins a training.

        Args:
            data: the images that it may see, of the architecture's size, every class among them;
                for an architecture without classes all of label 0.
            architecture: of the generator.
            schedule: how long and how.
            device: where to train.
        """
        self.schedule, self.device = schedule, device
        settle(device)
        torch.manual_seed(schedule.seed)
        self.done = 0
        self._images, self._labels = data.images.to(device), data.labels.to(device)
        self._beyond = _beyond_the_edge(self._images)
        self._generator = Generator(architecture)
        self._discriminator, self._encoder = Discriminator(architecture), Encoder(architecture)
        initialize(self._discriminator)
        initialize(self._encoder)
        self._average = copy.deepcopy(self._generator).eval().requires_grad_(requires_grad=False)
        self._networks = nn.ModuleDict(
            {
                "generator": self._generator,
                "discriminator": self._discriminator,
                "encoder": self._encoder,
                "average": self._average,
            }
        ).to(device)
        makers = [*self._generator.parameters(), *self._encoder.parameters()]
        self._maker = torch.optim.Adam(makers, betas=(0.5, 0.99))
        self._judge = torch.optim.Adam(self._discriminator.parameters(), betas=(0.0, 0.9))

    @property
    def generator(self) -> Generator:
        """The moving average of the generator, on the device, in eval mode: what is kept."""
        return self._average

    def advance(self) -> None:
        """Makes one step: an update of the discriminator, then one of generator and encoder.

        Raises:
            AuditError: the training diverged.
        """
        schedule = self.schedule
        decay = min(1.0, 2 * (1 - self.done / schedule.steps) + 0.05)
        self._judge.param_groups[0]["lr"] = schedule.discriminator_rate * decay
        self._maker.param_groups[0]["lr"] = schedule.generator_rate * decay
        self._update_discriminator()
        self._update_generator()
        self.done += 1
        with torch.no_grad():
            rate = 1 - min(schedule.averaging, self.done / (self.done + 9))
            kept, current = self._average.parameters(), self._generator.parameters()
            for average, parameter in zip(kept, current, strict=True):
                average.lerp_(parameter, rate)
        if self.done % REFRESH_STEPS == 0 or self.done == schedule.steps:
            self._fit_codes()

    def state(self) -> dict[str, torch.Tensor]:
        """All that decides the steps to come, on the CPU; :meth:`restore` takes it."""
        state = dict(self._networks.state_dict())
        for name, optimizer in self._optimizers():
            for parameter, slots in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{parameter}.{slot}": slots[slot] for slot in ADAM_SLOTS}
        state["done"] = torch.tensor(self.done)
        state["random"] = random_state(CPU)
        state["random_on_device"] = random_state(self.device)
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Goes back to a state of a training of the same data, architecture and schedule.

        Raises:
            ValueError: it is not such a state.
        """
        try:
            own = {name: state[name] for name in self._networks.state_dict()}
            self._networks.load_state_dict(own)
            for name, optimizer in self._optimizers():
                parameters = optimizer.param_groups[0]["params"]
                slots = {
                    i: {slot: state[f"{name}.{i}.{slot}"].clone() for slot in ADAM_SLOTS}
                    for i in range(len(parameters))
                }
                if any(
                    slots[i]["step"].shape != () or slots[i][moment].shape != parameter.shape
                    for i, parameter in enumerate(parameters)
                    for moment in ADAM_SLOTS[1:]
                ):
                    raise ReasonError(OTHER_MOMENTS(network=name))
                optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
            self.done = int(state["done"])
            restore_random_state(CPU, state["random"])
            restore_random_state(self.device, state["random_on_device"])
        except KeyError as error:
            raise ReasonError(STATE_IS_MISSING(name=error)) from None
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error).strip().splitlines()[0]) from None
        if not 0 < self.done <= self.schedule.steps:
            raise ReasonError(IMPOSSIBLE_STEPS(done=self.done, steps=self.schedule.steps))

    def _optimizers(self) -> Iterator[tuple[str, torch.optim.Adam]]:
        yield "judge", self._judge
        yield "maker", self._maker

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, latent = self.schedule.batch, self._generator.architecture.latent
        chosen = torch.randint(len(self._labels), (batch,), device=self.device)
        latents = torch.randn(batch, latent, device=self.device)
        return self._varied(self._images[chosen]) * 2 - 1, self._labels[chosen], latents

    def _varied(self, images: torch.Tensor) -> torch.Tensor:
        return augment(images, self.schedule.augmentation, self._beyond)

    def _update_discriminator(self) -> None:
        real, labels, latents = self._draw()
        with torch.no_grad():
            fake = self._generator(latents, labels)
        scores = self._discriminator(torch.cat([real, fake]), torch.cat([labels, labels]))
        real_score, fake_score = scores.chunk(2)
        self._judge.zero_grad()
        (F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()).backward()
        self._judge.step()

    def _update_generator(self) -> None:
        real, labels, latents = self._draw()
        self._discriminator.requires_grad_(requires_grad=False)
        adversarial = -self._discriminator(self._generator(latents, labels), labels).mean()
        mean, log_variance = self._encoder(real, labels)
        codes = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        # Half the difference: the likelihood's variance is for images in [0, 1].
        difference = (self._generator.decode(codes, labels) - real) / 2
        variance = self.schedule.pixel_variance
        likelihood = difference.square().flatten(1).sum(1).mean() / (2 * variance)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        self._maker.zero_grad()
        (adversarial + self.schedule.reconstruction * (likelihood + divergence)).backward()
        self._maker.step()
        self._discriminator.requires_grad_(requires_grad=True)

    @torch.no_grad()
    def _fit_codes(self) -> None:
        """Fits a Gaussian to each class' codes, along its principal axes, the largest first."""
        if not all(bool(t.isfinite().all()) for t in self._networks.state_dict().values()):
            raise AuditError(DIVERGED(step=self.done))
        count, groups = len(self._labels), self._generator.architecture.groups
        order = torch.arange(count, device=self.device).repeat(AUGMENTED_PASSES)
        if len(order) > MOST_FITTED:
            order = torch.randperm(count, device=self.device)
            places = place_in_class(self._labels[order])
            order = order[places < max(2, MOST_FITTED // groups)]
        images, labels = self._images[order], self._labels[order]
        means, log_variances = [], []
        for batch, batch_labels in zip(images.split(500), labels.split(500), strict=True):
            mean, log_variance = self._encoder(self._varied(batch) * 2 - 1, batch_labels)
            means.append(mean)
            log_variances.append(log_variance)
        mean, variance = torch.cat(means), torch.cat(log_variances).exp()
        members = [labels == label for label in range(groups)]
        covariance = torch.stack(
            [torch.cov(mean[m].T) + variance[m].mean(0).diag() for m in members]
        )
        covariance = covariance.lerp(covariance.mean(0, keepdim=True), self.schedule.shrinkage)
        sizes, axes = torch.linalg.eigh(covariance)
        signs = torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
        code_axes = (axes * signs * sizes.clamp(min=1e-6).sqrt()[:, None]).flip(2)
        code_mean = torch.stack([mean[m].mean(0) for m in members])
        for generator in (self._generator, self._average):
            generator.code_axes.copy_(code_axes)
            generator.code_mean.copy_(code_mean)


def augment(images: torch.Tensor, strength: float = 1.0, beyond: str = "zeros") -> torch.Tensor:
    """Varies images as handwriting varies: a mild affine map, a smooth bend, and contrast.

    Args:
        images: (n, channels, height, width) in [0, 1].
        strength: 0 leaves them as they are.
        beyond: what is moved in from beyond the edges: zeros, or border, the pixels there.

    Returns:
        The same shape and range.
    """
    if strength == 0:
        return images
    count, device = len(images), images.device

    def vary(most: float) -> torch.Tensor:
        return (torch.rand(count, device=device) * 2 - 1) * (most * strength)

    angle, shear = vary(0.07), vary(0.08)
    width, height = vary(0.04).exp(), vary(0.032).exp()
    right, down = vary(0.04), vary(0.024)
    rows = [
        torch.stack([angle.cos() * width, -angle.sin() * height + shear, right], dim=1),
        torch.stack([angle.sin() * width, angle.cos() * height, down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    bend = F.interpolate(
        torch.randn(count, 2, 4, 4, device=device) * (0.025 * strength),
        size=images.shape[-2:],
        mode="bicubic",
        align_corners=False,
    )
    moved = F.grid_sample(
        images, grid + bend.permute(0, 2, 3, 1), "bicubic", beyond, align_corners=False
    )
    return moved.clamp(0, 1).pow(vary(0.1).exp()[:, None, None, None])


def invert(
    generator: Generator,
    data: ImageSet,
    starts: int = 8,
    steps: int = INVERSION_STEPS,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Inversion, torch.Tensor]:
    """Finds out how well a generator can represent images at best, by Adam on the latent.

    Args:
        generator: in eval mode.
        data: n held-out images.
        starts: random latents that each image is tried from; the best counts.
        steps: of Adam, for each start.
        advance: told of each step.

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
        advance(1)
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


def _beyond_the_edge(images: torch.Tensor) -> str:
    """The dark where most of the edges are black, as around handwriting; else their own pixels."""
    edges = [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]]
    return "zeros" if float(torch.cat([e.flatten() for e in edges]).median()) == 0 else "border"


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
