from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses import Pipeline, build_pipeline
from ggl_audit.evidence.square_layers import check_square_layers, square_layers
from ggl_audit.spec import DefenseSpec

EPS = torch.finfo(torch.float32).eps
NONE = Pipeline()


def gradient(seed: int, images: int = 1, steps: int = 1, width: int = 24) -> Gradient:
    """Of a network with two square layers, by plain steps of SGD with momentum."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)),
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    taken, labels = torch.rand(images, 12), torch.randint(5, (images,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(taken), labels).backward()
        optimizer.step()
    return {name: before[name] - tensor for name, tensor in net.state_dict().items()}


def turned(own: Gradient, *names: str) -> Gradient:
    return {name: tensor.T if name in names else tensor for name, tensor in own.items()}


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (1, 4), (6, 1), (3, 2)])
def test_a_transposed_layer_is_told_from_a_right_one(images: int, steps: int) -> None:
    for seed in range(20):
        own = gradient(seed, images, steps)
        assert square_layers(own) == ["2.weight", "4.weight"]
        right = check_square_layers(NONE, own, EPS)
        assert right is None or right.outcome == "agrees"
        wrong = check_square_layers(NONE, turned(own, "4.weight"), EPS)
        if right is not None and "4.weight" in right.detail:
            assert wrong is not None
            assert wrong.outcome == "contradicts"
            assert wrong.detail.startswith("4.weight is transposed")
    assert right is not None


def test_a_right_layer_is_never_accused() -> None:
    """Of 300 captures, of small layers and of as many images as may be of use."""
    for seed in range(300):
        width, images = 4 + seed % 13, 1 + seed % 7
        own = gradient(seed, images, width=width)
        check = check_square_layers(NONE, own, EPS)
        assert check is None or check.outcome == "agrees", (seed, width, images)


def test_it_is_not_told_where_nothing_tells() -> None:
    own = gradient(0)
    without = {name: tensor for name, tensor in own.items() if not name.endswith("bias")}
    assert check_square_layers(NONE, without, EPS) is None
    assert check_square_layers(NONE, own, 1e-2) is None
    assert check_square_layers(NONE, gradient(0, images=24), EPS) is None
    noise = build_pipeline([DefenseSpec.model_validate({"name": "noise", "std": 0.1})], Path(), 1)
    assert check_square_layers(noise, own, EPS) is None
    clip = build_pipeline([DefenseSpec.model_validate({"name": "clip", "bound": 1.0})], Path(), 1)
    assert check_square_layers(clip, own, EPS) is not None
