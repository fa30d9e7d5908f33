"""Gradient matching: how well candidate images explain an observed gradient, in batches.

Li et al., CVPR 2022, equation 3: the distance between the observed gradient and the attacker's
replica of the defense on the candidate's gradient. Distances are relative to the observed norm, so
that a trained model's small gradients are compared as those of a fresh one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.func import grad, vmap

from ggl_audit.defenses import Pipeline, relative_l2
from ggl_audit.errors import SpecError
from ggl_audit.gradient import Gradient, concatenate, norm
from ggl_audit.inputs.model import ClientModel
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import RegularizerSpec

Distance = Literal["likelihood", "l2", "cosine"]

BATCH_BYTES = 64 * 2**20
"""Gradients held at a time; a larger batch is taken in chunks."""

COPIES_OF_A_GRADIENT = 4
"""The gradient, its replica, the difference and its square, while a chunk is worked on."""


def cosine(replica: Gradient, observed: Gradient) -> torch.Tensor:
    """One minus the cosine between the two, a scalar in [0, 2]."""
    inner = torch.stack([(replica[name] * observed[name]).sum() for name in observed]).sum()
    return 1 - inner / (norm(replica) * norm(observed)).clamp(min=1e-30)


class Matching:
    """Compares candidate images with observed gradients.

    Args:
        model: the client's model.
        defense: the declared defense, replicated on each candidate's gradient.
        distance: ``likelihood``, the best statistic under the declared noise
            (:meth:`Pipeline.mismatch`); or ``l2`` or ``cosine``, between replica and capture.
    """

    def __init__(
        self, model: ClientModel, defense: Pipeline, distance: Distance = "likelihood"
    ) -> None:
        self.model = model
        self._defense = defense
        self._gradients = vmap(grad(model.loss), in_dims=(None, 0, 0))
        measure = relative_l2 if distance == "l2" else cosine

        def compare(gradient: Gradient, observed: Gradient) -> torch.Tensor:
            if distance == "likelihood":
                return defense.mismatch(gradient, observed)
            return measure(defense.replicate(gradient, observed), observed)

        # The inner map runs over the candidates of one observation, the outer over observations.
        self._distances = vmap(vmap(compare, in_dims=(0, None)))
        bytes_each = COPIES_OF_A_GRADIENT * 4 * model.size
        self._chunk = max(1, BATCH_BYTES // bytes_each)

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
        """The undefended gradients of single images.

        Args:
            images: (n, channels, height, width) in [0, 1].
            labels: (n,).

        Returns:
            Tensors with a leading dimension n, in the model's order.
        """
        parts: list[Gradient] = []
        for part, part_labels in zip(
            images.split(self._chunk), labels.split(self._chunk), strict=True
        ):
            with torch.no_grad():
                parts.append(self._gradients(self.model.parameters, part, part_labels))
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def distances(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> torch.Tensor:
        """The distances of n candidates to each of t observed gradients, every one its own n.

        Args:
            images: (t, n, channels, height, width) in [0, 1].
            labels: (t, n).
            observed: tensors with a leading dimension t.

        Returns:
            (t, n).
        """
        trials, candidates = labels.shape
        if candidates > self._chunk:
            parts = [
                self.distances(
                    images[:, i : i + self._chunk], labels[:, i : i + self._chunk], observed
                )
                for i in range(0, candidates, self._chunk)
            ]
            return torch.cat(parts, dim=1)
        together = max(1, self._chunk // candidates)
        distances = []
        for start in range(0, trials, together):
            part = slice(start, start + together)
            gradients = self.gradients(images[part].flatten(0, 1), labels[part].flatten())
            grouped = {n: g.unflatten(0, (-1, candidates)) for n, g in gradients.items()}
            with torch.no_grad():
                distances.append(
                    self._distances(grouped, {n: g[part] for n, g in observed.items()})
                )
        return torch.cat(distances)

    def agreement(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> torch.Tensor:
        """How well the replica of one image's gradient agrees with each of t observed ones.

        Args:
            images: (t, channels, height, width) in [0, 1].
            labels: (t,).
            observed: k - 1 tensors with a leading dimension t.

        Returns:
            (t, k), the cosine for each tensor in the model's order, and for the whole gradient.
        """
        gradients = self.gradients(images, labels)
        with torch.no_grad():
            replicas = vmap(self._defense.replicate)(gradients, observed)
        inner = [(replicas[name] * observed[name]).flatten(1).sum(1) for name in observed]
        squares = [
            [tensor[name].flatten(1).square().sum(1) for name in observed]
            for tensor in (replicas, observed)
        ]
        products = torch.stack([*inner, torch.stack(inner).sum(0)], dim=1)
        lengths = [torch.stack([*s, torch.stack(s).sum(0)], dim=1).sqrt() for s in squares]
        return products / (lengths[0] * lengths[1]).clamp(min=1e-30)

    def try_out(self) -> None:
        """Evaluates two candidates, to find out whether the model can be mapped over.

        Raises:
            SpecError: it cannot.
        """
        image = torch.rand(2, *self.model.shape, device=self.model.device)
        labels = torch.zeros(2, dtype=torch.long, device=self.model.device)
        try:
            self.gradients(image, labels)
        except (Exception, SystemExit) as error:
            # The forward pass is the user's own code.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SpecError(
                ("model", "factory"),
                f"the model cannot be evaluated for many candidates at a time ({reason})",
                "torch.func.vmap needs a forward pass without data-dependent branches, random "
                "draws, or buffers that it changes.",
            ) from None


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
        labels: (t,), the label that the attacker assigns to each.
        regularizer: the penalty on latents.
    """

    matching: Matching
    prior: Prior
    observed: Gradient
    labels: torch.Tensor
    regularizer: RegularizerSpec

    def losses(self, latents: torch.Tensor) -> torch.Tensor:
        """The losses of n latents for each of t observed gradients.

        Args:
            latents: (t, n, d), standard normal coordinates.

        Returns:
            (t, n).
        """
        trials, candidates, _ = latents.shape
        labels = self.labels[:, None].expand(trials, candidates)
        with torch.no_grad():
            images = self.prior.decode(latents.flatten(0, 1), labels.flatten())
        distances = self.matching.distances(
            images.unflatten(0, (trials, candidates)), labels, self.observed
        )
        return distances + penalty(latents, self.regularizer)
