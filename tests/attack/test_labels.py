from __future__ import annotations

import pytest
import torch
from torch import nn

from ggl_audit.attack.labels import infer_labels
from ggl_audit.basics.gradient import stack
from ggl_audit.defenses import Clip, Context, Noise, Pipeline, Sign, Sparsify
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel, Head
from tests.conftest import plain_gradient


@pytest.mark.parametrize(
    "steps", [[], [Sparsify(fraction=0.9)], [Sign()], [Clip(bound=0.1), Noise(std=1e-4)]], ids=str
)
def test_the_label_is_read_off_a_single_gradient(model: ClientModel, steps: list[object]) -> None:
    images = digits("private")
    defense = Pipeline(steps)
    context = Context(torch.Generator().manual_seed(0))
    chosen = range(0, 100, 5)
    observed = [
        defense.apply(plain_gradient(model, images.images[i], int(images.labels[i])), context)
        for i in chosen
    ]
    assert model.head is not None
    inferred = infer_labels(stack(observed), model.head)
    assert inferred.tolist() == images.labels[list(chosen)].tolist()


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_two_classes_and_heads_without_bias(classes: int, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(20, classes, bias=bias)
    for label in range(classes):
        head.zero_grad()
        features = torch.rand(1, 20)
        nn.functional.cross_entropy(head(features), torch.tensor([label])).backward()
        gradient = {name: p.grad for name, p in head.named_parameters()}
        found = infer_labels(stack([gradient]), Head("", "weight", "bias" if bias else None))
        assert int(found) == label


def test_noise_alone_tells_no_label(model: ClientModel) -> None:
    assert model.head is not None
    noise = [
        Noise(std=1.0).apply(
            {n: torch.zeros_like(p) for n, p in model.parameters.items()},
            Context(torch.Generator().manual_seed(seed)),
        )
        for seed in range(300)
    ]
    counts = torch.bincount(infer_labels(stack(noise), model.head), minlength=10)
    assert int(counts.max()) < 60
