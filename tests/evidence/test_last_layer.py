from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ggl_audit.attack.labels import usual_head
from ggl_audit.basics.gradient import Gradient, each, norm, take
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline, build_pipeline
from ggl_audit.evidence.appearance import appearance
from ggl_audit.evidence.last_layer import check_last_layer, look_at_last_layer
from ggl_audit.inputs.images import ImageSet, digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import DefenseSpec, LocalTrainingSpec, Spec
from tests.conftest import plain_gradient

EPS = torch.finfo(torch.float32).eps
NONE = Pipeline()


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return digits("reference")


@pytest.fixture
def trained(sample: Callable[..., Spec]) -> ClientModel:
    return load_model(sample("trained"), torch.device("cpu"))


def mean_gradient(model: ClientModel, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    """By a plain backward pass."""
    model.module.zero_grad()
    logits = model.module((images - model.mean) / model.std)
    nn.CrossEntropyLoss()(logits, labels).backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def pipeline(*steps: dict[str, object]) -> Pipeline:
    from pathlib import Path

    return build_pipeline([DefenseSpec.model_validate(step) for step in steps], Path(), 1)


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0, 128.0])
def test_the_scale_of_the_loss_is_read_off(
    model: ClientModel, public: ImageSet, scale: float
) -> None:
    gradient = plain_gradient(model, public.images[7], int(public.labels[7]))
    seen = look_at_last_layer(model, each(lambda t: scale * t, gradient), EPS)
    assert seen is not None
    assert seen.rank == 1
    assert seen.scale == pytest.approx(scale, rel=1e-4)
    assert seen.misfit == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["model", "trained"])
def test_a_right_capture_is_never_accused(
    request: pytest.FixtureRequest, public: ImageSet, which: str, dtype: torch.dtype
) -> None:
    model: ClientModel = request.getfixturevalue(which)
    gradients = ClientGradients(model, NONE).gradients(public.images, public.labels)
    told = 0
    for index in range(len(public)):
        gradient = each(lambda t: t.to(dtype).float(), take(gradients, index))
        check = check_last_layer(model, NONE, gradient, 1, torch.finfo(dtype).eps)
        told += check is not None
        assert check is None or check.outcome == "agrees", check
    assert told > 50


def test_another_loss_scale_is_named(model: ClientModel, public: ImageSet) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    for factor in (0.5, 2.0, 1 / 64):
        scaled = each(lambda t, f=factor: f * t, gradient)
        check = check_last_layer(model, NONE, scaled, 1, EPS)
        assert check is not None
        assert check.outcome == "contradicts"
        assert f"model.loss.scale {factor:.3g} would fit" in check.detail
        declared = replace(model, loss_scale=factor)
        agreed = check_last_layer(declared, NONE, scaled, 1, EPS)
        assert agreed is not None
        assert agreed.outcome == "agrees"


def test_a_clip_may_scale_down_but_not_up(model: ClientModel, public: ImageSet) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    clip = pipeline({"name": "clip", "bound": 0.5 * float(norm(gradient))})
    down = check_last_layer(model, clip, each(lambda t: 0.5 * t, gradient), 1, EPS)
    up = check_last_layer(model, clip, each(lambda t: 2 * t, gradient), 1, EPS)
    assert down is not None
    assert up is not None
    assert (down.outcome, up.outcome) == ("agrees", "contradicts")


def test_an_update_is_measured_by_its_learning_rate(model: ClientModel, public: ImageSet) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    update = each(lambda t: 0.1 * t, gradient)
    for rate, outcome in ((0.1, "agrees"), (0.05, "contradicts")):
        local = replace(model, local=LocalTrainingSpec(lr=rate))
        check = check_last_layer(local, NONE, update, 1, EPS)
        assert check is not None
        assert check.outcome == outcome
    several = replace(model, local=LocalTrainingSpec(lr=0.1, epochs=2))
    assert check_last_layer(several, NONE, update, 1, EPS) is None


def test_the_weights_of_another_round_are_found(
    model: ClientModel, trained: ClientModel, public: ImageSet
) -> None:
    outcomes = []
    for index in range(0, 500, 10):
        gradient = plain_gradient(trained, public.images[index], int(public.labels[index]))
        check = check_last_layer(model, NONE, gradient, 1, EPS)
        outcomes += [] if check is None else [check.outcome]
    assert len(outcomes) > 5
    # A gradient of the wrong weights may fit by chance.
    assert outcomes.count("contradicts") > 0.8 * len(outcomes)


@pytest.mark.parametrize("images", [2, 3, 5])
def test_more_images_than_declared_are_counted(
    model: ClientModel, public: ImageSet, images: int
) -> None:
    chosen = torch.arange(images) * 53  # of different classes
    gradient = mean_gradient(model, public.images[chosen], public.labels[chosen])
    alone = check_last_layer(model, NONE, gradient, 1, EPS)
    right = check_last_layer(model, NONE, gradient, images, EPS)
    assert alone is not None
    assert right is not None
    assert (alone.outcome, right.outcome) == ("contradicts", "agrees")
    assert (
        "images or more, of more than one step, or of none; of 1 by the declaration" in alone.detail
    )


def test_a_client_that_computes_in_bfloat16_is_not_accused(
    model: ClientModel, public: ImageSet
) -> None:
    for index in range(0, 500, 25):
        model.module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.module((public.images[index][None] - model.mean) / model.std)
            loss = nn.CrossEntropyLoss()(logits, public.labels[index][None])
        loss.backward()
        gradient = {n: 0.1 * p.grad for n, p in model.module.named_parameters()}
        local = replace(model, local=LocalTrainingSpec(lr=0.1))
        check = check_last_layer(local, NONE, gradient, 1, EPS)
        assert check is not None
        assert check.outcome == "agrees", check


@pytest.mark.parametrize("step", [{"name": "noise", "std": 0.01}, {"name": "sign"}])
def test_nothing_is_said_behind_a_defense_that_does_more_than_scale(
    model: ClientModel, public: ImageSet, step: dict[str, object]
) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    assert check_last_layer(model, pipeline(step), gradient, 1, EPS) is None


def sentence(model: ClientModel, observed: Gradient, public: ImageSet) -> str:
    usual = ClientGradients(model, NONE).gradients(public.images[:8], public.labels[:8])
    seen = look_at_last_layer(model, observed, EPS)
    return " ".join(appearance(observed, usual, model, seen, usual_head(model, public)))


def test_what_a_capture_looks_like_is_said(model: ClientModel, public: ImageSet) -> None:
    one = plain_gradient(model, public.images[3], int(public.labels[3]))
    chosen = torch.arange(4) * 53
    four = mean_gradient(model, public.images[chosen], public.labels[chosen])
    random = torch.Generator().manual_seed(0)
    looks = {
        "the gradient of one image, with the declared loss": one,
        "the gradient of one image, 0.1 times that with the declared loss: an update": each(
            lambda t: 0.1 * t, one
        ),
        "a mean over 4 images, or over as many of them and local steps, with the declared": four,
        "a mean over 4 images, or over as many of them and local steps, 0.1 times that": each(
            lambda t: 0.1 * t, four
        ),
        "a sum over 4 images": each(lambda t: 4 * t, four),
        "like a sign.": each(lambda t: 0.3 * t.sign(), one),
        "like a sign with a scale of its own": each(lambda t: t.abs().mean() * t.sign(), one),
        "like a quantization of the whole": each(lambda t: (t * 100).round() / 100, one),
        "like a sparsification": each(
            lambda t: torch.where(t.abs() > t.abs().max() / 3, t, 0), one
        ),
        "like noise that was added, or a mean": each(
            lambda t: t + 0.01 * torch.randn(t.shape, generator=random), one
        ),
    }
    for words, gradient in looks.items():
        assert words in sentence(model, gradient, public), words


def test_nothing_is_said_that_cannot_be_told(model: ClientModel) -> None:
    random = torch.Generator().manual_seed(0)
    noise = each(lambda t: torch.randn(t.shape, generator=random), model.parameters)
    assert look_at_last_layer(model, noise, EPS).rank >= 9
    assert look_at_last_layer(replace(model, head=None), noise, EPS) is None


def test_noise_is_of_no_number_of_images(model: ClientModel) -> None:
    """The rows of p - y sum to zero, so that no gradient has the rank of all classes."""
    random = torch.Generator().manual_seed(0)
    noise = each(lambda t: torch.randn(t.shape, generator=random), model.parameters)
    check = check_last_layer(model, NONE, noise, 12, EPS)
    assert check is not None
    assert check.outcome == "contradicts"
    assert "cross-entropy gives 9 at most" in check.detail


def test_more_images_than_ranks_show_nothing(model: ClientModel, public: ImageSet) -> None:
    chosen = torch.arange(9) * 53
    gradient = mean_gradient(model, public.images[chosen], public.labels[chosen])
    assert check_last_layer(model, NONE, gradient, 9, EPS) is None


def test_rounding_that_hides_the_scale_is_no_agreement(
    model: ClientModel, public: ImageSet
) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    tripled = each(lambda t: 3 * t, gradient)
    assert check_last_layer(model, NONE, tripled, 1, 0.1) is None
    told = check_last_layer(model, NONE, tripled, 1, EPS)
    assert told is not None
    assert told.outcome == "contradicts"


def test_a_confident_model_in_bfloat16_is_not_accused(
    trained: ClientModel, public: ImageSet
) -> None:
    for index in range(0, 500, 5):
        trained.module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = trained.module((public.images[index][None] - trained.mean) / trained.std)
            loss = nn.CrossEntropyLoss()(logits, public.labels[index][None])
        loss.backward()
        gradient = {n: p.grad for n, p in trained.module.named_parameters()}
        check = check_last_layer(trained, NONE, gradient, 1, EPS)
        assert check is None or check.outcome == "agrees", (index, check)


@pytest.mark.parametrize("lr", [0.01, 5e-4, 1e-5])
def test_a_small_learning_rate_is_seen_and_a_right_one_is_not_accused(
    model: ClientModel, public: ImageSet, lr: float
) -> None:
    for index in range(0, 100, 10):
        gradient = plain_gradient(model, public.images[index], int(public.labels[index]))
        weights = model.parameters
        update = {n: weights[n] - (weights[n] - lr * t) for n, t in gradient.items()}
        right = check_last_layer(
            replace(model, local=LocalTrainingSpec(lr=lr)), NONE, update, 1, EPS
        )
        assert right is None or right.outcome == "agrees", right
        wrong = check_last_layer(
            replace(model, local=LocalTrainingSpec(lr=0.1)), NONE, update, 1, EPS
        )
        if lr > 1e-4:
            assert wrong is not None
            assert f"capture.local.lr {lr:.3g}" in wrong.detail


def test_label_smoothing_is_named_before_a_scale(model: ClientModel, public: ImageSet) -> None:
    for index in range(0, 100, 10):
        model.module.zero_grad()
        logits = model.module((public.images[index][None] - model.mean) / model.std)
        nn.CrossEntropyLoss(label_smoothing=0.1)(logits, public.labels[index][None]).backward()
        gradient = {n: p.grad.clone() for n, p in model.module.named_parameters()}
        check = check_last_layer(model, NONE, gradient, 1, EPS)
        assert check is not None
        assert "model.loss.label_smoothing 0.1 would fit" in check.detail


def test_a_focal_loss_is_named_before_a_scale(model: ClientModel, public: ImageSet) -> None:
    for index in range(0, 100, 20):
        model.module.zero_grad()
        logits = model.module((public.images[index][None] - model.mean) / model.std)
        p = logits.softmax(1)[0, public.labels[index]]
        (-((1 - p) ** 2) * p.log()).backward()
        gradient = {n: t.grad.clone() for n, t in model.module.named_parameters()}
        check = check_last_layer(model, NONE, gradient, 1, EPS)
        assert check is not None
        assert "a focal loss with gamma 2" in check.detail


def test_far_below_its_bound_a_clip_has_not_scaled(model: ClientModel, public: ImageSet) -> None:
    gradient = plain_gradient(model, public.images[3], int(public.labels[3]))
    clip = pipeline({"name": "clip", "bound": 2 * float(norm(gradient))})
    half = check_last_layer(model, clip, each(lambda t: 0.5 * t, gradient), 1, EPS)
    right = check_last_layer(model, clip, gradient, 1, EPS)
    scaled = check_last_layer(model, NONE, each(lambda t: 2**16 * t, gradient), 1, EPS)
    assert half is not None
    assert right is not None
    assert scaled is not None
    assert "nothing was clipped" in half.detail
    assert right.outcome == "agrees"
    assert "gradient scaler" in scaled.detail
