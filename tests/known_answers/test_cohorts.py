"""What must come out for batches, cohorts and updates, where the answer is known.

The captures are made with a plain backward pass or PyTorch's own optimizer. No audit holds a
private image: of a release of several it could not say which one is meant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.case.preparation import prepare
from ggl_audit.defenses import Clip, Context, Noise
from ggl_audit.errors import SpecError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter, plain_gradient

SEEDS = range(1)

LEAKS = ("C", "D", "F")
TAKEN = ("D", "F")
SAFE = ("A", "B")

SEARCHED = {
    "attack__evaluations": 60,
    "evidence__matching_trials": 30,
    "evidence__reconstruction_trials": 5,
    "evidence__control_trials": 1,
    "evidence__public": ["label"],  # what follows is about the images
}
MATCHED = {**SEARCHED, "attack__evaluations": 13, "evidence__matching_trials": 200}
CHECKED = {**MATCHED, "evidence__matching_trials": 10, "evidence__reconstruction_trials": 0}
WELL_SEARCHED = {
    **SEARCHED,
    "attack__evaluations": 250,
    "evidence__reconstruction_trials": 8,
}
MEMBERS = 4
BATCH = {"capture__batch_size": MEMBERS}
COHORT = {"name": "secure_aggregation", "clients": MEMBERS}
LOCAL = {"lr": 0.1, "epochs": 3}
UPDATE = {"capture__kind": "update", "capture__local": LOCAL}
PROMISE = {"unit": "sample", "reduction": "mean", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}

pytestmark = pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")


def private(seed: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = digits("private")
    chosen = [(17 * seed + 5 * i) % len(data) for i in range(images)]
    return data.images[chosen], data.labels[chosen]


def each_image(model: ClientModel, seed: int, images: int) -> list[Gradient]:
    pairs = zip(*private(seed, images), strict=True)
    return [plain_gradient(model, image, int(label)) for image, label in pairs]


def mean(gradients: list[Gradient]) -> Gradient:
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}


def trained(model: ClientModel, seed: int, lr: float = 0.1) -> Gradient:
    """Weights before minus weights after three epochs on one image."""
    (image,), (label,) = private(seed, 1)
    module = copy.deepcopy(model.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module((image[None] - model.mean) / model.std), label[None]).backward()
        optimizer.step()
    after = dict(module.named_parameters())
    return {name: before - after[name].detach() for name, before in model.parameters.items()}


@pytest.fixture
def audit(
    sample: Callable[..., Spec], tmp_path: Path, seed: int
) -> Callable[[Gradient, list[dict[str, Any]]], Report]:
    def run(sent: Gradient, defense: list[dict[str, Any]], **keys: Any) -> Report:
        write_capture(tmp_path / "sent.safetensors", sent)
        spec = sample(
            "undefended",
            seed=seed,
            defense=defense,
            capture__gradient=str(tmp_path / "sent.safetensors"),
            evidence__truth=None,
            **{**SEARCHED, **keys},
        )
        return run_audit(spec, Counter())

    return run


def found(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


def test_an_undefended_batch_leaks(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    asked: dict[str, Any] = {**BATCH, "evidence__public": []}
    report = audit(mean(each_image(model, seed, MEMBERS)), [], **asked)
    assert report.verdict.of("image").grade in LEAKS, report.verdict
    assert {"GGL002", "GGL003"} <= found(report)
    assert "GGL005" not in found(report)
    assert report.captured.labels == private(seed, MEMBERS)[1].sort().values.tolist()
    assert report.evidence.membership is not None
    assert report.evidence.membership.advantage_lower > 0.05
    assert len(report.captured.reconstructions) == MEMBERS


def test_the_update_of_one_image_is_the_image(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    report = audit(trained(model, seed), [], **UPDATE, **WELL_SEARCHED)
    assert report.verdict.grade in TAKEN, report.verdict
    assert {"GGL001", "GGL002"} <= found(report)
    assert report.captured.labels == private(seed, 1)[1].tolist()


def test_secure_aggregation_alone_does_not_hide_who_is_in_it(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    report = audit(mean(each_image(model, seed, MEMBERS)), [COHORT])
    assert report.verdict.grade in LEAKS, report.verdict
    assert "GGL005" not in found(report)
    assert report.evidence.membership is not None
    assert report.evidence.membership.advantage_lower > 0.05
    assert "Membership in the release is identifiable" in [f.title for f in report.findings]


def test_strong_dp_sgd_on_a_batch_is_safe(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    clip, noise = Clip(bound=1.0), Noise(std=5.0 / MEMBERS)
    context = Context(torch.Generator().manual_seed(seed))
    clipped = [clip.apply(gradient, context) for gradient in each_image(model, seed, MEMBERS)]
    sent = noise.apply(mean(clipped), context)
    recipe = {"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 5.0}
    report = audit(sent, [recipe], **BATCH, **MATCHED, guarantee=PROMISE)
    assert report.verdict.grade in SAFE, report.verdict
    assert not {"GGL001", "GGL002", "GGL005", "GGL006"} & found(report)
    assert report.evidence.guarantee is not None
    assert report.evidence.guarantee.mu == pytest.approx(0.2)


def test_weak_dp_sgd_on_a_batch_is_not_safe(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    clip, noise = Clip(bound=1.0), Noise(std=0.05 / MEMBERS)
    context = Context(torch.Generator().manual_seed(seed))
    clipped = [clip.apply(gradient, context) for gradient in each_image(model, seed, MEMBERS)]
    sent = noise.apply(mean(clipped), context)
    recipe = {"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 0.05}
    report = audit(sent, [recipe], **BATCH, guarantee=PROMISE)
    assert report.verdict.grade not in SAFE, report.verdict
    assert "GGL002" in found(report)
    assert not {"GGL005", "GGL006"} & found(report)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dp_sgd_without_its_noise_is_contradicted(
    model: ClientModel, audit: Callable[..., Report], seed: int, share: float
) -> None:
    """None of it, or half: samples are clipped in both."""
    clip, noise = Clip(bound=1.0), Noise(std=max(share, 1e-9) * 5.0 / MEMBERS)
    context = Context(torch.Generator().manual_seed(seed))
    clipped = [clip.apply(gradient, context) for gradient in each_image(model, seed, MEMBERS)]
    sent = noise.apply(mean(clipped), context)
    recipe = {"name": "dp_sgd", "bound": 1.0, "noise_multiplier": 5.0}
    report = audit(sent, [recipe], **BATCH, **CHECKED, guarantee=PROMISE)
    assert report.verdict.grade == "inconclusive", report.verdict
    assert "contradicts" in report.verdict.reason
    assert "GGL005" in found(report)


def test_noise_of_one_in_place_of_that_of_a_cohort_is_contradicted(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    """The noise multiplier was meant for the sum, and the sum was divided after the noise."""
    context = Context(torch.Generator().manual_seed(seed))
    clipped = [Clip(bound=1.0).apply(g, context) for g in each_image(model, seed, MEMBERS)]
    sent = Noise(std=5.0 / MEMBERS**2).apply(mean(clipped), context)
    recipe = {"name": "dp_fedavg", "bound": 1.0, "noise_multiplier": 5.0, "clients": MEMBERS}
    promise = {**PROMISE, "unit": "client"}
    report = audit(sent, [recipe], **CHECKED, guarantee=promise)
    assert report.verdict.grade == "inconclusive", report.verdict
    assert "GGL005" in found(report)


def test_a_batch_that_is_declared_as_one_image_is_not_safe(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    report = audit(mean(each_image(model, seed, MEMBERS)), [])
    assert report.verdict.grade not in SAFE, report.verdict


def test_one_image_that_is_declared_as_a_cohort_is_not_safe(
    model: ClientModel, audit: Callable[..., Report], seed: int
) -> None:
    (sent,) = each_image(model, seed, 1)
    report = audit(sent, [COHORT])
    assert report.verdict.grade not in SAFE, report.verdict


@pytest.mark.parametrize("lr", [0.1 / 3, 0.3])
def test_an_update_with_another_learning_rate_is_not_safe(
    model: ClientModel, audit: Callable[..., Report], seed: int, lr: float
) -> None:
    report = audit(trained(model, seed, lr), [], **UPDATE)
    assert report.verdict.grade not in SAFE, report.verdict


@pytest.mark.parametrize(
    "labels",
    [
        "told",
        pytest.param(
            "infer",
        ),
    ],
)
def test_an_update_of_the_wrong_sign_is_named(
    model: ClientModel, audit: Callable[..., Report], seed: int, labels: str
) -> None:
    negative = each(lambda tensor: -tensor, trained(model, seed))
    told = "infer" if labels == "infer" else private(seed, 1)[1].tolist()
    report = audit(negative, [], **UPDATE, **WELL_SEARCHED, capture__labels=told)
    assert report.verdict.grade not in SAFE, report.verdict
    assert "declare the other capture.sign" in report.verdict.reason


@pytest.mark.parametrize("declared", ["infer", "told"])
def test_the_order_of_the_labels_is_of_no_importance(
    model: ClientModel, audit: Callable[..., Report], seed: int, declared: str
) -> None:
    labels = private(seed, MEMBERS)[1].tolist()
    gradients = each_image(model, seed, MEMBERS)
    told = "infer" if declared == "infer" else labels
    back = "infer" if declared == "infer" else labels[::-1]
    few = {**BATCH, "evidence__matching_trials": 10, "evidence__reconstruction_trials": 0}
    reports = [
        audit(mean(gradients), [], **few, attack__evaluations=13, capture__labels=told),
        audit(mean(gradients[::-1]), [], **few, attack__evaluations=13, capture__labels=back),
    ]
    first, second = reports
    assert first.evidence.ceiling == second.evidence.ceiling
    assert sorted(first.captured.labels) == sorted(second.captured.labels) == sorted(labels)


@pytest.mark.parametrize("labels", [[1], [1, 2, 3], [1, 2, 3, 4, 5], [1] * 8])
@pytest.mark.parametrize("keys", [BATCH, {"defense": [COHORT]}], ids=["batch", "cohort"])
def test_labels_of_another_number_of_images_are_refused(
    sample: Callable[..., Spec], keys: dict[str, Any], seed: int, labels: list[int]
) -> None:
    with pytest.raises(SpecError, match=f"labels has {len(labels)} entries") as error:
        prepare(sample("undefended", evidence__truth=None, capture__labels=labels, **keys))
    assert error.value.key[:1] == ("capture",)
