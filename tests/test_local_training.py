"""Local training is that of plain PyTorch loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.func import grad
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.basics.gradient import Gradient, each, norm, take
from ggl_audit.case.appearance import appearance_of
from ggl_audit.case.case import Case
from ggl_audit.case.doubts import capture_doubts
from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.client.contribution import Contribution
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.client.local_training import described, rate_of_one_step
from ggl_audit.defenses import Context, Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.experiments.alternatives import other_trainings
from ggl_audit.inputs.capture import FittedGradient
from ggl_audit.inputs.images import digits, read_image
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import LocalTrainingSpec, Spec

CPU = torch.device("cpu")
IMAGES, TOGETHER, EPOCHS = 5, 2, 2
LABEL = 2
"""Of the sample's private image."""

CLASSES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}

Client = tuple[Pipeline, ClientModel]


@pytest.fixture
def client(sample: Callable[..., Spec]) -> Callable[..., Client]:
    """In double precision, so that a comparison is one of formulas and not of rounding."""

    def build(images: int = IMAGES, **local: Any) -> Client:
        keys = {"capture__kind": "update", "capture__local": local}
        spec = sample("undefended", capture__batch_size=images, evidence__truth=None, **keys)
        return load_client(spec, CPU, torch.float64)

    return build


def batch(images: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    data = digits("private")
    return data.images[:images].double(), data.labels[:images]


def loop(
    model: ClientModel,
    optimizer: str,
    epochs: int = EPOCHS,
    together: int = TOGETHER,
    accumulate: int = 1,
    most: float | None = None,
    proximal: float = 0.0,
    scale: float = 1.0,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> tuple[Gradient, list[float]]:
    """Weights before training minus those after it, and the learning rate of each step."""
    images, labels = batch()
    module = copy.deepcopy(model.module)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    own = CLASSES[optimizer](module.parameters(), foreach=False, **options)
    scheduler = None if schedule is None else schedule(own)
    rates = []
    for _ in range(epochs):
        parts = torch.arange(len(images)).split(together)
        own.zero_grad()
        for index, part in enumerate(parts):
            logits = module((images[part] - model.mean) / model.std)
            loss = F.cross_entropy(logits, labels[part])
            for name, parameter in module.named_parameters():
                loss = loss + proximal / 2 * (parameter - start[name]).square().sum()
            (scale * loss / accumulate).backward()
            if (index + 1) % accumulate and index + 1 < len(parts):
                continue
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.grad /= scale
            if most is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), most)
            rates.append(own.param_groups[0]["lr"])
            own.step()
            own.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return {name: start[name] - p.detach() for name, p in module.named_parameters()}, rates


def assert_same(found: Gradient, expected: Gradient, tolerance: float = 1e-9) -> None:
    assert list(found) == list(expected)
    difference = {name: found[name] - expected[name] for name in expected}
    assert float(norm(difference)) <= tolerance * float(norm(expected))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ("sgd", {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.05}),
    ("adam", {"lr": 0.01}),
    ("adam", {"lr": 0.01, "betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.1}),
    ("adam", {"lr": 0.03, "betas": [0.3, 0.2], "amsgrad": True}),
    ("adamw", {"lr": 0.01}),
    ("adamw", {"lr": 0.01, "betas": [0.3, 0.2], "weight_decay": 0.5, "amsgrad": True}),
    ("rmsprop", {"lr": 0.01}),
    ("rmsprop", {"lr": 0.01, "alpha": 0.5, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.8}),
    ("rmsprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-2, "centered": True, "momentum": 0.5}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIONS, ids=str)
def test_an_update_is_that_of_pytorchs_optimizer_with_its_defaults(
    client: Callable[..., Client], optimizer: str, options: dict[str, Any]
) -> None:
    local = {"optimizer": optimizer, "epochs": EPOCHS, "batch_size": TOGETHER, **options}
    defense, model = client(**local)
    assert model.local is not None
    assert model.local.steps(IMAGES) == 6
    expected, rates = loop(model, optimizer, **options)
    assert len(rates) == 6
    images, labels = batch()
    assert_same(Contribution(model, defense)(images, labels, {}), expected)
    two = ClientGradients(model, defense).gradients(
        images.expand(2, -1, -1, -1, -1), labels.repeat(2, 1)
    )
    assert_same(take(two, 1), expected)


@pytest.mark.parametrize("optimizer", CLASSES)
@pytest.mark.parametrize(
    ("declared", "plain"),
    [
        ({"clip_norm": 0.5}, {"most": 0.5}),
        ({"clip_norm": 1e6}, {"most": 1e6}),
        ({"accumulate": 2}, {"accumulate": 2}),
        ({"accumulate": 3, "clip_norm": 0.5}, {"accumulate": 3, "most": 0.5}),
        ({"proximal": 2.0, "accumulate": 2}, {"proximal": 2.0, "accumulate": 2}),
        ({"proximal": 2.0, "clip_norm": 0.5}, {"proximal": 2.0, "most": 0.5}),
        ({}, {"scale": 2.0**16}),
        ({"clip_norm": 0.5, "accumulate": 2}, {"most": 0.5, "accumulate": 2, "scale": 1024.0}),
    ],
    ids=str,
)
def test_clips_accumulation_and_loss_scaling_are_those_of_a_plain_loop(
    client: Callable[..., Client],
    optimizer: str,
    declared: dict[str, Any],
    plain: dict[str, Any],
) -> None:
    """Of five images in batches of two, an epoch's last batch has one, and may be left alone."""
    local = {"epochs": EPOCHS, "batch_size": TOGETHER, "lr": 0.02, **declared}
    defense, model = client(optimizer=optimizer, **local)
    expected, rates = loop(model, optimizer, lr=0.02, **plain)
    assert model.local is not None
    assert model.local.steps(IMAGES) == len(rates)
    assert_same(Contribution(model, defense)(*batch(), {}), expected)


@pytest.mark.parametrize("optimizer", CLASSES)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda own: StepLR(own, step_size=2, gamma=0.3),
        lambda own: CosineAnnealingLR(own, T_max=5),
        lambda own: LinearLR(own, start_factor=0.1, total_iters=4),
    ],
    ids=["step", "cosine", "warmup"],
)
def test_a_schedule_is_a_list_of_learning_rates(
    client: Callable[..., Client],
    optimizer: str,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler],
) -> None:
    _, model = client(lr=0.02)
    expected, rates = loop(model, optimizer, schedule=schedule, lr=0.02)
    assert len(set(rates)) > 2
    local = {"optimizer": optimizer, "epochs": EPOCHS, "batch_size": TOGETHER, "lr": rates}
    defense, model = client(**local)
    assert_same(Contribution(model, defense)(*batch(), {}), expected)


@pytest.mark.parametrize(
    "local",
    [
        {"lr": 0.3},
        {"lr": 0.3, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.3, "momentum": 0.9, "nesterov": True},
        {"lr": 0.3, "batch_size": 2, "accumulate": 3},
        {"lr": [0.2], "batch_size": 5, "accumulate": 4},
    ],
    ids=str,
)
def test_one_step_of_sgd_is_a_known_multiple_of_the_gradient(
    client: Callable[..., Client], local: dict[str, Any]
) -> None:
    defense, model = client(4, **local)
    images, labels = batch(4)
    once, same = client(4, lr=1.0)
    gradient = Contribution(same, once)(images, labels, {})
    rate = rate_of_one_step(model.local, 4)
    assert rate is not None
    update = Contribution(model, defense)(images, labels, {})
    assert_same(update, {name: rate * tensor for name, tensor in gradient.items()})


@pytest.mark.parametrize(
    "local",
    [
        {"lr": 0.1, "epochs": 2},
        {"lr": 0.1, "optimizer": "adam"},
        {"lr": 0.1, "optimizer": "adamw"},
        {"lr": 0.1, "optimizer": "rmsprop"},
    ],
    ids=str,
)
def test_other_updates_are_no_multiple_of_the_gradient(local: dict[str, Any]) -> None:
    assert rate_of_one_step(LocalTrainingSpec(**local), 4) is None


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.1}, {"accumulate": 2}], ids=str)
def test_an_update_can_be_differentiated_where_a_gradient_is_zero(
    client: Callable[..., Client], optimizer: str, more: dict[str, Any]
) -> None:
    """Rectified units and the image's border leave values without a gradient."""
    local = {"optimizer": optimizer, "lr": 0.01, "batch_size": 1, "epochs": 2, **more}
    defense, model = client(2, **local)
    images, labels = batch(2)
    contribution = Contribution(model, defense)
    defense, plain = client(2, lr=0.01)
    gradient = Contribution(plain, defense)(images, labels, {})
    assert any(bool((tensor == 0).any()) for tensor in gradient.values())

    def size(images: torch.Tensor) -> torch.Tensor:
        update = contribution(images, labels, {})
        return torch.stack([tensor.cos().sum() for tensor in update.values()]).sum()

    derivative = grad(size)(images)
    assert bool(derivative.isfinite().all())
    assert bool(derivative.any())
    along = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images)
    little = 1e-7 * along
    difference = (size(images + little) - size(images - little)) / 2e-7
    assert float(difference) == pytest.approx(float((derivative * along).sum()), rel=1e-2)


@pytest.mark.parametrize(
    ("local", "problem"),
    [
        ({"lr": 0.1, "betas": [0.9, 0.99]}, "betas: not for optimizer: sgd"),
        (
            {"lr": 0.1, "optimizer": "adam", "momentum": 0.9, "alpha": 0.5},
            "alpha, momentum: not for optimizer: adam",
        ),
        ({"lr": 0.1, "nesterov": True}, "nesterov needs momentum, and no dampening"),
        (
            {"lr": 0.1, "nesterov": True, "momentum": 0.5, "dampening": 0.5},
            "nesterov needs momentum, and no dampening",
        ),
        ({"lr": [0.0, 0.0], "epochs": 2}, "local.lr: expected a learning rate above zero"),
        (
            {"lr": [0.1, 0.1], "epochs": 3},
            "local.lr has 2 entries; expected one for each of 3 local steps",
        ),
        ({"lr": 0}, "local.lr: expected a learning rate above zero"),
        ({"lr": []}, "local.lr: expected a learning rate above zero"),
        ({"lr": [0.1, -0.1], "epochs": 2}, "or a list with that of each local step, found [0.1"),
        ({"lr": "fast"}, "local.lr: expected a learning rate above zero"),
        ({"lr": None}, "local.lr: expected a learning rate above zero"),
    ],
    ids=str,
)
def test_what_does_not_belong_to_the_optimizer_is_refused(
    sample: Callable[..., Spec], local: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError) as error:
        sample("undefended", capture__kind="update", capture__local=local)
    assert problem in str(error.value)


def update_of_sample(model: ClientModel, samples: Path) -> Gradient:
    image = read_image(samples / "captures" / "private.png", model.shape).double()
    update = Contribution(model, Pipeline())(image[None], torch.tensor([LABEL]), {})
    return each(torch.Tensor.float, update)


def test_one_step_of_adam_is_recognised_and_fits_no_other_optimizer(
    sample: Callable[..., Spec], client: Callable[..., Client], samples: Path, tmp_path: Path
) -> None:
    _, model = client(1, optimizer="adam", lr=0.001)
    save_file(update_of_sample(model, samples), tmp_path / "update.safetensors")
    shared = {
        "capture__gradient": str(tmp_path / "update.safetensors"),
        "capture__kind": "update",
    }

    def checked(**local: Any) -> Case:
        return prepare(sample("undefended", **shared, capture__local={"lr": 0.001, **local}))

    right = checked(optimizer="adam")
    assert [check.outcome for check in right.audited.checks] == ["agrees"]
    assert right.audited.labels == [LABEL]
    assert right.doubts == []
    for wrong in (checked(), checked(optimizer="rmsprop"), checked(optimizer="adam", epochs=2)):
        assert "contradicts" in [check.outcome for check in wrong.audited.checks]
        said = appearance_of(wrong, wrong.audited)[0]
        assert "like one step of Adam with that learning rate" in said
    assert "0.001 in size" in appearance_of(right, right.audited)[0]
    causes = {cause.text: other.model.local for cause, other in other_trainings(checked())}
    assert list(causes) == [
        f"the client trained by another optimizer: {name}" for name in ("adam", "adamw", "rmsprop")
    ]
    assert all(local is not None and local.lr == 0.001 for local in causes.values())


def test_gradients_do_not_look_like_a_step_of_adam(
    sample: Callable[..., Spec], client: Callable[..., Client], samples: Path, tmp_path: Path
) -> None:
    for name, local in (("sgd", {"lr": 0.1}), ("adam", {"lr": 0.001, "epochs": 5})):
        _, model = client(1, optimizer=name, **local)
        path = tmp_path / "update.safetensors"
        save_file(update_of_sample(model, samples), path)
        own = {"optimizer": name, **local}
        keys = {"capture__gradient": str(path), "capture__kind": "update", "capture__local": own}
        case = prepare(sample("undefended", **keys))
        assert not any("Adam" in said for said in appearance_of(case, case.audited))
        assert [check.outcome for check in case.audited.checks][-1] == "agrees"


def test_labels_of_several_images_are_asked_for_where_magnitudes_are_gone(
    client: Callable[..., Client],
) -> None:
    _, model = client(2, optimizer="adam", lr=0.001)
    assert "adam divides each value by its own size" in str(why_not_inferred(model, 2))
    assert why_not_inferred(model, 1) is None
    _, model = client(2, lr=0.001)
    assert why_not_inferred(model, 2) is None


@pytest.mark.parametrize(
    ("local", "unsent", "doubts"),
    [
        ({"momentum": 0.9}, [], 0),
        ({"momentum": 0.9, "fresh": False}, [], 1),
        ({"fresh": False}, [], 0),
        ({"optimizer": "adam", "fresh": False}, [], 1),
        ({"clip_norm": 1.0}, ["0.bias"], 1),
        ({"clip_norm": 1.0}, [], 0),
    ],
    ids=str,
)
def test_what_is_not_known_of_training_is_a_doubt(
    sample: Callable[..., Spec], local: dict[str, Any], unsent: list[str], doubts: int
) -> None:
    keys = {"capture__kind": "update", "capture__local": {"lr": 0.1, **local}}
    spec = sample("undefended", **keys, capture__unsent=unsent)
    captured = FittedGradient(gradient={}, sources={}, how="name")
    defense, model = load_client(spec, torch.device("cpu"))
    assert len(capture_doubts(captured, spec, model, defense)) == doubts


def test_a_cohort_of_equal_clients_is_fedavgs_weighted_mean(
    sample: Callable[..., Spec],
) -> None:
    """Of clients with equally many samples; their updates by a plain loop each."""
    local = {"optimizer": "adam", "lr": 0.01, "batch_size": 1, "epochs": 2}
    spec = sample(
        "undefended",
        capture__batch_size=2,
        capture__kind="update",
        capture__local=local,
        defense=[{"name": "secure_aggregation", "clients": 3}],
        evidence__truth=None,
    )
    defense, model = load_client(spec, CPU, torch.float64)
    images, labels = batch(6)
    samples, weighted = 2, {name: torch.zeros_like(p) for name, p in model.parameters.items()}
    sent = []
    for part in torch.arange(6).split(2):
        module = copy.deepcopy(model.module)
        own = torch.optim.Adam(module.parameters(), lr=0.01, foreach=False)
        for index in [*part, *part]:
            own.zero_grad()
            logits = module((images[index, None] - model.mean) / model.std)
            F.cross_entropy(logits, labels[index, None]).backward()
            own.step()
        for name, parameter in module.named_parameters():
            weighted[name] += samples * (model.parameters[name] - parameter.detach())
        sent.append(Contribution(model, defense)(images[part], labels[part], {}))
    contexts = [Context(torch.Generator().manual_seed(0))] * 3
    found = defense.release(sent, contexts)
    assert_same(found, {name: tensor / (3 * samples) for name, tensor in weighted.items()})


@pytest.mark.parametrize(
    ("local", "said"),
    [
        ({"lr": 0.1}, "SGD with lr 0.1"),
        (
            {"lr": [0.1, 0.01], "momentum": 0.9, "nesterov": True, "accumulate": 2},
            "SGD with lr 0.1 to 0.01, momentum 0.9, nesterov, 2 batches in a step",
        ),
        (
            {"lr": 0.1, "optimizer": "adamw", "betas": [0.5, 0.9], "clip_norm": 2},
            "AdamW with lr 0.1, betas 0.5 and 0.9, weight decay 0.01, clip norm 2",
        ),
    ],
    ids=str,
)
def test_training_is_described_by_what_is_not_usual(local: dict[str, Any], said: str) -> None:
    assert described(LocalTrainingSpec(**local)) == said
