"""Everything that an audit works on, loaded and checked against each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.labels import (
    usual_head,
)
from ggl_audit.attack.matching import Distance, Matching
from ggl_audit.basics.device import choose_device, settle, usual_memory
from ggl_audit.basics.environment import keep_freed_memory
from ggl_audit.basics.files import sha256
from ggl_audit.basics.gradient import Gradient, each, norm, stack, unstack
from ggl_audit.basics.randomness import stream
from ggl_audit.case.checks import (
    NORMS_COMPARED,
    check_truths,
    look_at_noise,
    look_for_covering_noise,
    observe,
)
from ggl_audit.case.doubts import capture_doubts, client_doubts, label_doubts, replica_doubts
from ggl_audit.case.labels import infer, labels_of
from ggl_audit.case.loading import load_client, observe_statistics
from ggl_audit.client.clients import Client, DeclaredClient, OwnClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.client.randomness import client_contexts
from ggl_audit.defenses import Check, Context, Pipeline, shipped
from ggl_audit.defenses.sec_adam import last_gradient
from ggl_audit.errors import InputError, NothingToMeasureError, SpecError
from ggl_audit.evidence.appearance import appearance, gives_probabilities
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.declared_noise import (
    check_noise,
    check_shared_noise,
)
from ggl_audit.evidence.fidelity import Perceptual, candidate_distances, load_lpips
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.evidence.identification import Trials, captured_trial, draw_trials
from ggl_audit.evidence.last_layer import look_at_last_layer
from ggl_audit.inputs.capture import Capture, read_capture, read_update
from ggl_audit.inputs.factories import find_callable
from ggl_audit.inputs.hub_cache import find_backbone
from ggl_audit.inputs.images import ImageSet, fingerprints, read_image, read_image_set
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.neighbours import imports_of
from ggl_audit.optimizers import start_optimizer
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME
from ggl_audit.priors.loading import load_prior, prior_folder, sample_images
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import DefenseSpec, LpipsSpec, Spec

SAMPLED_CLASSES = 10
SAME_CHANGES = 2
"""In roundings of the file."""

FAR_FROM_IMAGES = (100, -100)
"""Multiples of images, whose probabilities are between 0 and 1 all the same."""


@dataclass(frozen=True)
class Setting:
    """What was handed in, ready for use.

    Attributes:
        spec: what was declared.
        model: the client's model.
        defense: the declared steps.
        client: what canaries' gradients are made by.
        doubts: why canaries' gradients may not stand for what the client of the capture sends.
        guarantee: what the declared defense promises; None where nothing is, or not enough is said.
        prior: the generator to search.
        reference: public images for candidates and canaries.
        left_out: how many reference images are not used, as the prior was trained on them.
        captured: the capture as it was read.
        observed: the captured gradient as the attacker sees it, defended.
        checks: the capture against each declared step.
        labels: of the images that the capture is made of, inferred or declared.
        labels_in_doubt: why inferred ones may be wrong, none or one; part of ``doubts``.
        truths: (k, channels, height, width), the images that the capture is made of, client by
            client; (0, ...) where the auditor does not hold them.
        truth_labels: of these; None where it is not known which label belongs to which image.
        prior_saw_truth: whether the prior was trained on any of them.
        lpips: the perceptual metric, or why there is none.
        others: the same for further captures of the round, which are only checked and attacked.
        files: the files that were read, as the spec names them, with their SHA-256.
    """

    spec: Spec
    model: ClientModel
    defense: Pipeline
    client: Client
    doubts: list[str]
    guarantee: Guarantee | None
    prior: Prior
    reference: ImageSet
    left_out: int
    captured: Capture
    observed: Gradient
    checks: list[Check]
    labels: list[int]
    labels_in_doubt: list[str]
    truths: torch.Tensor
    truth_labels: list[int] | None
    prior_saw_truth: bool
    lpips: Perceptual | str
    files: list[tuple[str, str]]
    others: list[Setting] = field(default_factory=list)

    def random(self, purpose: str, trial: int | None = None) -> np.random.Generator:
        """A stream of randomness for one purpose or trial of it, decided by the seed alone."""
        return stream(self.spec.seed, purpose, trial)

    def lots(self, purpose: str, trials: Iterable[int]) -> list[float]:
        """By which ties are broken in each of several trials."""
        return [float(self.random(purpose, trial).random()) for trial in trials]

    @property
    def members(self) -> int:
        """How many images a release is made of, those of all clients together."""
        return self.spec.capture.batch_size * self.defense.aggregation.clients

    @functools.cached_property
    def clients(self) -> ClientGradients:
        """What clients compute, within the memory; whoever holds gradients asks it for room."""
        return ClientGradients(self.model, self.defense, self.spec.memory_bytes)

    def captured_labels(self, count: int) -> torch.Tensor:
        """The captured labels for so many searches, (count, k)."""
        return torch.tensor(self.labels, device=self.model.device).expand(count, -1)

    def matching(
        self, defense: Pipeline | None = None, distance: Distance = "likelihood"
    ) -> Matching:
        """Compares candidates within the memory, under the declared defense or another one."""
        own = self.defense if defense is None else defense
        return Matching(self.model, own, distance, self.spec.memory_bytes)

    def derivatives(
        self, distance: Distance, shown: torch.Tensor | None = None, weight: float = 0.0
    ) -> Derivatives:
        """Derivatives of the matching distance, within the memory."""
        memory = self.spec.memory_bytes
        return Derivatives(self.model, self.defense, distance, shown, weight, memory)

    @functools.cached_property
    def why_no_derivatives(self) -> str:
        """Why derivatives of the matching distance lead nowhere; empty where they do not."""
        random = torch.Generator().manual_seed(0)
        shape = (1, self.members, *self.model.shape)
        images = torch.rand(shape, generator=random).to(self.model.mean)
        labels = torch.tensor([self.labels], device=self.model.device)
        try:
            _, slopes = self.derivatives("l2")(images, labels, stack([self.observed]))
        except (Exception, SystemExit) as error:
            # The model, the loss or a step of the defense is the user's own code.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the gradient cannot be differentiated once more ({reason})"
        if not bool(slopes.isfinite().all()) or not bool(slopes.any()):
            return "the replica of the defense has no derivative to follow"
        return ""

    @property
    def has_likelihood(self) -> bool:
        """Whether candidate matching is by the likelihood of the capture."""
        local, batch_size = self.model.local, self.model.batch_size
        knows_order = local is None or local.order == "fixed" or batch_size == 1
        return knows_order and self.defense.likelihood.is_known()

    @functools.cached_property
    def usual(self) -> Gradient:
        """What a client computes from reference images, undefended; a leading dimension n."""
        images, labels = self.reference.sets(NORMS_COMPARED, self.model.batch_size)
        return self.clients.gradients(images, labels)

    @functools.cached_property
    def usual_norm(self) -> float:
        """The median norm of what a client computes from reference images, undefended."""
        return float(np.median([float(norm(gradient)) for gradient in unstack(self.usual)]))

    @functools.cached_property
    def appearance(self) -> list[str]:
        """What the capture looks like, in sentences, where that can be told."""
        gradient, model = self.captured.gradient, self.model
        plain = self.spec.model.loss.is_plain and model.targets is None
        seen = look_at_last_layer(model, gradient, self.captured.rounding) if plain else None
        usual = None if seen is None else usual_head(model, self.reference)
        sets, _ = self.reference.sets(NORMS_COMPARED, model.batch_size)
        with torch.no_grad():
            # Logits of images may happen to be between 0 and 1; those of much more than images not.
            tried = [factor * images for images in sets for factor in (1, *FAR_FROM_IMAGES)]
            outputs = torch.cat([model.logits(model.parameters, images) for images in tried])
        loss = None if self.spec.model.loss.factory else self.spec.model.loss.name
        said = gives_probabilities(outputs, loss)
        computed = {name: self.usual[name] for name in gradient}
        return [*said, *appearance(gradient, computed, model, seen, usual)]

    @property
    def distance(self) -> str:
        """The name of the distance by which a picture picks its candidate."""
        return self.spec.evidence.distance

    @property
    def distances(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """The distances by which a picture can pick a candidate, by name."""
        evidence = self.spec.evidence
        wanted = evidence.lpips is not None or evidence.distance == "lpips"
        lpips = self.lpips if wanted and not isinstance(self.lpips, str) else None
        return candidate_distances(self.model, lpips)

    def contexts(self, purpose: str, trials: Iterable[int]) -> list[Context]:
        """A client's randomness in each of several trials, on the model's device."""
        return client_contexts(self.spec.seed, purpose, self.model.device, trials)

    @functools.cached_property
    def trials(self) -> Trials:
        """The canaries of the ceiling; those of the floor are the first of them."""
        evidence = self.spec.evidence
        most = max(evidence.matching_trials, evidence.reconstruction_trials)
        random = self.random("trials")
        return draw_trials(
            self.reference, most, evidence.candidates, random, companions=self.members - 1
        )

    def captured_trials(self) -> list[Trials | None]:
        """Each truth among candidates of its class; None where that or they are lacking."""
        if self.truth_labels is None:
            return [None] * len(self.truths)
        wanted, batch_size = self.spec.evidence.candidates, self.model.batch_size
        return [
            captured_trial(
                self.truths,
                self.truth_labels,
                place,
                batch_size,
                self.reference,
                wanted,
                self.random("captured candidates", place),
            )
            for place in range(len(self.truths))
        ]

    def labels_seen(self, observed: Gradient, true_labels: torch.Tensor) -> torch.Tensor:
        """The labels that the attacker assigns to t gradients, in the way of the captured one.

        Args:
            observed: tensors with a leading dimension t.
            true_labels: (t, k), what an attacker who is told the labels is told.
        """
        return true_labels if self.spec.capture.labels != "infer" else self.infer(observed)

    def infer(self, observed: Gradient) -> torch.Tensor:
        """The labels that t gradients give away, (t, k).

        Args:
            observed: tensors with a leading dimension t.
        """
        found = infer(self.model, self.defense, observed, self.members, self.reference)
        return found.reshape(-1, self.members)


def prepare(spec: Spec) -> Setting:
    """Loads and checks all that the spec names.

    Where it is not declared what a clip is over, and running statistics were sent, it is taken to
    be over the parameters alone, unless the capture shows that it is over everything.

    Raises:
        AuditError: something is missing, broken, or does not fit the rest.
    """
    setting = _prepare(spec)
    everything = _with_clips_over_everything(spec)
    if everything is None or not setting.model.statistics:
        return setting
    counts = setting.captured.beside.counts.values()
    scaled = any(float(change) != round(float(change)) for change in counts)
    if not scaled and PRIVATE_IMAGE not in _contradictions(setting):
        return setting
    other = _prepare(everything)
    return setting if _contradictions(other) - _contradictions(setting) else other


def _contradictions(setting: Setting) -> set[str]:
    """What the capture contradicts, without the parameters of steps."""
    return {c.step.partition("(")[0] for c in setting.checks if c.outcome == "contradicts"}


def _with_clips_over_everything(spec: Spec) -> Spec | None:
    """The spec with each step over everything that may be and does not say; None where all say."""
    kinds = shipped()

    def takes_over(step: DefenseSpec) -> bool:
        return step.name in kinds and "over" in kinds[step.name].model_fields

    steps = [
        step.model_copy(update={"over": "everything"})
        if takes_over(step) and getattr(step, "over", None) is None
        else step
        for step in spec.defense
    ]
    return None if steps == spec.defense else spec.model_copy(update={"defense": steps})


def _prepare(spec: Spec) -> Setting:
    keep_freed_memory()
    device = choose_device(spec.device)
    settle(device)
    if spec.memory is None:
        spec = spec.model_copy(update={"memory": usual_memory(device)})
    capture = spec.capture
    defense, model = load_client(spec, device)
    captured = _captured(spec, model, defense)
    if captured.unsent:
        defense, model = load_client(spec, device, unsent=captured.unsent)
    model, defense = _with_statistics(model, defense, captured)
    ClientGradients(model, defense, memory=spec.memory_bytes).try_out()
    gradient, checks = observe(spec, model, defense, captured)
    members = capture.batch_size * defense.aggregation.clients
    if spec.evidence.distance == "representation" and model.head is None:
        raise SpecError(
            ("evidence", "distance"),
            "representation, but the model does not end in a trained linear layer that takes one",
            "Declare pixels, or lpips with its weights.",
        )
    prior = load_prior(spec, model)
    start_optimizer(spec.attack, prior.size)  # refuses what cannot be used before all else
    truths = _truths(spec, model, members)
    marks, seen = frozenset(fingerprints(truths)), prior.seen or frozenset()
    public = _reference(spec, model, prior)
    left_out = len(public) - len(public.without(seen))
    reference = public.without(seen | marks)
    if len(reference) == 0:
        raise SpecError(
            ("evidence", "reference"),
            f"{public.source} holds only images that {prior.source} was trained on",
            "On these the prior does better than on private images. Give others.",
        )
    lpips, backbone = _lpips(spec, device, shown=len(truths) > 0)
    guarantee = _guarantee(spec, model, defense)
    labels = labels_of(spec, model, defense, gradient, members, reference)
    truth_labels, truth_checks = check_truths(
        spec, model, defense, gradient, truths, labels, reference
    )
    checks += look_at_noise(
        spec, model, defense, captured, gradient, truths, truth_labels, truth_checks
    )
    checks += truth_checks
    checks += look_for_covering_noise(spec, model, defense, gradient, reference)
    client = _client(spec, model, defense, reference)
    proven = (
        any(check.outcome == "agrees" for check in truth_checks)
        and not defense.randomness.is_random()
    )
    labels_in_doubt = (
        [] if proven else label_doubts(spec, model, client, defense, gradient, reference)
    )
    setting = Setting(
        spec=spec,
        model=model,
        defense=defense,
        client=client,
        doubts=[
            *capture_doubts(captured, spec, model, defense),
            *client_doubts(client, spec, defense, reference),
            *replica_doubts(model, defense, spec, reference),
            *labels_in_doubt,
        ],
        guarantee=guarantee,
        prior=prior,
        reference=reference,
        left_out=left_out,
        captured=captured,
        observed=gradient,
        checks=checks,
        labels=labels,
        labels_in_doubt=labels_in_doubt,
        truths=truths,
        truth_labels=truth_labels,
        prior_saw_truth=bool(marks & seen),
        lpips=lpips,
        files=backbone,
    )
    others = [_other(setting, number) for number in range(len(capture.others))]
    for other in others:
        setting.doubts.extend(capture_doubts(other.captured, spec, model, defense))
    setting.doubts.extend(doubt for other in others for doubt in other.labels_in_doubt)
    for number, other in enumerate(others):
        for earlier in (setting, *others[:number]):
            if all(torch.equal(other.observed[n], earlier.observed[n]) for n in other.observed):
                raise SpecError(
                    ("capture", "others", number),
                    f"{capture.others[number]} holds the same values as another capture",
                    "Name each client's capture once.",
                )
    everything = [setting.observed, *(other.observed for other in others)]
    roundings = [captured.rounding, *(other.captured.rounding for other in others)]
    if others and capture.stage == "defended":
        checks += check_shared_noise(defense, everything, model, capture, max(roundings))
    return replace(setting, others=others, files=[*_files(spec, reference), *backbone])


def _with_statistics(
    model: ClientModel, defense: Pipeline, captured: Capture
) -> tuple[ClientModel, Pipeline]:
    """The model and the defense for a capture that holds running statistics as well."""
    changes = captured.beside.statistics
    if not changes:
        return model, defense
    names = [*changes]
    if defense.clear.is_over_everything:
        names += captured.beside.counts
        unit = 1.0  # they are in one norm with the gradient
    else:
        unit = float(norm(captured.gradient) / norm(changes))
    after = [model.state[name].float() - change for name, change in changes.items()]
    size = max(float(tensor.norm()) for tensor in after) * captured.beside.rounding
    rounding = (SAME_CHANGES * size / float(norm(changes))) ** 2
    return observe_statistics(model, defense, names, unit, rounding)


def _other(setting: Setting, number: int) -> Setting:
    """The setting of another capture of the round; its images are not held.

    Raises:
        AuditError: it cannot be read, does not fit, or lacks other parameters than the first.
    """
    first, model, defense = setting.spec, setting.model, setting.defense
    capture = first.capture.model_copy(
        update={"gradient": first.capture.others[number], "others": [], "labels": "infer"}
    )
    spec = first.model_copy(update={"capture": capture})
    captured = _captured(spec, model, defense)
    if captured.unsent:
        raise InputError(
            spec.resolve(first.capture.others[number]),
            f"has no {captured.unsent[0]!r}, which the first capture has",
            "Captures that lack different parameters are audits of their own.",
        )
    if captured.beside.statistics.keys() != setting.captured.beside.statistics.keys():
        raise InputError(
            spec.resolve(first.capture.others[number]),
            "holds other running statistics than the first capture",
            "Captures that hold different tensors are audits of their own.",
        )
    observed, checks = observe(spec, model, defense, captured)
    if spec.capture.stage == "defended":
        checks += check_noise(defense, observed, model, spec.capture, captured.rounding)
    try:
        labels = labels_of(spec, model, defense, observed, setting.members, setting.reference)
    except SpecError as error:
        raise SpecError(
            ("capture", "others", number),
            error.problem,
            "Labels of the others are always inferred; audit this capture by itself.",
        ) from None
    return replace(
        setting,
        spec=spec,
        captured=captured,
        observed=observed,
        checks=checks,
        labels=labels,
        labels_in_doubt=label_doubts(
            spec, model, setting.client, defense, observed, setting.reference
        ),
        truths=setting.truths[:0],
        truth_labels=None,
        prior_saw_truth=False,
    )


def _captured(spec: Spec, model: ClientModel, defense: Pipeline) -> Capture:
    """Reads the capture; Adam's moments are taken apart into the gradient that they hold.

    Raises:
        AuditError: it cannot be read, or is a ciphertext.
    """
    capture = spec.capture
    ignored = [one.name for one in capture.ignored]
    holder = defense.effect.ciphertext_of()
    if holder is not None:
        raise NothingToMeasureError(
            ("defense",),
            f"the capture is a ciphertext and {holder} holds the key: without it there is nothing "
            "to measure, which is not the same as safe",
            f"Audit what {holder} sees: view: key_holder, with the decrypted gradient.",
        )
    if capture.after is not None:
        before = None if capture.before is None else spec.resolve(capture.before)
        return read_update(before, spec.resolve(capture.after), model, ignored)
    assert capture.gradient is not None
    negated = capture.sign == "after_minus_before"
    captured = read_capture(spec.resolve(capture.gradient), model, ignored, negated=negated)
    if capture.kind != "moments":
        return captured
    previous = each(torch.zeros_like, captured.gradient)
    if capture.previous is not None:
        path = spec.resolve(capture.previous)
        earlier = read_capture(path, model, ignored)
        previous = earlier.gradient
        if previous.keys() != captured.gradient.keys():
            odd = min(previous.keys() ^ captured.gradient.keys())
            raise InputError(path, f"{odd!r} is only in one of capture.previous and the capture")
        captured = replace(captured, beside=captured.beside.after(earlier.beside))
    gradient = last_gradient(captured.gradient, previous, capture.beta1)
    return replace(captured, gradient=gradient)


def _reference(spec: Spec, model: ClientModel, prior: Prior) -> ImageSet:
    evidence = spec.evidence
    if evidence.reference is None:
        others = np.linspace(0, model.classes - 1, min(SAMPLED_CLASSES, model.classes)).round()
        if model.targets is not None:
            raise SpecError(
                ("evidence", "reference"),
                "not given, but what images are to give is more than a class, and the prior's "
                "samples have no such targets",
                "Give an npz whose labels are such targets.",
            )
        declared = spec.capture.labels if isinstance(spec.capture.labels, list) else []
        classes = sorted({*declared, *map(int, others)})
        trials = max(evidence.matching_trials, evidence.reconstruction_trials)
        many = max(2 * evidence.candidates, -(-trials // len(classes)))
        labels = torch.tensor(classes, device=model.device).repeat_interleave(many)
        return sample_images(prior, labels, stream(spec.seed, "prior samples"))
    reference = read_image_set(
        evidence.reference,
        spec.folder,
        ("evidence", "reference"),
        "reference",
        model.shape,
        targets=True,
    ).to(model.device)
    if reference.classes > model.classes:
        raise SpecError(
            ("evidence", "reference"),
            f"{reference.source} has the label {reference.classes - 1}; the model has "
            f"{model.classes} classes, 0 to {model.classes - 1}",
        )
    return reference


def _truths(spec: Spec, model: ClientModel, members: int) -> torch.Tensor:
    paths = spec.evidence.truth
    if len(paths) not in (0, members):
        raise SpecError(
            ("evidence", "truth"),
            f"names {len(paths)} images; the capture is made of {members}",
            "Give all of them, in the order of capture.labels and client by client, or none.",
        )
    images = [read_image(spec.resolve(path), model.shape) for path in paths]
    return torch.stack(images).to(model.device) if images else torch.zeros(0, *model.shape)


def _lpips(
    spec: Spec, device: torch.device, *, shown: bool
) -> tuple[Perceptual | str, list[tuple[str, str]]]:
    """LPIPS, where it is declared or there is a picture to compare, and the file that it took.

    Raises:
        AuditError: the weights that were declared cannot be had, or not be used.
    """
    evidence = spec.evidence
    declared = evidence.lpips or LpipsSpec()
    if evidence.lpips is None and evidence.distance != "lpips" and not shown:
        return "there is nothing to compare", []
    if declared.weights is not None:
        return load_lpips(declared.net, spec.resolve(declared.weights), device), []
    found = find_backbone(declared.net, download=declared.download)
    if isinstance(found, str):
        if evidence.distance == "lpips":
            raise SpecError(("evidence", "distance"), f"lpips, but {found}")
        return found, []
    return load_lpips(declared.net, found, device), [(found.name, sha256([found]))]


def _client(spec: Spec, model: ClientModel, defense: Pipeline, reference: ImageSet) -> Client:
    clients = ClientGradients(model, defense, spec.memory_bytes)
    if spec.client is None:
        return DeclaredClient(clients, defense, reference)
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
        clients=clients,
        defense=defense,
        companions=reference,
        batch_size=spec.capture.batch_size if several else spec.client.batch_size,
        averaged=not model.loss_sum
        if several
        else spec.guarantee is not None and spec.guarantee.reduction == "mean",
        ignored=[one.name for one in spec.capture.ignored],
    )
    if not several and client.batch_size > 1 and not defense.randomness.leaves_only_noise():
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
    mechanism = defense.sensitivity.guarantee(declared.unit)
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


def _files(spec: Spec, reference: ImageSet) -> list[tuple[str, str]]:
    named = [
        spec.capture.gradient,
        *spec.capture.others,
        spec.capture.before,
        spec.capture.after,
        spec.capture.previous,
        spec.capture.targets,
        spec.model.exported,
        spec.model.weights,
        spec.prior.weights,
        spec.prior.exported,
        spec.prior.embedding,
        *spec.evidence.truth,
        spec.evidence.lpips.weights if spec.evidence.lpips else None,
        *own_code(spec),
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


def own_code(spec: Spec) -> list[Path]:
    """The user's own files that an audit runs: those that the spec names, and what they import."""
    factories = [
        spec.model.factory,
        spec.model.loss.factory,
        spec.prior.factory,
        spec.prior.latent_mapping,
        spec.client.step if spec.client else None,
        *(step.factory for step in spec.defense),
    ]
    sources = [(factory or "").rpartition(":")[0] for factory in factories]
    named = [Path(source) for source in sources if source.endswith(".py")]
    beside = [
        path.parent / one.relative_to(spec.resolve(path).absolute().parent)
        for path in named
        for one in imports_of(spec.resolve(path).absolute())
    ]
    return list(dict.fromkeys([*named, *beside]))
