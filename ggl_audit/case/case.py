"""What an audit works on: all that is loaded once, and the captures that are observed over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from ggl_audit.attack.matching import Distance, Matching
from ggl_audit.basics.gradient import Gradient
from ggl_audit.basics.randomness import stream
from ggl_audit.case.capture import Capture
from ggl_audit.client.clients import Client
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.client.randomness import client_contexts
from ggl_audit.defenses import Context, Pipeline
from ggl_audit.evidence.fidelity import Perceptual, candidate_distances
from ggl_audit.evidence.guarantee import Guarantee
from ggl_audit.evidence.identification import Trials, draw_trials
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Said
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import Spec

USUAL_GRADIENTS = 8


@dataclass(frozen=True)
class Case:
    """What was handed in, loaded once and checked.

    Attributes:
        spec: what was declared.
        model: the client's model.
        defense: the declared steps.
        client: what canaries' gradients are made by.
        guarantee: what the declared defense promises; None where nothing is, or not enough is said.
        prior: the generator to search.
        reference: public images for candidates and canaries.
        left_out: how many reference images are not used, as the prior was trained on them.
        lpips: the perceptual metric, or why there is none.
        captures: the observations; the first is the one that is audited, the others are further
            captures of the round, which are only checked and attacked.
        doubts: why canaries' gradients may not stand for what the client of a capture sends.
        files: the files that were read, as the spec names them, with their SHA-256.
        remarks: what there is to say of how it was loaded, in sentences.
    """

    spec: Spec
    model: ClientModel
    defense: Pipeline
    client: Client
    guarantee: Guarantee | None
    prior: Prior
    reference: ImageSet
    left_out: int
    lpips: Perceptual | str
    captures: tuple[Capture, ...]
    doubts: list[Said]
    files: list[tuple[str, str]]
    remarks: list[str] = field(default_factory=list)

    @property
    def audited(self) -> Capture:
        """The capture that the verdict is on."""
        return self.captures[0]

    @property
    def members(self) -> int:
        """How many images a release is made of, those of all clients together."""
        return self.model.batch_size * self.defense.aggregation.clients

    @functools.cached_property
    def clients(self) -> ClientGradients:
        """What clients compute, within the memory; whoever holds gradients asks it for room."""
        return ClientGradients(self.model, self.defense, self.spec.memory_bytes)

    def matching(
        self, defense: Pipeline | None = None, distance: Distance = "likelihood"
    ) -> Matching:
        """Compares candidates within the memory, under the declared defense or another one."""
        replicated = self.defense if defense is None else defense
        return Matching(self.model, replicated, distance, self.spec.memory_bytes)

    @functools.cached_property
    def usual(self) -> Gradient:
        """What a client computes from reference images, undefended; a leading dimension n."""
        images, labels = self.reference.sets(USUAL_GRADIENTS, self.model.batch_size)
        return self.clients.gradients(images, labels)

    @functools.cached_property
    def trials(self) -> Trials:
        """The canaries of the ceiling; those of the floor are the first of them."""
        evidence = self.spec.evidence
        most = max(evidence.matching_trials, evidence.reconstruction_trials)
        random = self.random("trials")
        return draw_trials(
            self.reference, most, evidence.candidates, random, companions=self.members - 1
        )

    @property
    def distances(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """The distances by which a picture can pick a candidate, by name."""
        evidence = self.spec.evidence
        wanted = evidence.lpips is not None or evidence.distance == "lpips"
        lpips = self.lpips if wanted and not isinstance(self.lpips, str) else None
        return candidate_distances(self.model, lpips)

    def random(self, purpose: str, trial: int | None = None) -> np.random.Generator:
        """A stream of randomness for one purpose or trial of it, decided by the seed alone."""
        return stream(self.spec.seed, purpose, trial)

    def lots(self, purpose: str, trials: Iterable[int]) -> list[float]:
        """By which ties are broken in each of several trials."""
        return [float(self.random(purpose, trial).random()) for trial in trials]

    def contexts(self, purpose: str, trials: Iterable[int]) -> list[Context]:
        """A client's randomness in each of several trials, on the model's device."""
        return client_contexts(self.spec.seed, purpose, self.model.device, trials)
