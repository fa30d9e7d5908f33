"""The attacks of an audit: the latent search, and others that a weak generator does not limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ggl_audit.attack.analytic import is_exact, recover_input, representation
from ggl_audit.attack.objective import LatentObjective, pictures
from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attack.refine import refine
from ggl_audit.attack.search import SearchResult, search
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.setting import Setting
from ggl_audit.defenses import Pipeline
from ggl_audit.optimizers import find_family, start_optimizer, wants_more
from ggl_audit.priors.directions import principal_directions
from ggl_audit.spec import AttackSpec

Advance = Callable[[int], None]

GGL = "ggl"
REFINED = "refined"
PIXELS = "pixels"
ANALYTIC = "analytic"

ATTACKS = {
    GGL: "the prior's latents (Generative Gradient Leakage; Li et al., CVPR 2022)",
    REFINED: "then its features and the pixels (after GIFD; Fang et al., ICCV 2023)",
    PIXELS: "pixels without a prior (Inverting Gradients; Geiping et al., NeurIPS 2020)",
    ANALYTIC: "read off the first layer (Geiping et al., NeurIPS 2020, proposition 3.1)",
}
"""What each searches, and its source."""


@dataclass(frozen=True)
class Attempt:
    """What one attack made of t gradients.

    Attributes:
        images: (t, channels, height, width) in [0, 1], or (t, k, ...).
        losses: (t,), the matching distances that it reached.
    """

    images: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True)
class Suite:
    """Which attacks are made.

    Attributes:
        names: in order, GGL first.
        left_out: why the others are not made, by name.
    """

    names: list[str] = field(default_factory=lambda: [GGL])
    left_out: dict[str, str] = field(default_factory=dict)


def choose_attacks(setting: Setting) -> Suite:
    """All that the spec asks for and the model and the defense allow."""
    if setting.spec.attack.method == GGL:
        return Suite([GGL], dict.fromkeys((REFINED, PIXELS, ANALYTIC), "attack.method is ggl"))
    left_out: dict[str, str] = {}
    reason = _not_differentiable(setting)
    if reason:
        left_out = dict.fromkeys((REFINED, PIXELS), reason)
    reason = _not_analytic(setting)
    if reason:
        left_out[ANALYTIC] = reason
    return Suite([name for name in ATTACKS if name not in left_out], left_out)


def _not_analytic(setting: Setting) -> str:
    """Why no image can be read off the gradient; empty where one can."""
    if setting.members > 1:
        return "the release is of several images"
    observed = {name: tensor[None] for name, tensor in setting.observed.items()}
    if recover_input(setting.model, observed) is None:
        return "the model does not begin with a linear layer that has a bias"
    return ""


def _not_differentiable(setting: Setting) -> str:
    """Why derivatives of the matching distance lead nowhere; empty where they lead somewhere."""
    model, members = setting.model, setting.members
    random = torch.Generator().manual_seed(0)
    images = torch.rand(1, members, *model.shape, generator=random).to(model.mean)
    labels = torch.tensor([setting.labels], device=model.device)
    observed = {name: tensor[None] for name, tensor in setting.observed.items()}
    try:
        _, slopes = setting.derivatives("l2")(images, labels, observed)
    except (Exception, SystemExit) as error:
        # The model, the loss or a step of the defense is the user's own code.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the gradient cannot be differentiated once more ({reason})"
    if not bool(slopes.isfinite().all()) or not bool(slopes.any()):
        return "the replica of the defense has no derivative to follow"
    return ""


def run_attacks(
    setting: Setting,
    suite: Suite,
    observed: Gradient,
    labels: torch.Tensor,
    purpose: str,
    advance: Advance,
) -> tuple[SearchResult, dict[str, Attempt]]:
    """Makes all attacks on t observed gradients, each on its own.

    Args:
        setting: what was handed in.
        suite: the attacks.
        observed: tensors with a leading dimension t.
        labels: (t,) or (t, k), what the attacker takes the labels for.
        purpose: names the stream of randomness.
        advance: told of the candidates that are evaluated.

    Returns:
        What the search found, and what each attack made of it; of an interrupted search only that.

    Raises:
        KeyboardInterrupt: interrupted before or after the search.
    """
    result, images = run_search(setting, setting.defense, observed, labels, purpose, advance)
    attempts = {GGL: Attempt(images, result.losses)}
    if not result.complete:
        return result, attempts
    model, attack = setting.model, setting.spec.attack
    of_each = labels.reshape(len(labels), -1)
    shown = representation(model, observed) if attack.representation else None
    extra = (shown, attack.representation)

    for name in suite.names[1:]:
        if name == REFINED:
            nearer = setting.derivatives(attack.distance, *extra)
            prior, latents = setting.prior, result.latents
            found = refine(prior, nearer, latents, of_each, observed, attack.steps, advance)
            attempts[name] = Attempt(found.images.reshape(images.shape), found.losses)
        elif name == PIXELS:
            aligned = setting.derivatives("cosine", *extra)
            random = setting.random(f"{purpose} pixels")
            found = attack_pixels(model, aligned, of_each, observed, attack.steps, random, advance)
            attempts[name] = Attempt(found.images.reshape(images.shape), found.losses)
        else:
            recovered = recover_input(model, observed)
            assert recovered is not None
            matching = setting.matching(distance=attack.distance)
            losses = matching.distances(recovered[:, None], of_each, observed)[:, 0]
            attempts[name] = Attempt(recovered, losses)
    return result, attempts


def recovered_exactly(setting: Setting, attempt: Attempt) -> bool:
    """Whether the analytic attack has the very image of the capture."""
    labels = captured_labels(setting, 1)
    observed = {name: tensor[None] for name, tensor in setting.observed.items()}
    rounding = setting.captured.rounding
    images, memory = attempt.images[:1], setting.memory
    exact = is_exact(setting.model, setting.defense, images, labels, observed, rounding, memory)
    return bool(exact[0])


def run_search(
    setting: Setting,
    defense: Pipeline,
    observed: Gradient,
    labels: torch.Tensor,
    purpose: str,
    advance: Advance,
    evaluations: int | None = None,
) -> tuple[SearchResult, torch.Tensor]:
    """Searches the latents of t observed gradients, each on its own, as the spec declares.

    Args:
        setting: what was handed in.
        defense: to replicate; not the declared one in the undefended control.
        observed: tensors with a leading dimension t.
        labels: (t,) or (t, k), what the attacker takes the labels for.
        purpose: names the stream of randomness.
        advance: told of the candidates that are evaluated.
        evaluations: for each gradient, if not as declared.

    Returns:
        What was found, and its pictures (t, channels, height, width) or (t, k, ...) in [0, 1].
    """
    attack = searched_by(setting)
    matching = setting.matching(defense, attack.distance)
    objective = LatentObjective(
        matching,
        setting.prior,
        observed,
        labels,
        attack.regularizer,
    )
    random = setting.random(purpose)
    parts = objective.parts(together=wants_more(attack.optimizer))
    searches = (len(labels), attack.restarts, parts)
    seeds = random.integers(2**32, size=searches)
    budget = evaluations or attack.evaluations
    principal = partial(principal_directions, setting.prior, setting.labels[0])
    size = setting.prior.size * objective.members // parts
    start = start_optimizer(attack, size, principal if size == setting.prior.size else None)
    result = search(objective, start, seeds, budget, advance)
    found = pictures(setting.prior, result.latents, labels.reshape(len(labels), -1))
    return result, found if labels.ndim == 2 else found[:, 0]


def searched_by(setting: Setting) -> AttackSpec:
    """The declared search, but by what stands in for an optimizer that has too few evaluations."""
    attack, members = setting.spec.attack, setting.members
    apart = members > 1 and setting.matching().adds_up
    size, evaluations = setting.prior.size * members, attack.evaluations // attack.restarts
    other = find_family(attack.optimizer).stand_in(size, evaluations, apart)
    return attack.model_copy(update={"optimizer": other}) if other else attack


def captured_labels(setting: Setting, count: int) -> torch.Tensor:
    """The captured labels for so many searches: (count,) or (count, k)."""
    labels = torch.tensor(setting.labels, device=setting.model.device)
    return labels.expand(count, -1) if setting.members > 1 else labels.expand(count)
