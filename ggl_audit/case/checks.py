"""The capture against what was declared, and against the private images where these are held."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from ggl_audit.attack.labels import scale_of_one
from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, unstack
from ggl_audit.case.case import Case
from ggl_audit.case.loading import load_client, observe_statistics
from ggl_audit.client.randomness import client_context
from ggl_audit.defenses import Check, Pipeline
from ggl_audit.errors import AuditError
from ggl_audit.evidence.assignment import assign_labels
from ggl_audit.evidence.consistency import WOULD_AGREE, check_truth
from ggl_audit.evidence.covered_statistics import check_covered
from ggl_audit.evidence.declarations import other_declarations
from ggl_audit.evidence.declared_noise import (
    MOST_LABELS,
    check_noise,
    check_noise_beside,
)
from ggl_audit.evidence.signs import check_last_layer_and_sign
from ggl_audit.evidence.square_layers import check_square_layers
from ggl_audit.inputs.capture import FittedGradient
from ggl_audit.inputs.model import ClientModel


def observe(case: Case, fitted: FittedGradient) -> tuple[Gradient, list[Check]]:
    """What the attacker sees, and the capture against the declared steps, model and loss."""
    spec, model, defense = case.spec, case.model, case.defense
    gradient, raw = _sent(fitted, model), spec.capture.stage == "raw"
    if raw:
        context = client_context(spec.seed, "captured client", model.device)
        gradient, checks = defense.apply(gradient, context), []
    else:
        checks = defense.checks.verify(gradient)
    applied = Pipeline() if raw else defense
    layout = check_square_layers(applied, fitted.gradient, fitted.rounding)
    checks += [] if layout is None else [layout]
    if spec.model.loss.is_plain and model.targets is None:
        check = check_last_layer_and_sign(
            model, applied, fitted.gradient, case.members, fitted.rounding
        )
        checks += [] if check is None else [check]
    return gradient, checks


def _sent(fitted: FittedGradient, model: ClientModel) -> Gradient:
    """The gradient, and the running statistics that were sent with it."""
    if model.statistics is None:
        return fitted.gradient
    changes = {**fitted.beside.statistics, **fitted.beside.counts}
    unit = model.statistics.unit
    return {**fitted.gradient, **{n: unit * changes[n] for n in model.statistics.names}}


def check_truths(
    case: Case, observed: Gradient, truths: torch.Tensor, labels: list[int]
) -> tuple[list[int] | None, list[Check]]:
    """Compares the capture with the private images, where these are held.

    Returns:
        The label of each, None where it is not known, and what came of the comparison.
    """
    model, defense, images = case.model, case.defense, case.reference.images
    told = case.spec.capture.labels != "infer" or len(labels) == 1
    known = labels if told or len(set(labels)) == 1 else None
    fixed = [name for name, _ in model.module.named_parameters() if name in model.constants]
    if len(truths) == 0 or not defense.randomness.leaves_only_noise():
        return known, []
    if fixed and defense.effect.acts_on_the_whole():
        return known, []  # whether the client's norm is over what is sent alone is not known
    matching = case.matching()
    if len(truths) == 1:
        # Of class indices every one is tried; targets of one's own may be too many.
        asked = None if model.targets is None else torch.tensor(labels, device=model.device)
        check = check_truth(matching, defense, observed, truths[0], images, asked)
        return known, [_hinted(check, case, observed, truths[0], asked)]
    ordered = labels
    if not told:
        scale = scale_of_one(model, defense, len(truths))
        ordered = assign_labels(observed, model, truths, labels, scale)
    of_each = torch.tensor(ordered, device=model.device)
    check = check_truth(matching, defense, observed, truths, images, of_each)
    if told:
        return labels, [_hinted(check, case, observed, truths, of_each)]
    if check.outcome == "contradicts":
        return None, []  # the images may be the right ones, with their labels in another order
    return None if defense.randomness.is_random() else ordered, [check]


def _hinted(
    check: Check,
    case: Case,
    observed: Gradient,
    truth: torch.Tensor,
    labels: torch.Tensor | None,
) -> Check:
    """The check of the private images, with the other declaration of the model that fits them."""
    if check.outcome != "contradicts":
        return check
    model = case.model
    trained = {name for name, own in model.module.named_parameters() if own.requires_grad}
    unsent = trained - model.parameters.keys()
    for cause, changed in other_declarations(case.spec, model):
        with suppress(AuditError):  # as it cannot be so
            defense, other = load_client(changed, model.device, unsent=unsent)
            if model.statistics is not None:
                names, unit = model.statistics.names, model.statistics.unit
                other, defense = observe_statistics(other, defense, names, unit)
            matching = Matching(other, defense, memory=case.spec.memory_bytes)
            images = case.reference.images
            seen = matching.seen_of(observed)
            if seen is None:
                continue
            if check_truth(matching, defense, seen, truth, images, labels).outcome == "agrees":
                return replace(check, said=WOULD_AGREE(detail=check.detail, cause=cause))
    return check


def look_for_covering_noise(case: Case, observed: Gradient) -> list[Check]:
    """Looks for the noise that is said to be over everything in the running statistics."""
    spec, model, defense = case.spec, case.model, case.defense
    if model.statistics is None or not defense.clear.is_over_everything or spec.client is not None:
        return []
    context = client_context(spec.seed, "statistics", model.device)
    usual = [g for one in unstack(case.usual) for g in (one, defense.without_noise(one, context))]
    check = check_covered(defense, model.statistics.names, observed, usual)
    return [] if check is None else [check]


def look_at_noise(
    case: Case,
    fitted: FittedGradient,
    observed: Gradient,
    truths: torch.Tensor,
    labels: list[int] | None,
    checks: list[Check],
) -> list[Check]:
    """Tests the noise in the capture; beside the private images, where these were compared."""
    capture, model, rounding = case.spec.capture, case.model, fitted.rounding
    if capture.stage == "raw":
        return []
    told = capture.labels != "infer"
    every = len(truths) == 1 and model.targets is None and not told
    if not checks or labels is None or (every and model.classes > MOST_LABELS):
        return check_noise(case.defense, observed, model, capture, rounding)
    rows = torch.tensor([labels], device=model.device)
    if every:  # what noise makes of the inferred label may be wrong
        rest = [[label] for label in range(model.classes) if [label] != labels]
        rows = torch.tensor([labels, *rest], device=model.device)
    fits = checks[0].outcome == "agrees"
    return check_noise_beside(case.matching(), observed, truths, rows, capture, rounding, fits)
