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
from torch.func import vmap

from ggl_audit.attack.labels import infer_labels, infer_several
from ggl_audit.attack.matching import Matching
from ggl_audit.clients import Client, DeclaredClient, OwnClient
from ggl_audit.defenses import (
    DPSGD,
    Check,
    Context,
    Pipeline,
    build_pipeline,
    is_own,
    relative_l2,
)
from ggl_audit.defenses.sec_adam import last_gradient
from ggl_audit.environment import choose_device
from ggl_audit.errors import NothingToMeasureError, SpecError
from ggl_audit.evidence.consistency import check_remainder, check_truth
from ggl_audit.evidence.fidelity import Perceptual, load_lpips
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.evidence.identification import Trials, captured_trial, draw_trials
from ggl_audit.files import sha256
from ggl_audit.gradient import Gradient, each, norm, stack, take, unstack
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.factories import find_callable
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel, has_batch_norm, load_model
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
PUBLIC_IMAGES = 256
REPLICA_IS_CLOSE = 0.05
MANY = 16
NORMS_COMPARED = 8
CLIENT_TRIALS = 3


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
        images, labels = _sets(self.reference, self.model.batch_size, NORMS_COMPARED)
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
    if private is not None and members == 1 and defense.noise_is_last():
        matching = Matching(model, defense)
        checks.append(check_truth(matching, defense, gradient, private, reference.images))
    client = _client(spec, model, defense, reference)
    return Setting(
        spec=spec,
        model=model,
        defense=defense,
        client=client,
        client_doubts=[
            *_client_doubts(client, spec, defense, reference),
            *_replica_doubts(model, defense, spec, reference),
        ],
        guarantee=guarantee,
        prior=prior,
        reference=reference,
        left_out=left_out,
        observed=gradient,
        checks=checks,
        labels=_labels(spec, model, gradient, members, reference),
        truth=private,
        prior_saw_truth=bool(mark & seen),
        make_optimizer=optimizer_factory(spec.attack, members * prior.size),
        lpips=None if lpips is None else load_lpips(lpips, spec.resolve(lpips.weights), device),
        files=_files(spec, reference),
    )


def alternatives(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What else the capture may be of: one declared thing changed at a time, named."""
    spec = setting.spec
    declared = spec.model

    def other_model(cause: str, **changes: Any) -> Iterator[tuple[str, Setting]]:
        changed = spec.model_copy(update={"model": declared.model_copy(update=changes)})
        try:
            defense, model = load_client(changed, setting.model.device)
            Matching(model, defense).try_out()
        except SpecError:
            return  # as it cannot be so
        yield cause, replace(setting, model=model, defense=defense)

    if has_batch_norm(setting.model.module):
        mode = "train" if declared.mode == "eval" else "eval"
        yield from other_model(f"the model was in {mode} mode", mode=mode)
    for mean, std in USUAL_NORMALIZATIONS.get(declared.input.shape[0], ()):
        if (mean, std) != (declared.input.mean, declared.input.std):
            changed = declared.input.model_copy(update={"mean": mean, "std": std})
            cause = f"the images were normalized with mean {mean} and std {std}"
            yield from other_model(cause, input=changed)
    if spec.capture.kind == "update":
        negative = {name: -tensor for name, tensor in setting.observed.items()}
        cause = "the update is the weights after training minus those before"
        labels = _labels(spec, setting.model, negative, setting.members, setting.reference)
        yield cause, replace(setting, observed=negative, labels=labels)
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


def load_client(
    spec: Spec, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Pipeline, ClientModel]:
    """Builds the declared defense and the client's model under it.

    Raises:
        AuditError: one of them cannot be built, or they do not fit each other.
    """
    samples = spec.capture.batch_size if spec.model.loss.reduction == "mean" else 1
    if any(step.name == DPSGD.name for step in spec.defense):
        _check_dp_sgd(spec)
    defense = build_pipeline(spec.defense, spec.folder, samples)

    def misfit(error: ValueError) -> SpecError:
        return SpecError(("defense",), f"{defense}: {error}")

    def wrap(module: nn.Module) -> nn.Module:
        try:
            return defense.wrap(module)
        except ValueError as error:
            raise misfit(error) from None

    model = load_model(spec, device, dtype, wrap)
    try:
        defense = defense.bind(model)
    except ValueError as error:
        raise misfit(error) from None
    _try_own_steps(defense, model, spec)
    if spec.capture.stage == "raw" and not defense.acts_on_a_gradient():
        raise SpecError(
            ("capture", "stage"),
            f"raw, but {defense} acts on images, on the model, on each sample or on a cohort, and "
            "cannot be applied to one gradient afterwards",
            "Declare stage: defended, or make the capture with `ggl-audit capture`.",
        )
    return defense, model


def _check_dp_sgd(spec: Spec) -> None:
    if spec.capture.kind == "update":
        raise SpecError(
            ("defense",),
            "dp_sgd adds noise in every local step, which an update is not audited for",
            "Audit one step's gradient, or declare what is done to the update (dp_fedavg).",
        )
    if spec.client is not None and spec.client.batch_size > 1 and spec.capture.batch_size == 1:
        raise SpecError(
            ("client", "batch_size"),
            f"{spec.client.batch_size}, but dp_sgd divides its noise by capture.batch_size, 1",
            "Declare the clip and the noise as separate steps, or capture a batch.",
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
    if not several and client.batch_size > 1 and not defense.noise_is_last():
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
    context = client_context(spec.seed, "client trial", client.matching.model.device)
    if spec.capture.batch_size > 1:
        return _batch_doubts(client, defense, reference, context)
    images, labels = reference.images[:CLIENT_TRIALS], reference.labels[:CLIENT_TRIALS]
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


def _batch_doubts(
    client: OwnClient, defense: Pipeline, reference: ImageSet, context: Context
) -> list[str]:
    if not defense.noise_is_last():
        return [f"whether the client's own code does {defense} to a batch cannot be checked"]
    images, labels = _sets(reference, client.batch_size)
    sent = client.send(images, labels, context)
    replicas = client.matching.replicas(images, labels, sent)
    for index in range(CLIENT_TRIALS):
        check = check_remainder(defense, take(replicas, index), take(sent, index))
        if check.outcome == "contradicts":
            return [f"the client's own code contradicts {check.step}: {check.detail}"]
    return []


def _sets(
    reference: ImageSet, size: int, sets: int = CLIENT_TRIALS
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few sets of so many images, (sets, size, channels, height, width), and their labels."""
    wanted = sets * size
    chosen = torch.arange(wanted, device=reference.labels.device) % len(reference)
    images, labels = reference.images[chosen], reference.labels[chosen]
    return images.unflatten(0, (sets, size)), labels.unflatten(0, (sets, size))


def _replica_doubts(
    model: ClientModel, defense: Pipeline, spec: Spec, reference: ImageSet
) -> list[str]:
    """Tries whether the replica gives what the client sends, but for the declared noise.

    It guards against a user's own step that is random without saying so, or is replicated badly.
    """
    own = [step for step in defense.steps if is_own(step)]
    if any(step.stochastic for step in own):
        return [f"the likelihood of {own[0]} is taken on trust"]
    without = defense.noiseless()
    if not without.steps or not without.has_likelihood() or without.adds_noise():
        return []
    matching = Matching(model, without)
    members = model.batch_size * defense.aggregation.clients
    images, labels = _sets(reference, members, CLIENT_TRIALS if members <= MANY else 1)
    context = client_context(spec.seed, "replica trial", model.device)
    sent = DeclaredClient(matching, without, reference).send(images, labels, context)
    replicas = matching.replicas(images, labels, sent)
    for index in range(len(labels)):
        observed = take(sent, index)
        away = float(relative_l2(take(replicas, index), observed))
        if bool(norm(observed) > 0) and not away <= REPLICA_IS_CLOSE:
            return [
                f"the attacker's replica of {without} does not give what the client sends "
                f"(relative distance {away:.2g}), so better matching may identify more"
            ]
    return []


def _try_own_steps(defense: Pipeline, model: ClientModel, spec: Spec) -> None:
    """Runs a user's own steps once.

    Raises:
        SpecError: one fails, or changes the names or the shapes of a gradient.
    """
    context = client_context(spec.seed, "own steps", model.device)
    for index, step in enumerate(defense.steps):
        if not is_own(step) or step.earlier_rounds:
            continue
        gradient = each(torch.ones_like, model.parameters)
        try:
            sent = step.apply(gradient, context)
            many = each(lambda tensor: tensor[None], gradient)
            replica = take(vmap(step.replicate, in_dims=(0, None))(many, sent), 0)
            fits = all(
                {n: t.shape for n, t in other.items()} == {n: t.shape for n, t in gradient.items()}
                for other in (sent, replica)
            )
        except (Exception, SystemExit) as error:
            # Whatever the user's own code raises is a fault in the input.
            raise SpecError(
                ("defense", index), f"{step.name} failed with {type(error).__name__}: {error}"
            ) from error
        if not fits:
            raise SpecError(
                ("defense", index),
                f"{step.name} does not keep the names and the shapes of a gradient",
            )


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


def _labels(
    spec: Spec, model: ClientModel, observed: Gradient, members: int, reference: ImageSet
) -> list[int]:
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
