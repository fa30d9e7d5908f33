"""Refines what a search found: the latent, then the generator's features, then the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.descent import Advance, Descent, Found, descend
from ggl_audit.basics.gradient import Gradient
from ggl_audit.priors.prior import Prior

Decode = Callable[[torch.Tensor], torch.Tensor]

LATENTS = Descent(0, 0.03)
FEATURES = Descent(0, 0.03, 1e-3)
PIXELS = Descent(0, 0.01, 1e-3, pixels=True)
"""How each is refined; the steps are shared out evenly, and features have units of their spread."""

LAYERS = 2
"""The generator's layers whose features are refined, one after the other."""


def refine(
    prior: Prior,
    derivatives: Derivatives,
    latents: torch.Tensor,
    labels: torch.Tensor,
    observed: Gradient,
    steps: int,
    advance: Advance,
) -> Found:
    """Follows derivatives from t latents, into what the generator itself cannot draw.

    After GIFD (Fang et al., ICCV 2023): the features of an early layer, then of a later one, can
    draw more than a latent can, and each starts where the one before has ended. The pixels come
    last. A stage counts only where it comes nearer to the observed gradient.

    Args:
        prior: its generator's layers are found by a forward pass; of a generator that is one piece,
            as a saved program, only latents and pixels are refined.
        derivatives: of the distance.
        latents: (t, k x d).
        labels: (t, k).
        observed: tensors with a leading dimension t.
        steps: of Adam, all stages together.
        advance: told of the candidates.
    """
    flat = labels.flatten()
    layers = _layers(prior, latents.reshape(len(flat), -1), flat)
    share = steps // (2 + len(layers))

    def drawn(latents: torch.Tensor) -> torch.Tensor:
        images = prior.decode(latents.reshape(len(flat), -1), flat)
        shaped: torch.Tensor = images.unflatten(0, labels.shape)
        return shaped

    def stage(start: torch.Tensor, decode: Decode, how: Descent) -> Found:
        how = replace(how, steps=share)
        return descend(start, decode, derivatives, labels, observed, how, advance)

    best = stage(latents, drawn, LATENTS)
    latents, before = best.variables, partial(drawn, best.variables)
    for layer in layers:
        features = _output(layer, before)
        spread = features.std().clamp(min=1e-12)

        decode = partial(_drawn_from, layer, spread, partial(drawn, latents))
        found = stage((features / spread).unflatten(0, labels.shape), decode, FEATURES)
        before = partial(decode, found.variables)
        best = _nearer(found, best)
    pixels = stage(best.images, torch.clone, PIXELS)
    return _nearer(pixels, best)


def refinement_steps(prior: Prior, steps: int) -> int:
    """How many of the steps there are, when each stage has as many."""
    device = next(prior.generator.parameters(), torch.zeros(0)).device
    layers = _layers(
        prior, torch.zeros(2, prior.size, device=device), torch.zeros(2).long().to(device)
    )
    stages = 2 + len(layers)
    return stages * (steps // stages)


def _drawn_from(
    layer: nn.Module,
    spread: torch.Tensor,
    draw: Callable[[], torch.Tensor],
    features: torch.Tensor,
) -> torch.Tensor:
    """What is drawn where a layer gives features (t, k, ...), in units of their spread."""
    with _giving(layer, (spread * features).flatten(0, 1)):
        return draw()


def _nearer(found: Found, before: Found) -> Found:
    """The one with the lower loss of each pair; its variables are those of the first."""
    better = found.losses < before.losses
    images = torch.where(better[:, None, None, None, None], found.images, before.images)
    return Found(found.variables, images, torch.where(better, found.losses, before.losses))


def _layers(prior: Prior, latents: torch.Tensor, labels: torch.Tensor) -> list[nn.Module]:
    """Some layers of the generator, spread evenly, whose outputs hold more than a latent."""
    seen: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and len(output) == len(latents):
            seen.append((module, output.shape))

    inner = [m for m in prior.generator.modules() if not any(m.children())]
    handles = [module.register_forward_hook(note) for module in inner]
    try:
        with torch.no_grad():
            pixels = prior.decode(latents, labels)[0].numel()
    finally:
        for handle in handles:
            handle.remove()
    called = [module for module, _ in seen]
    least = max(latents.shape[1], pixels)
    wide = [m for m, shape in seen[:-1] if shape[1:].numel() > least and called.count(m) == 1]
    return [wide[len(wide) * (i + 1) // (LAYERS + 1)] for i in range(LAYERS)] if wide else []


def _output(layer: nn.Module, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            draw()
    finally:
        handle.remove()
    return outputs[0]


@contextmanager
def _giving(layer: nn.Module, output: torch.Tensor) -> Iterator[None]:
    """Has a layer give something else than what it computes."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()
