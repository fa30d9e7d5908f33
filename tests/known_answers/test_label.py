"""What must come out where it is known how much a gradient tells of the label, at five seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binom, norm
from torch import nn

from ggl_audit.attacks.suite import choose_attacks
from ggl_audit.audit import plan_experiments, run_audit
from ggl_audit.case.preparation import prepare
from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.public_labels import other_order, public_label_doubts
from ggl_audit.experiments.experiment import NotMeasured, Plan
from ggl_audit.experiments.label import INFERENCE, Label
from ggl_audit.experiments.value import Told
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import ImageSet, digits
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.judgement.declared import declare as declared_of
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report
from ggl_audit.report.wording import answers
from ggl_audit.spec import Spec
from tests.conftest import Counter

SEEDS = range(5)
UNREACHABLE = 1e-4

MODEL = """
from torch import nn

def net(classes=2):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, classes)
    )
"""
DP = [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": 1.0}]
NOTHING_LEFT = [{"name": "noise", "std": 1e4}]

Declare = Callable[..., Spec]


def bright(public: ImageSet) -> np.ndarray[Any, Any]:
    return (public.images[:, 0].numpy() * 255).round().astype(np.uint8)


@pytest.fixture
def declare(sample: Declare, tmp_path: Path) -> Declare:
    """A model of two classes: is a digit larger than 4? Its weights are those of a seed."""
    (tmp_path / "models.py").write_text(MODEL)
    there: dict[str, Any] = {}
    exec(MODEL, there)  # noqa: S102

    def declared(seed: int, defense: Sequence[Any], images: int = 1, **keys: Any) -> Spec:
        torch.manual_seed(seed)
        module: nn.Module = there["net"]()
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        public, private = digits("reference"), digits("private")
        np.savez(
            tmp_path / "public.npz",
            images=bright(public),
            labels=(public.labels > 4).long().numpy(),
        )
        chosen = torch.arange(images) + 3 * seed
        logits = module(private.images[chosen] * 2 - 1)
        loss = nn.functional.cross_entropy(logits, (private.labels[chosen] > 4).long())
        gradients = torch.autograd.grad(loss, [*module.parameters()])
        named = zip(dict(module.named_parameters()), gradients, strict=True)
        write_capture(tmp_path / "capture.safetensors", dict(named))
        usual = {
            "model": {
                "factory": f"{tmp_path / 'models.py'}:net",
                "weights": str(tmp_path / "weights.safetensors"),
                "input": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
            },
            "capture__gradient": str(tmp_path / "capture.safetensors"),
            "capture__batch_size": images,
            "evidence__truth": None,
            "evidence__reference": {"npz": str(tmp_path / "public.npz")},
            "evidence__matching_trials": 200,
            "evidence__reconstruction_trials": 0,
            "attack__evaluations": 13,
            "defense": defense,
        }
        return sample("raw", seed=seed, **{**usual, **keys})

    return declared


def asked(spec: Spec) -> tuple[Plan, list[Told]]:
    """What comes out of the experiment alone."""
    case = prepare(spec)
    experiment = Label(case, choose_attacks(case))
    plan = experiment.plan()
    assert isinstance(plan, Plan)
    return plan, [one for group in plan.groups() for one in experiment.run(group, lambda _: None)]


def inferred(told: Sequence[Told]) -> int:
    return sum(one.hits[INFERENCE] for one in told)


def hits(told: Sequence[Told]) -> int:
    return sum(one.hits[one.chosen] for one in told)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("images", [1, 3])
def test_of_noise_nobody_tells_the_label(declare: Declare, seed: int, images: int) -> None:
    plan, told = asked(declare(seed, NOTHING_LEFT, images))
    assert plan.chance == 1 / 2
    assert len(told) == plan.trials == 200
    for name in told[0].hits:
        own = sum(one.hits[name] for one in told)
        assert binom.ppf(UNREACHABLE, 200, 0.5) <= own <= binom.ppf(1 - UNREACHABLE, 200, 0.5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("images", [1, 3])
def test_an_undefended_gradient_always_tells_the_label(
    declare: Declare, seed: int, images: int
) -> None:
    few = {"evidence__matching_trials": 40}
    plan, told = asked(declare(seed, [], images, **few))
    assert hits(told) >= plan.trials - 1
    assert inferred(told) >= plan.trials - 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("multiplier", [1.0, 1.5])
def test_under_differential_privacy_it_is_told_nearly_as_often_as_the_mechanism_allows(
    declare: Declare, seed: int, multiplier: float
) -> None:
    """Between the bound and four fifths of the advantage that it leaves, by the best of them."""
    steps = [DP[0], {"name": "noise", "std": multiplier}]
    plan, told = asked(declare(seed, steps))
    bound = float(norm.cdf(1 / multiplier))
    least = 0.5 + 0.8 * (bound - 0.5)
    assert binom.ppf(UNREACHABLE, plan.trials, least) <= hits(told)
    assert hits(told) <= binom.ppf(1 - UNREACHABLE, plan.trials, bound)
    # The last layer alone tells much less, which is why it is not the ceiling.
    assert hits(told) > 20 + inferred(told)


@pytest.mark.parametrize(
    "steps",
    [
        [{"name": "noise", "std": 0.05}, {"name": "sign"}],
        [*DP[:1], {"name": "noise", "std": 0.1}, {"name": "clip", "bound": 0.5}],
        [{"name": "noise", "std": 0.05, "distribution": "laplace"}],
        [{"name": "qsgd", "levels": 2}],
        [{"name": "sparsify", "fraction": 0.9}],
    ],
    ids=lambda steps: "-".join(step["name"] for step in steps),
)
def test_whatever_is_declared_no_classifier_falls_behind_label_inference(
    declare: Declare, steps: list[Any]
) -> None:
    _, told = asked(declare(0, steps, evidence__matching_trials=60))
    best = measure_rate(hits(told), 60, 0.5, attacks=2)
    assert best.advantage_lower > 0.25
    assert hits(told) >= inferred(told) - 3


def test_members_of_a_cohort_are_asked_about_too(declare: Declare) -> None:
    steps = [*DP[:1], {"name": "secure_aggregation", "clients": 3}, {"name": "noise", "std": 0.1}]
    keys = {"capture__stage": "defended", "evidence__matching_trials": 60}
    _, told = asked(declare(0, steps, **keys))
    assert measure_rate(hits(told), 60, 0.5, attacks=2).advantage_lower > 0.5


def audit(spec: Spec) -> Report:
    return run_audit(spec, Counter())


def test_a_defense_that_hides_the_image_and_not_the_label_does_not_pass(declare: Declare) -> None:
    report = audit(declare(0, DP))
    verdict, evidence = report.verdict, report.evidence
    assert verdict.of("image").grade in ("A", "B")
    assert (verdict.grade, verdict.exit_code, verdict.question) == ("C", 1, "label")
    label = verdict.of("label")
    assert (label.grade, label.findings) == ("C", ["GGL003"])
    assert label.ceiling == evidence.label_ceiling
    assert label.bound == pytest.approx(norm.cdf(1))
    assert label.ceiling is not None
    assert label.floor is not None
    assert label.floor.successes < label.ceiling.successes
    assert evidence.label_classifier in verdict.reason
    assert any("Label: C, which decides." in said for said in answers(report))


def test_a_label_that_is_public_is_not_counted_and_the_report_says_so(declare: Declare) -> None:
    report = audit(declare(0, DP, evidence__public=["label"]))
    assert (report.verdict.grade, report.verdict.exit_code) in [("A", 0), ("B", 0)]
    label = report.verdict.of("label")
    assert (label.grade, label.public) == (None, True)
    said = answers(report)[1]
    assert (
        said
        == "Label: not counted. It is no secret, as evidence.public says, and was not asked for."
    )
    assert said in render_html(report)
    assert report.evidence.not_measured["label_ceiling"] == "evidence.public names it"
    assert not [one for one in report.findings if one.id == "GGL003"]


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_strong_noise_after_a_clip_passes_both_questions(declare: Declare, seed: int) -> None:
    report = audit(declare(seed, [DP[0], {"name": "noise", "std": 6.0}]))
    assert {one.grade for one in report.verdict.answers} <= {"A", "B"}, report.verdict
    assert report.verdict.exit_code == 0


def test_a_label_that_was_not_measured_is_no_pass(declare: Declare) -> None:
    """The public images are of one class, so that nothing tells how often classes are told."""
    public = digits("reference")
    spec = declare(0, [DP[0], {"name": "noise", "std": 6.0}])
    path = spec.evidence.reference.npz if spec.evidence.reference else None
    assert path is not None
    np.savez(path, images=bright(public), labels=np.zeros(len(public), dtype=int))
    report = audit(spec)
    assert report.verdict.of("image").grade in ("A", "B")
    assert (report.verdict.grade, report.verdict.exit_code) == ("inconclusive", 3)
    assert "fewer than two classes" in report.verdict.reason
    plan = Label(case := prepare(spec), choose_attacks(case)).plan()
    assert isinstance(plan, NotMeasured)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_that_are_shuffled_are_named_and_true_ones_are_not(
    declare: Declare, seed: int
) -> None:
    """The gradients of both tell the labels that they were computed with, so those cannot show."""
    public, random = digits("reference"), np.random.default_rng(seed)
    model = load_model(declare(seed, []), torch.device("cpu"))
    larger = ImageSet(public.images, (public.labels > 4).long(), "public.npz")
    assert public_label_doubts(model, larger, random) == []
    order = torch.as_tensor(random.permutation(len(public)))
    shuffled = ImageSet(larger.images, larger.labels[order], "public.npz")
    (doubt,) = public_label_doubts(model, shuffled, random)
    assert "differ no more than those of shuffled" in doubt.text
    few = ImageSet(shuffled.images[:50], shuffled.labels[:50], "public.npz")
    assert public_label_doubts(model, few, random) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_textures_with_the_same_mean_image_are_not_doubted(declare: Declare, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rough = torch.rand(400, 1, 16, 16, generator=draw)
    smooth = torch.nn.functional.avg_pool2d(rough, 3, stride=1, padding=1)
    labels = torch.arange(400) % 2
    images = torch.where(labels.view(-1, 1, 1, 1) == 0, rough, smooth)
    model = load_model(declare(seed, []), torch.device("cpu"))
    textures = ImageSet(images, labels, "public.npz")
    assert public_label_doubts(model, textures, np.random.default_rng(seed)) == []


def test_a_class_with_few_public_images_is_counted_as_left_out(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    """It may be the one that is told best, so that what the others show earns no pass."""
    public = digits("reference")
    rare = np.flatnonzero(public.labels.numpy() == 9)[7:]
    kept = np.delete(np.arange(len(public)), rare)
    file = tmp_path / "public.npz"
    np.savez(file, images=bright(public)[kept], labels=public.labels.numpy()[kept])
    for reference, left_out in (({"bundled": "digits"}, 0), ({"npz": str(file)}, 1)):
        case = prepare(sample("dp", evidence__reference=reference))
        experiments = plan_experiments(case)
        declared = declared_of(case, experiments[0].suite, experiments)
        assert declared.classes_left_out == left_out
        plan = declared.plans[Label.name]
        assert isinstance(plan, Plan)
        assert plan.chance == pytest.approx(1 / (10 - left_out))


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_in_another_order_are_named_where_the_model_is_trained(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (200,), generator=draw)
    predictions = 6.0 * torch.nn.functional.one_hot(labels, 10) + torch.randn(200, 10)
    order = torch.randperm(10, generator=draw).roll(1)
    assert other_order(predictions, labels) is None
    found = other_order(predictions, order[labels])
    assert found is not None
    assert found[1] < 1 < found[0]
    # Of a model that was not trained nothing is said, whatever it happens to prefer.
    untrained = 0.3 * torch.nn.functional.one_hot(order[labels], 10) + 0.1 * torch.randn(200, 10)
    assert other_order(untrained, labels) is None


def test_shuffled_labels_are_no_pass(declare: Declare) -> None:
    public = digits("reference")
    spec = declare(0, [DP[0], {"name": "noise", "std": 6.0}], evidence__matching_trials=100)
    assert spec.evidence.reference is not None
    assert spec.evidence.reference.npz is not None
    order = np.random.default_rng(0).permutation(len(public))
    labels = (public.labels > 4).long().numpy()[order]
    np.savez(spec.evidence.reference.npz, images=bright(public), labels=labels)
    report = audit(spec)
    assert (report.verdict.grade, report.verdict.exit_code) == ("inconclusive", 3)
    assert "differ no more than those of shuffled" in report.verdict.reason
    assert "GGL009" in [one.id for one in report.findings]
