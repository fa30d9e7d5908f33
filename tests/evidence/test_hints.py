"""What a capture or a model that does not fit is said to be instead, and nothing of right ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, each, stack, take
from ggl_audit.case.appearance import appearance_of
from ggl_audit.case.case import Case
from ggl_audit.case.doubts import label_doubts
from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Clip, Context, Noise, Pipeline
from ggl_audit.evidence.appearance import appearance, gives_probabilities
from ggl_audit.evidence.consistency import check_remainder, check_truth
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import Spec
from tests.conftest import contexts

Declare = Callable[..., Spec]
CPU = torch.device("cpu")


def context(seed: int) -> Context:
    return Context(torch.Generator().manual_seed(seed))


def client(sample: Declare, size: int, defense: list[dict[str, Any]]) -> tuple[Pipeline, Any]:
    keys = {"capture__batch_size": size, "evidence__truth": [], "defense": defense}
    return load_client(sample("undefended", **keys), CPU)


@pytest.mark.parametrize("seed", range(5))
def test_a_quarter_of_the_noise_is_that_of_a_mean(sample: Declare, seed: int) -> None:
    defense, model = client(sample, 4, [{"name": "noise", "std": 1.0}])
    nothing = each(torch.zeros_like, model.parameters)
    quarter = Noise(std=0.25).apply(nothing, context(seed))
    (check,) = defense.checks.verify(quarter)
    assert check.outcome == "contradicts"
    assert "that is 1/B with a batch of 4: std 0.25 would fit" in check.detail
    remainder = check_remainder(defense, nothing, quarter)
    assert "of the declared, that is 1/B with a batch of 4: a std of 0.2" in remainder.detail
    right = Noise(std=1.0).apply(nothing, context(seed))
    assert [check.outcome for check in defense.checks.verify(right)] == ["agrees"]


def test_a_norm_at_a_multiple_of_the_bound_is_named(sample: Declare) -> None:
    defense, model = client(sample, 4, [{"name": "clip", "bound": 0.5}])
    gradient = each(torch.ones_like, model.parameters)
    sent = each(lambda tensor: 4 * tensor, Clip(bound=0.5).apply(gradient, context(0)))
    (check,) = defense.checks.verify(sent)
    assert "4 times the bound, that is B with a batch of 4" in check.detail


def test_an_image_whose_gradient_is_another_multiple_is_told_so(sample: Declare) -> None:
    defense, model = client(sample, 1, [])
    data = digits("private")
    matching = Matching(model, defense)
    gradient = take(matching.clients.gradients(data.images[:1], data.labels[:1]), 0)
    scaled = each(lambda tensor: 2.0**16 * tensor, gradient)
    check = check_truth(matching, defense, scaled, data.images[0], digits("reference").images)
    assert check.outcome == "contradicts"
    assert "2^16: a gradient scaler" in check.detail


def test_a_zero_tensor_has_no_magnitude(sample: Declare) -> None:
    case = prepare(sample("undefended", evidence__truth=[]))
    gradient = case.audited.fitted.gradient
    name = max(gradient, key=lambda name: gradient[name].numel())
    empty = {**gradient, name: torch.zeros_like(gradient[name])}
    said = appearance(empty, case.usual, case.model, None, None)
    assert any(f"Nothing is in {name}" in one for one in said)
    assert not any("like a sign" in one for one in said)
    signs = each(torch.sign, gradient)
    said = appearance(signs, case.usual, case.model, None, None)
    assert any("like a sign" in one for one in said)


@pytest.mark.parametrize(
    ("last", "loss", "layer"),
    [
        (nn.Softmax(1), "cross_entropy", "softmax"),
        (nn.Sigmoid(), "binary_cross_entropy", "sigmoid"),
        (nn.Identity(), "cross_entropy", None),
        (nn.Identity(), "binary_cross_entropy", None),
        (nn.Softmax(1), None, None),
    ],
)
def test_probabilities_where_logits_are_taken_are_named(
    last: nn.Module, loss: str | None, layer: str | None
) -> None:
    outputs = last(5 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))
    said = gives_probabilities(outputs, loss)
    assert [f"as of a {layer}" in one for one in said] == ([True] if layer else [])


@pytest.mark.parametrize(("last", "told"), [("Identity", False), ("Sigmoid", True)])
def test_logits_between_zero_and_one_are_no_probabilities(
    sample: Declare, tmp_path: Path, last: str, told: bool
) -> None:
    (tmp_path / "models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net(last):\n"
        "    torch.manual_seed(0)\n"
        "    head = nn.Linear(256, 1)\n"
        "    nn.init.normal_(head.weight, std=0.01)\n"
        "    nn.init.constant_(head.bias, 0.5)\n"
        "    return nn.Sequential(nn.Flatten(), head, getattr(nn, last)())\n"
    )
    data = digits("reference")
    kept = data.labels < 2
    np.savez(
        tmp_path / "two.npz",
        images=(255 * data.images[kept, 0]).byte().numpy(),
        labels=data.labels[kept].numpy(),
    )
    write_capture(
        tmp_path / "g.safetensors", {"1.weight": torch.rand(1, 256), "1.bias": torch.rand(1)}
    )
    spec = sample(
        "undefended",
        model__factory=f"{tmp_path / 'models.py'}:net",
        model__kwargs={"last": last},
        model__weights=None,
        model__loss="binary_cross_entropy",
        capture__gradient=str(tmp_path / "g.safetensors"),
        capture__labels=[1],
        evidence__truth=[],
        evidence__reference={"npz": str(tmp_path / "two.npz")},
    )
    case = prepare(spec)
    within = case.model.logits(case.model.parameters, case.reference.images)
    assert bool(((within >= 0) & (within <= 1)).all())  # so images alone do not tell
    assert any("are probabilities" in one for one in appearance_of(case, case.audited)) == told


def test_another_order_of_positive_inputs_does_not_agree(sample: Declare) -> None:
    """Positive activations correlate in any order; less their mean they do not."""
    defense, model = client(sample, 1, [])
    matching, data = Matching(model, defense), digits("private")
    images, labels = data.images[:6], data.labels[:6]
    right = matching.clients.gradients(images, labels)
    dense = next(n for n, t in right.items() if t.ndim == 3 and t.shape[2] > 100)
    order = torch.randperm(right[dense].shape[2], generator=torch.Generator().manual_seed(0))
    wrong = {**right, dense: right[dense][:, :, order]}
    place = list(right).index(dense)
    assert float(matching.agreement(images, labels, right)[:, place].min()) > 0.999
    one, other = right[dense].flatten(1), wrong[dense].flatten(1)
    plain = (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)
    assert float(matching.agreement(images, labels, wrong)[:, place].max()) < float(plain.min())


CAPTURES = 60
"""A right batch is worse than 32 exchangeable ones in 1 of 33 cases at most."""


@pytest.mark.parametrize("size", [2, 4])
def test_labels_of_right_batches_are_rarely_in_doubt(sample: Declare, size: int) -> None:
    defense, model = client(sample, size, [])
    data = digits("reference")
    sender = DeclaredClient(ClientGradients(model, defense), defense, data)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(size))
    chosen = chosen[: CAPTURES * size].view(CAPTURES, size)
    sent = sender.send(data.images[chosen], data.labels[chosen], contexts(len(chosen)))
    case = replace(
        prepare(sample("undefended")), model=model, client=sender, defense=defense, reference=data
    )
    doubted = _doubted(case, sent, CAPTURES)
    assert doubted <= binom.isf(1e-4, CAPTURES, 1 / 33)


def test_labels_of_unequal_images_are_in_doubt(sample: Declare) -> None:
    defense, model = client(sample, 4, [])
    data = digits("reference")
    matching = Matching(model, defense)
    sender = DeclaredClient(matching.clients, defense, data)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(9))[:40].view(10, 4)
    # As a mean of two ranks' means gives it, of one image and of three.
    first = _alone(model, data.images[chosen[:, 0]], data.labels[chosen[:, 0]])
    whole = matching.clients.gradients(data.images[chosen], data.labels[chosen])
    uneven = {n: (first[n] + (4 * whole[n] - first[n]) / 3) / 2 for n in whole}
    case = replace(
        prepare(sample("undefended")), model=model, client=sender, defense=defense, reference=data
    )
    assert _doubted(case, uneven, 10) >= 9


def _alone(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    gradients = []
    for image, label in zip(images, labels, strict=True):
        logits = model.module(model.normalize(image[None]))
        loss = nn.functional.cross_entropy(logits, label[None])
        own = torch.autograd.grad(loss, [*model.module.parameters()])
        gradients.append(dict(zip(model.parameters, own, strict=True)))
    return stack(gradients)


def _doubted(case: Case, sent: Gradient, count: int) -> int:
    return sum(bool(label_doubts(case, take(sent, i))) for i in range(count))
