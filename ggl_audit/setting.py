"""Everything that an audit works on, loaded and checked against each other."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ggl_audit.attack.labels import infer_labels
from ggl_audit.attack.matching import Matching
from ggl_audit.defenses import Check, Context, Pipeline, build_pipeline
from ggl_audit.environment import choose_device
from ggl_audit.errors import SpecError
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.fidelity import Perceptual, load_lpips
from ggl_audit.evidence.identification import Trials, captured_trial, draw_trials
from ggl_audit.files import sha256
from ggl_audit.gradient import Gradient, stack
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.images import ImageSet, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel, load_model
from ggl_audit.optimizers import Optimizer, optimizer_factory
from ggl_audit.priors.card import CARD_NAME, WEIGHTS_NAME
from ggl_audit.priors.loading import load_prior, prior_folder
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import Spec


@dataclass(frozen=True)
class Setting:
    """What was handed in, ready for use.

    Attributes:
        spec: what was declared.
        model: the client's model.
        defense: the declared steps.
        prior: the generator to search.
        reference: public images for candidates and canaries.
        observed: the captured gradient as the attacker sees it, defended.
        checks: the capture against each declared step.
        label: of the captured image, inferred or declared.
        truth: (channels, height, width), or None where the auditor does not hold it.
        make_optimizer: from a seed to a fresh optimizer.
        lpips: the perceptual metric, or None.
        files: the files that were read, as the spec names them, with their SHA-256.
    """

    spec: Spec
    model: ClientModel
    defense: Pipeline
    prior: Prior
    reference: ImageSet
    observed: Gradient
    checks: list[Check]
    label: int
    truth: torch.Tensor | None
    make_optimizer: Callable[[int], Optimizer]
    lpips: Perceptual | None
    files: list[tuple[str, str]]

    def random(self, purpose: str) -> np.random.Generator:
        """A stream of randomness for one purpose, decided by the spec's seed alone."""
        return stream(self.spec.seed, purpose)

    def client(self, purpose: str) -> Context:
        """A client's randomness for one purpose, on the model's device."""
        return client_context(self.spec.seed, purpose, self.model.device)

    def trials(self) -> Trials:
        """The canaries of the ceiling; those of the floor are the first of them."""
        evidence = self.spec.evidence
        most = max(evidence.matching_trials, evidence.reconstruction_trials)
        return draw_trials(self.reference, most, evidence.candidates, self.random("trials"))

    def captured_trial(self) -> Trials | None:
        """The truth among candidates of its class; None where it or they are lacking."""
        if self.truth is None:
            return None
        wanted = self.spec.evidence.candidates
        random = self.random("captured candidates")
        return captured_trial(self.truth, self.label, self.reference, wanted, random)

    def labels_seen(self, observed: Gradient, true_labels: torch.Tensor) -> torch.Tensor:
        """The labels that the attacker assigns to t gradients, in the way of the captured one.

        Args:
            observed: tensors with a leading dimension t.
            true_labels: (t,), what an attacker who is told the label is told.
        """
        if self.spec.capture.labels != "infer":
            return true_labels
        assert self.model.head is not None
        return infer_labels(observed, self.model.head)


def prepare(spec: Spec) -> Setting:
    """Loads and checks all that the spec names.

    Raises:
        AuditError: something is missing, broken, or does not fit the rest.
    """
    device = choose_device(spec.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    defense = build_pipeline(spec.defense)
    model = load_model(spec, device)
    Matching(model, defense).try_out()
    gradient = read_capture(spec.resolve(spec.capture.gradient), model)
    if spec.capture.stage == "raw":
        gradient = defense.apply(gradient, client_context(spec.seed, "captured client", device))
        checks = []
    else:
        checks = defense.verify(gradient)
    reference = read_image_set(
        spec.evidence.reference, spec.folder, ("evidence", "reference"), "reference", model.shape
    ).to(device)
    if reference.classes > model.classes:
        raise SpecError(
            ("evidence", "reference"),
            f"{reference.source} has the label {reference.classes - 1}; the model has "
            f"{model.classes} classes, 0 to {model.classes - 1}",
        )
    prior = load_prior(spec, model)
    lpips = spec.evidence.lpips
    truth = spec.evidence.truth
    private = None if truth is None else read_image(spec.resolve(truth), model.shape).to(device)
    if private is not None and defense.noise_is_last():
        checks.append(check_truth(Matching(model, defense), defense, gradient, private))
    return Setting(
        spec=spec,
        model=model,
        defense=defense,
        prior=prior,
        reference=reference,
        observed=gradient,
        checks=checks,
        label=_label(spec, model, gradient),
        truth=private,
        make_optimizer=optimizer_factory(spec.attack, prior.size),
        lpips=None if lpips is None else load_lpips(lpips, spec.resolve(lpips.weights), device),
        files=_files(spec, reference),
    )


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of randomness, independent for every seed and purpose."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def client_context(seed: int, purpose: str, device: torch.device) -> Context:
    """A client's randomness, independent for every seed and purpose."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(stream(seed, purpose).integers(2**63)))
    return Context(generator)


def _label(spec: Spec, model: ClientModel, observed: Gradient) -> int:
    if spec.capture.labels != "infer":
        label = spec.capture.labels[0]
        if label >= model.classes:
            raise SpecError(
                ("capture", "labels", 0),
                f"{label}; the model has {model.classes} classes, 0 to {model.classes - 1}",
            )
        return label
    if model.head is None:
        raise SpecError(
            ("capture", "labels"),
            "the model does not end in a trained linear layer, so the label cannot be inferred",
            "Declare it: labels: [3].",
        )
    return int(infer_labels(stack([observed]), model.head))


def _files(spec: Spec, reference: ImageSet) -> list[tuple[str, str]]:
    named = [
        spec.capture.gradient,
        spec.model.weights,
        spec.prior.weights,
        spec.evidence.truth,
        spec.evidence.lpips.weights if spec.evidence.lpips else None,
        *(_factory_file(factory) for factory in (spec.model.factory, spec.prior.factory)),
    ]
    hashed = [(str(path), sha256([spec.resolve(path)])) for path in named if path is not None]
    folder = prior_folder(spec.prior, spec.folder)
    if folder is not None:
        shown = spec.prior.trained or Path("gan_weights") / folder.name
        hashed += [(str(shown / n), sha256([folder / n])) for n in (WEIGHTS_NAME, CARD_NAME)]
    source = spec.evidence.reference.npz or spec.evidence.reference.folder
    return hashed if source is None else [*hashed, (str(source), sha256(reference.files))]


def _factory_file(factory: str | None) -> Path | None:
    source = (factory or "").rpartition(":")[0]
    return Path(source) if source.endswith(".py") else None
