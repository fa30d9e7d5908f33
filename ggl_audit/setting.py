"""Everything that an audit works on, loaded and checked against each other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ggl_audit.attack.labels import infer_labels
from ggl_audit.attack.matching import Matching
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.defenses import Check, Context, Pipeline, build_pipeline
from ggl_audit.environment import choose_device
from ggl_audit.errors import SpecError
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.fidelity import Perceptual, load_lpips
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.evidence.identification import Trials, captured_trial, draw_trials
from ggl_audit.files import sha256
from ggl_audit.gradient import Gradient, stack, take
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.factories import find_callable
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel, load_model
from ggl_audit.optimizers import Optimizer, optimizer_factory
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME
from ggl_audit.priors.loading import load_prior, prior_folder, sample_images
from ggl_audit.priors.prior import Prior
from ggl_audit.randomness import client_context, stream
from ggl_audit.spec import Spec

SAMPLED_CLASSES = 10
USUAL_NORMALIZATIONS = {
    1: (([0.0], [1.0]), ([0.5], [0.5]), ([0.1307], [0.3081])),
    3: (
        ([0.0], [1.0]),
        ([0.5], [0.5]),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ),
}
MOST_SWAPS = 10
CLIENT_TRIALS = 3
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Setting:
    """What was handed in, ready for use.

    Attributes:
        spec: what was declared.
        model: the client's model.
        defense: the declared steps.
        client: what canaries' gradients are made by.
        client_doubts: why the client's own code may not stand for the client of the capture.
        guarantee: what the declared defense promises; None where nothing is, or not enough is said.
        prior: the generator to search.
        reference: public images for candidates and canaries.
        left_out: how many reference images are not used, as the prior was trained on them.
        observed: the captured gradient as the attacker sees it, defended.
        checks: the capture against each declared step.
        label: of the captured image, inferred or declared.
        truth: (channels, height, width), or None where the auditor does not hold it.
        prior_saw_truth: whether the prior was trained on the truth.
        make_optimizer: from a seed to a fresh optimizer.
        lpips: the perceptual metric, or None.
        files: the files that were read, as the spec names them, with their SHA-256.
    """

    spec: Spec
    model: ClientModel
    defense: Pipeline
    client: Client
    client_doubts: list[str]
    guarantee: Guarantee | None
    prior: Prior
    reference: ImageSet
    left_out: int
    observed: Gradient
    checks: list[Check]
    label: int
    truth: torch.Tensor | None
    prior_saw_truth: bool
    make_optimizer: Callable[[int], Optimizer]
    lpips: Perceptual | None
    files: list[tuple[str, str]]

    def random(self, purpose: str) -> np.random.Generator:
        """A stream of randomness for one purpose, decided by the spec's seed alone."""
        return stream(self.spec.seed, purpose)

    @property
    def distance(self) -> str:
        """The name of the distance by which a picture picks its candidate."""
        return self.spec.evidence.distance

    def context(self, purpose: str) -> Context:
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
    if spec.evidence.distance == "representation" and model.head is None:
        raise SpecError(
            ("evidence", "distance"),
            "representation, but the model does not end in a trained linear layer that takes one",
            "Declare pixels, or lpips with its weights.",
        )
    label = _label(spec, model, gradient)
    prior = load_prior(spec, model)
    lpips = spec.evidence.lpips
    truth = spec.evidence.truth
    private = None if truth is None else read_image(spec.resolve(truth), model.shape).to(device)
    mark = frozenset() if private is None else frozenset(fingerprints(private[None]))
    seen = prior.seen or frozenset()
    public = _reference(spec, model, prior, label)
    left_out = len(public) - len(public.without(seen))
    reference = public.without(seen | mark)
    if len(reference) == 0:
        raise SpecError(
            ("evidence", "reference"),
            f"{public.source} holds only images that {prior.source} was trained on",
            "On these the prior does better than on private images. Give others.",
        )
    guarantee = _guarantee(spec, defense)
    if private is not None and defense.noise_is_last():
        matching = Matching(model, defense)
        checks.append(check_truth(matching, defense, gradient, private, reference.images))
    client = _client(spec, model, defense, reference)
    return Setting(
        spec=spec,
        model=model,
        defense=defense,
        client=client,
        client_doubts=_client_doubts(client, spec, defense, reference),
        guarantee=guarantee,
        prior=prior,
        reference=reference,
        left_out=left_out,
        observed=gradient,
        checks=checks,
        label=label,
        truth=private,
        prior_saw_truth=bool(mark & seen),
        make_optimizer=optimizer_factory(spec.attack, prior.size),
        lpips=None if lpips is None else load_lpips(lpips, spec.resolve(lpips.weights), device),
        files=_files(spec, reference),
    )


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the statistics that a model normalizes with."""
    return any(isinstance(layer, BATCH_NORMS) for layer in module.modules())


def alternatives(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What else the capture may be of: one declared thing changed at a time, named."""
    spec = setting.spec
    declared = spec.model

    def other_model(cause: str, **changes: Any) -> Iterator[tuple[str, Setting]]:
        changed = spec.model_copy(update={"model": declared.model_copy(update=changes)})
        try:
            model = load_model(changed, setting.model.device)
            Matching(model, setting.defense).try_out()
        except SpecError:
            return  # as it cannot be so
        yield cause, replace(setting, model=model)

    if has_batch_norm(setting.model.module):
        mode = "train" if declared.mode == "eval" else "eval"
        yield from other_model(f"the model was in {mode} mode", mode=mode)
    for mean, std in USUAL_NORMALIZATIONS.get(declared.input.shape[0], ()):
        if (mean, std) != (declared.input.mean, declared.input.std):
            changed = declared.input.model_copy(update={"mean": mean, "std": std})
            cause = f"the images were normalized with mean {mean} and std {std}"
            yield from other_model(cause, input=changed)
    same = [
        (first, second)
        for first, second in itertools.combinations(setting.observed, 2)
        if setting.observed[first].shape == setting.observed[second].shape
        and setting.observed[first].ndim > 1
    ]
    for first, second in same[:MOST_SWAPS]:
        swapped = {
            **setting.observed,
            first: setting.observed[second],
            second: setting.observed[first],
        }
        yield f"{first} and {second} are swapped", replace(setting, observed=swapped)


def _reference(spec: Spec, model: ClientModel, prior: Prior, label: int) -> ImageSet:
    evidence = spec.evidence
    if evidence.reference is None:
        others = np.linspace(0, model.classes - 1, min(SAMPLED_CLASSES, model.classes)).round()
        classes = sorted({label, *map(int, others)})
        trials = max(evidence.matching_trials, evidence.reconstruction_trials)
        each = max(2 * evidence.candidates, -(-trials // len(classes)))
        labels = torch.tensor(classes, device=model.device).repeat_interleave(each)
        return sample_images(prior, labels, stream(spec.seed, "prior samples"))
    reference = read_image_set(
        evidence.reference, spec.folder, ("evidence", "reference"), "reference", model.shape
    ).to(model.device)
    if reference.classes > model.classes:
        raise SpecError(
            ("evidence", "reference"),
            f"{reference.source} has the label {reference.classes - 1}; the model has "
            f"{model.classes} classes, 0 to {model.classes - 1}",
        )
    return reference


def _client(spec: Spec, model: ClientModel, defense: Pipeline, reference: ImageSet) -> Client:
    matching = Matching(model, defense)
    if spec.client is None:
        return DeclaredClient(matching, defense)
    step = find_callable(spec.client.step, spec.folder, ("client", "step"))
    client = OwnClient(
        step=functools.partial(step, **spec.client.kwargs),
        matching=matching,
        defense=defense,
        companions=reference,
        batch_size=spec.client.batch_size,
        averaged=spec.guarantee is not None and spec.guarantee.reduction == "mean",
    )
    if client.batch_size > 1 and not defense.noise_is_last():
        raise SpecError(
            ("client", "batch_size"),
            f"{client.batch_size}, but {defense} ends in a step after the noise, and what the "
            "companions add cannot be taken out again",
        )
    return client


def _client_doubts(client: Client, spec: Spec, defense: Pipeline, reference: ImageSet) -> list[str]:
    """Compares what the client's own code sends for a few images with the declaration.

    Raises:
        SpecError: the code does not run or does not return a gradient.
    """
    if not isinstance(client, OwnClient):
        return []
    images, labels = reference.images[:CLIENT_TRIALS], reference.labels[:CLIENT_TRIALS]
    context = client_context(spec.seed, "client trial", client.matching.model.device)
    sent = client.send(images, labels, context)
    if client.averaged and client.batch_size > 1:
        return [
            f"canaries share a mean over {client.batch_size} images with others, which hides them "
            "better than the captured gradient of one image is hidden"
        ]
    for index, image in enumerate(images):
        one = take(sent, index)
        checks = defense.verify(one)
        if defense.noise_is_last():
            checks.append(check_truth(client.matching, defense, one, image, reference.images[1:]))
        wrong = [check for check in checks if check.outcome == "contradicts"]
        if wrong:
            return [f"the client's own code contradicts {wrong[0].step}: {wrong[0].detail}"]
    return []


def _guarantee(spec: Spec, defense: Pipeline) -> Guarantee | None:
    declared = spec.guarantee
    if declared is None:
        return None
    mechanism = defense.guarantee()
    if mechanism is None:
        raise SpecError(
            ("guarantee",),
            f"declared, but the defense ({defense}) is not differentially private",
            "That takes a clip of the whole gradient and Gaussian noise after it.",
        )
    batch_size = spec.capture.batch_size if spec.client is None else spec.client.batch_size
    return account(mechanism, declared, batch_size, 1 / spec.evidence.candidates)


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
        _factory_file(spec.client.step) if spec.client else None,
    ]
    hashed = [(str(path), sha256([spec.resolve(path)])) for path in named if path is not None]
    folder = prior_folder(spec.prior, spec.folder)
    if folder is not None:
        shown = spec.prior.trained or Path("gan_weights") / folder.name
        names = [n for n in (WEIGHTS_NAME, CARD_NAME, SEEN_NAME) if (folder / n).is_file()]
        hashed += [(str(shown / n), sha256([folder / n])) for n in names]
    public = spec.evidence.reference
    source = None if public is None else public.npz or public.folder
    return hashed if source is None else [*hashed, (str(source), sha256(reference.files))]


def _factory_file(factory: str | None) -> Path | None:
    source = (factory or "").rpartition(":")[0]
    return Path(source) if source.endswith(".py") else None
