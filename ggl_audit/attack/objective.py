"""What a search minimizes: the distance of decoded latents to the capture, and a penalty."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.matching import Matching
from ggl_audit.attack.residuals import Residuals
from ggl_audit.basics.gradient import Gradient, repeated
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
    if regularizer.name in ("none", "posterior"):
        return torch.zeros(latents.shape[:-1], device=latents.device)
    if regularizer.name == "kl":
        mean = latents.mean(-1)
        variance = latents.var(-1, correction=0).clamp(min=1e-8)
        return regularizer.weight * (mean.square() + variance - variance.log() - 1) / 2
    dimension = latents.shape[-1]
    return regularizer.weight * (latents.square().sum(-1) / dimension - 1).square()


@dataclass(frozen=True)
class LatentObjective:
    """What a search minimizes: the matching distance of decoded latents plus penalties.

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

    @functools.cached_property
    def residuals(self) -> Residuals:
        """The matching value by value."""
        return Residuals(self.matching)

    @functools.cached_property
    def derivatives(self) -> Derivatives:
        """The matching with its derivatives."""
        matching = self.matching
        return Derivatives(
            matching.model, matching.defense, matching.distance, memory=matching.clients.memory
        )

    @functools.cached_property
    def prior_weight(self) -> torch.Tensor:
        """(t,), of a latent's squared norm against the squared relative distance.

        The mode of the posterior minimizes |g - observed|^2 / std^2 + |z|^2, where the declared
        noise has the standard deviation std.
        """
        noise = self.matching.defense.randomness.total_noise()
        squares = [t.reshape(len(t), -1).square().sum(1) for t in self.observed.values()]
        observed = torch.stack(squares).sum(0).clamp(min=1e-30)
        if noise is None or self.regularizer.name != "posterior":
            return torch.zeros_like(observed)
        return noise.std**2 / observed

    @property
    def members(self) -> int:
        """k, how many images made each gradient."""
        return self.labels[0].numel()

    def parts(self, together: bool) -> int:
        """How many latents are searched for each by itself: k, or one that holds all of them."""
        return self.members if self.matching.clients.adds_up and not together else 1

    def evaluate(self, latents: torch.Tensor, wants: Wants) -> Evaluation:
        """What becomes of n latents for each of t observed gradients.

        Args:
            latents: (t, n, k x d), standard normal coordinates.
            wants: what besides the losses.
        """
        if wants == "losses":
            return Evaluation(self.losses(latents))
        trials, candidates, _ = latents.shape
        labels = self.labels.reshape(trials, 1, -1).expand(trials, candidates, -1)
        if wants == "derivatives":
            return self._with_derivatives(latents, labels)
        images = pictures(self.prior, latents.flatten(0, 1), labels.flatten(0, 1))
        distances, products = self.residuals(
            images.unflatten(0, (trials, candidates)), labels, self.observed
        )
        own = torch.cat([latents[:, :1], latents[:, 1:] - latents[:, :1]], dim=1)
        products = products + self.prior_weight[:, None, None] * own @ own.transpose(1, 2)
        return Evaluation(distances + self._penalty(latents), products=products)

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
        return distances + self._penalty(latents)

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
        given = self._penalties(others)
        of_others = given.sum(2, keepdim=True) - given
        penalties = (of_others[..., None] + self._penalties(candidates)) / members
        return distances.reshape_as(penalties) + penalties

    def _with_derivatives(self, latents: torch.Tensor, labels: torch.Tensor) -> Evaluation:
        candidates = latents.shape[1]
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            images = self.prior.decode(leaf.reshape(-1, self.prior.size), labels.flatten())
            images = images.unflatten(0, (-1, self.members))
            distances, slopes = self.derivatives(
                images.detach(), labels.flatten(0, 1), repeated(self.observed, candidates)
            )
            penalties = self._penalty(leaf)
            total = (images * slopes).sum() + penalties.sum()
        (derivatives,) = torch.autograd.grad(total, leaf)
        losses = distances.view_as(penalties) + penalties.detach()
        return Evaluation(losses, derivatives=derivatives)

    def _penalty(self, latents: torch.Tensor) -> torch.Tensor:
        """The penalty (t, n) of latents (t, n, k x d)."""
        return self._penalties(latents.unflatten(2, (-1, self.prior.size))).mean(2)

    def _penalties(self, latents: torch.Tensor) -> torch.Tensor:
        """The penalties (t, ...) of single latents (t, ..., d), each a share of the whole one."""
        weights = self.prior_weight.reshape(-1, *[1] * (latents.ndim - 2))
        explained = self.members * weights * latents.square().sum(-1)
        return penalty(latents, self.regularizer) + explained


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
