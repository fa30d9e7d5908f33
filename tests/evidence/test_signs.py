"""A capture of the other sign is named as one; a right one is never accused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, each, take
from ggl_audit.case.preparation import prepare
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Clip, Noise, Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.evidence.consistency import check_truth
from ggl_audit.evidence.signs import check_last_layer_and_sign, negated
from ggl_audit.experiments.alternatives import other_signs
from ggl_audit.inputs.images import ImageSet, digits
from ggl_audit.inputs.losses import CrossEntropy
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import LocalTrainingSpec, Spec

EPS = torch.finfo(torch.float32).eps
NONE = Pipeline()
OTHER = "declare the other capture.sign"


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return digits("reference")


@pytest.fixture
def two_classes(sample: Callable[..., Spec]) -> ClientModel:
    """The sample's model with a head of two outputs, whose predictions differ between images."""
    spec = sample("undefended")
    whole = load_model(spec, torch.device("cpu"))
    module = whole.module
    assert isinstance(module, nn.Sequential)
    old = module[-1]
    assert isinstance(old, nn.Linear)
    torch.manual_seed(0)
    module[-1] = nn.Linear(old.in_features, 2)
    with torch.no_grad():
        module[-1].weight *= 4
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return replace(whole, parameters=parameters, classes=2, criterion=CrossEntropy())


def trained(model: ClientModel, **local: Any) -> ClientModel:
    return replace(model, local=LocalTrainingSpec(**local))


def sent(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> list[Gradient]:
    gradients = ClientGradients(model, NONE).gradients(images, labels)
    return [take(gradients, index) for index in range(len(labels))]


@pytest.mark.parametrize(
    "local",
    [
        {"lr": 0.01},
        {"lr": 0.01, "epochs": 3, "momentum": 0.9, "nesterov": True},
        {"lr": 0.001, "optimizer": "adam", "epochs": 3},
        {"lr": 0.001, "optimizer": "rmsprop", "epochs": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_other_sign_is_named_whatever_the_optimizer(
    model: ClientModel, public: ImageSet, local: dict[str, Any], batch_size: int
) -> None:
    model = trained(replace(model, batch_size=batch_size), **local)
    sets = public.sets(12, batch_size) if batch_size > 1 else (public.images[:12], public.labels)
    for update in sent(model, sets[0], sets[1][:12]):
        right = check_last_layer_and_sign(model, NONE, update, batch_size, EPS)
        assert right is None or right.outcome == "agrees", right
        wrong = check_last_layer_and_sign(model, NONE, negated(update), batch_size, EPS)
        assert wrong is not None
        assert wrong.outcome == "contradicts"
        assert OTHER in wrong.detail


def test_more_values_below_zero_than_images_are_no_such_gradient(
    model: ClientModel, public: ImageSet
) -> None:
    """Of two images, declared as one of several steps, which the rank cannot tell."""
    model = trained(replace(model, batch_size=2), lr=0.01, epochs=2)
    images, labels = public.sets(8, 2)
    apart = [i for i in range(8) if labels[i, 0] != labels[i, 1]]
    update = sent(model, images[apart[:1]], labels[apart[:1]])[0]
    one = replace(model, batch_size=1)
    check = check_last_layer_and_sign(one, NONE, update, 1, EPS)
    assert check is not None
    assert check.outcome == "contradicts"
    assert "2 values of its last layer's bias are below zero, where 1 can be" in check.detail


def test_of_two_classes_the_scale_tells_the_sign(
    two_classes: ClientModel, public: ImageSet
) -> None:
    labels = public.labels[:60] % 2
    named = 0
    for gradient in sent(two_classes, public.images[:60], labels):
        right = check_last_layer_and_sign(two_classes, NONE, gradient, 1, EPS)
        assert right is not None
        assert right.outcome == "agrees", right
        wrong = check_last_layer_and_sign(two_classes, NONE, negated(gradient), 1, EPS)
        assert wrong is not None
        named += wrong.outcome == "contradicts" and OTHER in wrong.detail
        silent = wrong.outcome == "agrees" and "other sign" not in wrong.detail
        assert not silent, wrong
    assert named >= 55


def test_of_two_classes_a_clip_hides_the_sign_and_the_check_says_so(
    two_classes: ClientModel, public: ImageSet
) -> None:
    clip = Pipeline([Clip(bound=0.1)])
    for gradient in sent(two_classes, public.images[:10], public.labels[:10] % 2):
        clipped = Clip(bound=0.1).replicate(gradient, None)
        for one in (clipped, negated(clipped)):
            check = check_last_layer_and_sign(two_classes, clip, one, 1, EPS)
            assert check is not None
            assert check.outcome == "contradicts" or "other sign looks like" in check.detail


@pytest.mark.parametrize("told", [False, True])
def test_the_private_image_tells_the_sign(
    two_classes: ClientModel, model: ClientModel, public: ImageSet, told: bool
) -> None:
    for one, classes in ((two_classes, 2), (model, 10)):
        labels = public.labels[:20] % classes
        matching = Matching(one, NONE)
        for index, gradient in enumerate(sent(one, public.images[:20], labels)):
            own = labels[index, None] if told else None
            compared = (public.images[index], public.images[30:60], own)
            right = check_truth(matching, NONE, gradient, *compared)
            assert right.outcome == "agrees", right
            wrong = check_truth(matching, NONE, negated(gradient), *compared)
            assert wrong.outcome == "contradicts"
            assert OTHER in wrong.detail


def test_the_private_image_tells_the_sign_under_noise(model: ClientModel, public: ImageSet) -> None:
    noise = Pipeline([Noise(std=1e-3)])
    gradient = sent(model, public.images[:1], public.labels[:1])[0]
    random = torch.Generator().manual_seed(0)
    noisy = each(lambda t: t + 1e-3 * torch.randn(t.shape, generator=random), gradient)
    matching = Matching(model, noise)
    compared = (public.images[0], public.images[30:60])
    assert check_truth(matching, noise, noisy, *compared).outcome == "agrees"
    wrong = check_truth(matching, noise, negated(noisy), *compared)
    assert wrong.outcome == "contradicts"
    assert OTHER in wrong.detail
    unlike = check_truth(matching, noise, noisy, public.images[5], public.images[30:60])
    assert unlike.outcome == "contradicts"
    assert OTHER not in unlike.detail


def test_a_declared_sign_is_turned(
    model: ClientModel, public: ImageSet, sample: Callable[..., Spec], tmp_path: Path
) -> None:
    update = sent(trained(model, lr=0.1), public.images[:1], public.labels[:1])[0]
    save_file(negated(update), tmp_path / "update.safetensors")
    keys: dict[str, Any] = {
        "capture__gradient": str(tmp_path / "update.safetensors"),
        "capture__kind": "update",
        "capture__local": {"lr": 0.1},
        "evidence__truth": None,
    }
    turned = prepare(sample("undefended", **keys, capture__sign="after_minus_before"))
    assert turned.audited.labels == public.labels[:1].tolist()
    assert all(torch.equal(turned.audited.observed[name], update[name]) for name in update)
    assert [check.outcome for check in turned.audited.checks] == ["agrees"]
    as_it_is = prepare(sample("undefended", **keys))
    assert OTHER in as_it_is.audited.checks[0].detail
    causes = {cause.text: case for cause, case in other_signs(as_it_is)}
    assert [own.audited.labels for own in causes.values()] == [turned.audited.labels]
    keys.pop("capture__local")
    keys["capture__kind"] = "gradient"
    with pytest.raises(SpecError, match="after_minus_before is for kind: update"):
        sample("undefended", **keys, capture__sign="after_minus_before")
