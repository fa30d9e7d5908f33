"""What a search minimizes: the distance of decoded latents to the capture, and a penalty."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.gradient import Gradient, repeated
from ggl_audit.optimizers import Evaluation, Wants
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import RegularizerSpec


def penalty(latents: torch.Tensor, regularizer: RegularizerSpec) -> torch.Tensor:
    """The paper's two latent regularizers (Li et al. 2022, section 3.3).

    ``kl``: the divergence of N(m, s^2) from N(0, 1), m and s the mean and standard deviation over a
    latent's coordinates. ``norm``: (|z|^2 - d)^2 / d^2, how far the latent is from the shell that
    holds a normal prior's mass; the division, which the paper leaves out, makes the weight mean the
    same in every dimension d.

    Args:
        latents: (..., d).
        regularizer: which one, and its weight.

    Returns:
        (...,), not negative.
    """
    if regularizer.name == "none":
        return torch.zeros(latents.shape[:-1], device=latents.device)
    if regularizer.name == "kl":
        mean = latents.mean(-1)
        variance = latents.var(-1, correction=0).clamp(min=1e-8)
        return regularizer.weight * (mean.square() + variance - variance.log() - 1) / 2
    dimension = latents.shape[-1]
    return regularizer.weight * (latents.square().sum(-1) / dimension - 1).square()


@dataclass(frozen=True)
class LatentObjective:
    """What a search minimizes: the matching distance of decoded latents plus the regularizer.

    Attributes:
        matching: compares images with gradients.
        prior: decodes latents.
        observed: t observed gradients, tensors with a leading dimension t.
        labels: (t,), the label that the attacker assigns to each; (t, k) where k images made it.
        regularizer: the penalty on latents, a mean over the k.
    """

    matching: Matching
    prior: Prior
    observed: Gradient
    labels: torch.Tensor
    regularizer: RegularizerSpec

    @property
    def parts(self) -> int:
        """How many latents are searched for each on its own: k, or one that holds all of them."""
        return self.labels[0].numel() if self.matching.adds_up else 1

    @property
    def dimension(self) -> int:
        """Of the latent of a part."""
        return self.prior.size * self.labels[0].numel() // self.parts

    def losses(self, latents: torch.Tensor) -> torch.Tensor:
        """The losses of n latents for each of t observed gradients.

        Args:
            latents: (t, n, d), standard normal coordinates; (t, n, k x d) for k images.

        Returns:
            (t, n).
        """
        trials, candidates, _ = latents.shape
        labels = self.labels.reshape(trials, 1, -1).expand(trials, candidates, -1)
        images = pictures(self.prior, latents.flatten(0, 1), labels.flatten(0, 1))
        distances = self.matching.distances(
            images.unflatten(0, (trials, candidates)), labels, self.observed
        )
        of_each = latents.unflatten(2, (-1, self.prior.size))
        return distances + penalty(of_each, self.regularizer).mean(2)

    def losses_in_turn(self, candidates: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The losses of sets of latents that differ from a given one in one latent.

        Args:
            candidates: (t, r, k, n, d), for each of the k latents of r given sets.
            others: (t, r, k, d), the given sets.

        Returns:
            (t, r, k, n).
        """
        trials, sets, members, count, size = candidates.shape
        labels = self.labels.reshape(trials, members).repeat_interleave(sets, dim=0)
        tried = pictures(
            self.prior, candidates.reshape(-1, size), labels.repeat_interleave(count)[:, None]
        )
        distances = self.matching.distances_in_turn(
            tried.reshape(len(labels), members, count, *tried.shape[2:]),
            labels,
            pictures(self.prior, others.flatten(0, 1).flatten(1), labels),
            repeated(self.observed, sets),
        )
        given = penalty(others, self.regularizer)
        of_others = given.sum(2, keepdim=True) - given
        penalties = (of_others[..., None] + penalty(candidates, self.regularizer)) / members
        return distances.reshape_as(penalties) + penalties


def pictures(prior: Prior, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The k images of each of n latents.

    Args:
        prior: decodes latents of size d.
        latents: (n, k x d).
        labels: (n, k).

    Returns:
        (n, k, channels, height, width) in [0, 1].
    """
    with torch.no_grad():
        images = prior.decode(latents.reshape(labels.numel(), -1), labels.flatten())
    shaped: torch.Tensor = images.unflatten(0, labels.shape)
    return shaped
