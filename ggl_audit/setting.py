"""Everything that an audit works on, loaded and checked against each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ggl_audit.attack.labels import infer_labels, infer_several
from ggl_audit.attack.matching import Matching
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.defenses import (
    Check,
    Context,
    Pipeline,
)
from ggl_audit.defenses.sec_adam import last_gradient
from ggl_audit.doubts import client_doubts, replica_doubts
from ggl_audit.environment import choose_device
from ggl_audit.errors import NothingToMeasureError, SpecError
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.fidelity import Perceptual, load_lpips
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.evidence.identification import Trials, captured_trial, draw_trials
from ggl_audit.files import sha256
from ggl_audit.gradient import Gradient, each, norm, stack, unstack
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.factories import find_callable
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel
from ggl_audit.loading import load_client
from ggl_audit.optimizers import Optimizer, optimizer_factory
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME
from ggl_audit.priors.loading import load_prior, prior_folder, sample_images
from ggl_audit.priors.prior import Prior
from ggl_audit.randomness import client_context, stream
from ggl_audit.spec import Spec

SAMPLED_CLASSES = 10
PUBLIC_IMAGES = 256
NORMS_COMPARED = 8


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
        labels: of the images that the capture is made of, inferred or declared.
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
    labels: list[int]
    truth: torch.Tensor | None
    prior_saw_truth: bool
    make_optimizer: Callable[[int], Optimizer]
    lpips: Perceptual | None
    files: list[tuple[str, str]]

    def random(self, purpose: str) -> np.random.Generator:
        """A stream of randomness for one purpose, decided by the spec's seed alone."""
        return stream(self.spec.seed, purpose)

    @property
    def members(self) -> int:
        """How many images a release is made of, those of all clients together."""
        return self.spec.capture.batch_size * self.defense.aggregation.clients

    @property
    def has_likelihood(self) -> bool:
        """Whether candidate matching is by the likelihood of the capture."""
        local, batch_size = self.model.local, self.model.batch_size
        knows_order = local is None or local.order == "fixed" or batch_size == 1
        return knows_order and self.defense.has_likelihood()

    @functools.cached_property
    def usual_norm(self) -> float:
        """The median norm of what a client computes from reference images, undefended."""
        images, labels = self.reference.sets(NORMS_COMPARED, self.model.batch_size)
        gradients = Matching(self.model, self.defense).gradients(images, labels)
        norms = [float(norm(gradient)) for gradient in unstack(gradients)]
        return float(np.median(norms))

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
        random = self.random("trials")
        return draw_trials(
            self.reference, most, evidence.candidates, random, companions=self.members - 1
        )

    def captured_trial(self) -> Trials | None:
        """The truth among candidates of its class; None where it or they are lacking.

        Nor is there one for a release of more images, as nobody says which class is the truth's.
        """
        if self.truth is None or self.members > 1:
            return None
        wanted = self.spec.evidence.candidates
        random = self.random("captured candidates")
        return captured_trial(self.truth, self.labels[0], self.reference, wanted, random)

    def labels_seen(self, observed: Gradient, true_labels: torch.Tensor) -> torch.Tensor:
        """The labels that the attacker assigns to t gradients, in the way of the captured one.

        Args:
            observed: tensors with a leading dimension t.
            true_labels: (t,) or (t, k), what an attacker who is told the labels is told.
        """
        return true_labels if self.spec.capture.labels != "infer" else self.infer(observed)

    def infer(self, observed: Gradient) -> torch.Tensor:
        """The labels that t gradients give away, (t,) or (t, k).

        Args:
            observed: tensors with a leading dimension t.
        """
        return _infer(self.model, observed, self.members, self.reference)


def prepare(spec: Spec) -> Setting:
    """Loads and checks all that the spec names.

    Raises:
        AuditError: something is missing, broken, or does not fit the rest.
    """
    device = choose_device(spec.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    capture = spec.capture
    defense, model = load_client(spec, device)
    Matching(model, defense).try_out()
    gradient = _captured(spec, model, defense)
    if capture.stage == "raw":
        context = client_context(spec.seed, "captured client", device)
        gradient = defense.apply(gradient, context)
        checks = []
    else:
        checks = defense.verify(gradient)
    if spec.evidence.distance == "representation" and model.head is None:
        raise SpecError(
            ("evidence", "distance"),
            "representation, but the model does not end in a trained linear layer that takes one",
            "Declare pixels, or lpips with its weights.",
        )
    prior = load_prior(spec, model)
    lpips = spec.evidence.lpips
    truth = spec.evidence.truth
    private = None if truth is None else read_image(spec.resolve(truth), model.shape).to(device)
    mark = frozenset() if private is None else frozenset(fingerprints(private[None]))
    seen = prior.seen or frozenset()
    public = _reference(spec, model, prior)
    left_out = len(public) - len(public.without(seen))
    reference = public.without(seen | mark)
    if len(reference) == 0:
        raise SpecError(
            ("evidence", "reference"),
            f"{public.source} holds only images that {prior.source} was trained on",
            "On these the prior does better than on private images. Give others.",
        )
    guarantee = _guarantee(spec, model, defense)
    members = capture.batch_size * defense.aggregation.clients
    if private is not None and members == 1 and defense.leaves_only_noise():
        matching = Matching(model, defense)
        checks.append(check_truth(matching, defense, gradient, private, reference.images))
    client = _client(spec, model, defense, reference)
    return Setting(
        spec=spec,
        model=model,
        defense=defense,
        client=client,
        client_doubts=[
            *client_doubts(client, spec, defense, reference),
            *replica_doubts(model, defense, spec, reference),
        ],
        guarantee=guarantee,
        prior=prior,
        reference=reference,
        left_out=left_out,
        observed=gradient,
        checks=checks,
        labels=labels_of(spec, model, gradient, members, reference),
        truth=private,
        prior_saw_truth=bool(mark & seen),
        make_optimizer=optimizer_factory(spec.attack, members * prior.size),
        lpips=None if lpips is None else load_lpips(lpips, spec.resolve(lpips.weights), device),
        files=_files(spec, reference),
    )


def _captured(spec: Spec, model: ClientModel, defense: Pipeline) -> Gradient:
    """Reads the capture; Adam's moments are taken apart into the gradient that they hold.

    Raises:
        AuditError: it cannot be read, or is a ciphertext.
    """
    capture = spec.capture
    holder = defense.ciphertext_of()
    if holder is not None:
        raise NothingToMeasureError(
            ("defense",),
            f"the capture is a ciphertext and {holder} holds the key: without it there is nothing "
            "to measure, which is not the same as safe",
            f"Audit what {holder} sees: view: key_holder, with the decrypted gradient.",
        )
    gradient = read_capture(spec.resolve(capture.gradient), model)
    if capture.kind != "moments":
        return gradient
    before = each(torch.zeros_like, gradient)
    if capture.previous is not None:
        before = read_capture(spec.resolve(capture.previous), model)
    return last_gradient(gradient, before, capture.beta1)


def _reference(spec: Spec, model: ClientModel, prior: Prior) -> ImageSet:
    evidence = spec.evidence
    if evidence.reference is None:
        others = np.linspace(0, model.classes - 1, min(SAMPLED_CLASSES, model.classes)).round()
        declared = [] if spec.capture.labels == "infer" else spec.capture.labels
        classes = sorted({*declared, *map(int, others)})
        trials = max(evidence.matching_trials, evidence.reconstruction_trials)
        many = max(2 * evidence.candidates, -(-trials // len(classes)))
        labels = torch.tensor(classes, device=model.device).repeat_interleave(many)
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
        return DeclaredClient(matching, defense, reference)
    if defense.aggregation.clients > 1 or spec.capture.kind == "update":
        raise SpecError(
            ("client",), "a cohort or an update is not made by one step of the client's own code"
        )
    if spec.capture.batch_size > 1 and spec.client.batch_size not in (1, spec.capture.batch_size):
        raise SpecError(
            ("client", "batch_size"),
            f"{spec.client.batch_size}, but the capture is of {spec.capture.batch_size} images",
        )
    step = find_callable(spec.client.step, spec.folder, ("client", "step"))
    several = spec.capture.batch_size > 1
    client = OwnClient(
        step=functools.partial(step, **spec.client.kwargs),
        matching=matching,
        defense=defense,
        companions=reference,
        batch_size=spec.capture.batch_size if several else spec.client.batch_size,
        averaged=not model.loss_sum
        if several
        else spec.guarantee is not None and spec.guarantee.reduction == "mean",
    )
    if not several and client.batch_size > 1 and not defense.leaves_only_noise():
        raise SpecError(
            ("client", "batch_size"),
            f"{client.batch_size}, but {defense} ends in a step after the noise, and what the "
            "companions add cannot be taken out again",
        )
    return client


def _guarantee(spec: Spec, model: ClientModel, defense: Pipeline) -> Guarantee | None:
    declared = spec.guarantee
    if declared is None:
        return None
    mechanism = defense.guarantee(declared.unit)
    if mechanism is None:
        raise SpecError(
            ("guarantee",),
            f"declared, but the defense ({defense}) is not differentially private for one "
            f"{declared.unit}",
            f"That takes a clip of each {declared.unit}'s share and Gaussian noise after it.",
        )
    capture = spec.capture
    if defense.aggregation.clients > 1 and declared.reduction != "mean":
        raise SpecError(
            ("guarantee", "reduction"), f"{declared.reduction}, but a cohort's mean is what is seen"
        )
    if capture.batch_size > 1 and declared.reduction != spec.model.loss.reduction:
        raise SpecError(
            ("guarantee", "reduction"),
            f"{declared.reduction}, but model.loss.reduction is {spec.model.loss.reduction}",
        )
    # The mechanism's bound is on a share in the captured release; a step of the client's own code
    # may have more images.
    alone = spec.client is None or capture.batch_size > 1
    batch_size = 1 if alone or spec.client is None else spec.client.batch_size
    return account(mechanism, declared, batch_size, 1 / spec.evidence.candidates)


def labels_of(
    spec: Spec, model: ClientModel, observed: Gradient, members: int, reference: ImageSet
) -> list[int]:
    """The labels of the captured images, as declared or as the capture gives them away.

    Raises:
        SpecError: they cannot be inferred, are not of the model, or are too few or too many.
    """
    declared = spec.capture.labels
    if declared == "infer":
        if model.head is None:
            raise SpecError(
                ("capture", "labels"),
                "the model does not end in a trained linear layer, so the label cannot be inferred",
                "Declare it: labels: [3].",
            )
        return _infer(model, stack([observed]), members, reference).flatten().tolist()
    for index, label in enumerate(declared):
        if label >= model.classes:
            raise SpecError(
                ("capture", "labels", index),
                f"{label}; the model has {model.classes} classes, 0 to {model.classes - 1}",
            )
    if len(declared) != members:
        raise SpecError(
            ("capture", "labels"),
            f"labels has {len(declared)} entries; the capture is made of {members} images",
        )
    return declared


def _infer(
    model: ClientModel, observed: Gradient, members: int, reference: ImageSet
) -> torch.Tensor:
    assert model.head is not None
    if members == 1:
        return infer_labels(observed, model.head)
    with torch.no_grad():
        spread = torch.linspace(0, len(reference) - 1, min(PUBLIC_IMAGES, len(reference)))
        logits = model.logits(model.parameters, reference.images[spread.long().to(model.device)])
    return infer_several(observed, model.head, logits.softmax(1).mean(0), members)


def _files(spec: Spec, reference: ImageSet) -> list[tuple[str, str]]:
    named = [
        spec.capture.gradient,
        spec.capture.previous,
        spec.model.weights,
        spec.prior.weights,
        spec.evidence.truth,
        spec.evidence.lpips.weights if spec.evidence.lpips else None,
        *(_factory_file(factory) for factory in (spec.model.factory, spec.prior.factory)),
        _factory_file(spec.client.step) if spec.client else None,
        *(_factory_file(step.factory) for step in spec.defense),
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
