"""Loads all that a spec names, and checks it against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ggl_audit.basics.device import CPU, choose_device, lacking_operator, settle, usual_memory
from ggl_audit.basics.environment import keep_freed_memory
from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case
from ggl_audit.case.client import client_of
from ggl_audit.case.doubts import capture_doubts, client_doubts, replica_doubts
from ggl_audit.case.guarantee import guarantee_of
from ggl_audit.case.images import read_reference, read_truths
from ggl_audit.case.input_files import input_files
from ggl_audit.case.loading import load_client
from ggl_audit.case.observation import observe_audited, observe_other
from ggl_audit.case.perceptual import load_perceptual
from ggl_audit.case.reading import read_captured, with_statistics
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Check, Pipeline, shipped
from ggl_audit.errors import AuditError, SpecError
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.declared_noise import check_shared_noise
from ggl_audit.inputs.images import fingerprints
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message, Said
from ggl_audit.optimizers import start_optimizer
from ggl_audit.priors.loading import load_prior
from ggl_audit.spec import DefenseSpec, Spec

NO_REPRESENTATION = Message(
    "image/no-representation",
    "representation, but the model does not end in a trained linear layer that takes one",
    "Declare pixels, or lpips with its weights.",
    advice="Declare `evidence.distance: pixels`, or `lpips` with its weights.",
)
ONLY_SEEN_IMAGES = Message(
    "image/only-seen-images",
    "{source} holds only images that {prior} was trained on",
    "On these the prior does better than on private images. Give others.",
    advice="Give reference images that the prior has not seen: it draws those it has seen too "
    "well.",
)
SAME_AS_ANOTHER = Message(
    "capture/same-as-another",
    "{file} holds the same values as another capture",
    "Name each client's capture once.",
    advice="Name each client's capture once, in `capture.gradient` or in `capture.others`.",
)


def prepare(spec: Spec) -> Case:
    """Loads and checks all that the spec names.

    Where ``auto`` chose an accelerator that lacks an operator, everything is on the processor, and
    the case has a remark that says so. Where it is not declared what a clip is over, and running
    statistics were sent, it is taken to be over the parameters alone, unless the capture shows that
    it is over everything.

    Raises:
        AuditError: something is missing, broken, or does not fit the rest.
    """
    device = choose_device(spec.device)
    try:
        return _prepare(spec, device)
    except (AuditError, NotImplementedError) as error:
        lacking = lacking_operator(error)
        if device.type == "cpu" or spec.device != "auto" or not lacking:
            raise
    remark = f"The audit computes on the processor, as {device.type} lacks something: {lacking}."
    return replace(_prepare(spec, CPU), remarks=[remark])


def _prepare(spec: Spec, device: torch.device) -> Case:
    case = _loaded(spec, device)
    everything = _with_clips_over_everything(spec)
    if everything is None or not case.model.statistics:
        return case
    contradicted = case.audited.contradicted()
    counts = case.audited.fitted.beside.counts.values()
    scaled = any(float(change) != round(float(change)) for change in counts)
    if not scaled and PRIVATE_IMAGE not in contradicted:
        return case
    other = _loaded(everything, device)
    return case if other.audited.contradicted() - contradicted else other


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


def _loaded(spec: Spec, device: torch.device) -> Case:
    keep_freed_memory()
    settle(device)
    if spec.memory is None:
        spec = spec.model_copy(update={"memory": usual_memory(device)})
    defense, model = load_client(spec, device)
    fitted = read_captured(spec, model, defense, spec.capture.gradient)
    if fitted.unsent:
        defense, model = load_client(spec, device, unsent=fitted.unsent)
    model, defense = with_statistics(model, defense, fitted)
    ClientGradients(model, defense, memory=spec.memory_bytes).try_out()
    truths = read_truths(spec, model, spec.capture.batch_size * defense.aggregation.clients)
    case = _load(spec, model, defense, truths)
    audited = observe_audited(case, fitted, truths)
    others = [observe_other(case, audited, number) for number in range(len(spec.capture.others))]
    captures = (audited, *others)
    _refuse_repetitions(spec, captures)
    if others and spec.capture.stage == "defended":
        checks = [*audited.checks, *_shared_noise(case, captures)]
        captures = (replace(audited, checks=checks), *others)
    return replace(case, captures=captures, doubts=_doubts(case, captures))


def _load(spec: Spec, model: ClientModel, defense: Pipeline, truths: torch.Tensor) -> Case:
    """All of a case but its captures, and the doubts about them."""
    if spec.evidence.distance == "representation" and model.head is None:
        raise SpecError(("evidence", "distance"), NO_REPRESENTATION())
    prior = load_prior(spec, model)
    start_optimizer(spec.attack, prior.size)  # refuses what cannot be used before all else
    seen = prior.seen or frozenset()
    public = read_reference(spec, model, prior)
    left_out = len(public) - len(public.without(seen))
    reference = public.without(seen | frozenset(fingerprints(truths)))
    if len(reference) == 0:
        raise SpecError(
            ("evidence", "reference"), ONLY_SEEN_IMAGES(source=public.source, prior=prior.source)
        )
    lpips, backbone = load_perceptual(spec, model.device, shown=len(truths) > 0)
    return Case(
        spec=spec,
        model=model,
        defense=defense,
        client=client_of(spec, model, defense, reference),
        guarantee=guarantee_of(spec, model, defense),
        prior=prior,
        reference=reference,
        left_out=left_out,
        lpips=lpips,
        captures=(),
        doubts=[],
        files=[*input_files(spec, reference), *backbone],
    )


def _refuse_repetitions(spec: Spec, captures: Sequence[Capture]) -> None:
    for number, capture in enumerate(captures):
        for earlier in captures[:number]:
            if all(torch.equal(capture.observed[n], earlier.observed[n]) for n in capture.observed):
                raise SpecError(
                    ("capture", "others", number - 1), SAME_AS_ANOTHER(file=capture.file)
                )


def _shared_noise(case: Case, captures: Sequence[Capture]) -> list[Check]:
    observed = [capture.observed for capture in captures]
    rounding = max(capture.fitted.rounding for capture in captures)
    return check_shared_noise(case.defense, observed, case.model, case.spec.capture, rounding)


def _doubts(case: Case, captures: Sequence[Capture]) -> list[Said]:
    audited, *others = captures
    return [
        *capture_doubts(audited.fitted, case.spec, case.model, case.defense),
        *client_doubts(case),
        *replica_doubts(case),
        *audited.labels_in_doubt,
        *(
            doubt
            for one in others
            for doubt in capture_doubts(one.fitted, case.spec, case.model, case.defense)
        ),
        *(doubt for one in others for doubt in one.labels_in_doubt),
    ]
