from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from ggl_audit.attack.labels import infer_labels, infer_ones, why_not_inferred
from ggl_audit.attack.matching import Matching
from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient, norm
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.case import Case
from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Pipeline
from ggl_audit.errors import AuditError, InputError, SpecError
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.identification import match
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, index_rows, read_image_set, to_picture
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.spec_file import read_spec
from ggl_audit.spec import ImageSetSpec, LossSpec, Spec
from tests.conftest import Counter

CPU = torch.device("cpu")

CODE = """
import torch
import torch.nn.functional as F
from torch import nn

def classifier(outputs=10, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(),
                         nn.Linear(16, outputs, bias=bias))

class Segmenter(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, classes, 1)
    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

def focal(outputs, targets, gamma=2.0):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()

def summed(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")

def packed(outputs, targets):
    return F.cross_entropy(outputs[:, :10], targets) + 0.1 * outputs[:, 10:].square().mean()

def each(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")

class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 256)
    def forward(self, latents):
        return torch.sigmoid(3 * self.last(latents)).view(-1, 1, 16, 16)
"""

Declare = Callable[..., Spec]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture
def declare(tmp_path: Path) -> Declare:
    """A spec with the user's own code, digits with given labels as reference, and a capture."""
    (tmp_path / "code.py").write_text(CODE)

    def read(
        factory: str,
        loss: Any,
        reference: np.ndarray[Any, Any] | None = None,
        targets: np.ndarray[Any, Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        **capture: Any,
    ) -> Spec:
        public = digits("reference")
        images = (public.images * 255).round().byte().numpy()[:, 0]
        own = public.labels.numpy() if reference is None else reference
        np.savez(tmp_path / "public.npz", images=images[: len(own)], labels=own)
        if targets is not None:
            np.save(tmp_path / "targets.npy", targets)
            capture["targets"] = "targets.npy"
        declared = {
            "version": 1,
            "model": {
                "factory": f"code.py:{factory}",
                "kwargs": kwargs or {},
                "input": {"shape": [1, 16, 16]},
                "loss": loss,
            },
            "capture": {"gradient": "capture.safetensors", **capture},
            "prior": {
                "factory": "code.py:Generator",
                "latent": {"shape": [4]},
                "output_range": [0, 1],
            },
            "attack": {"evaluations": 26},
            "evidence": {
                "reference": {"npz": "public.npz"},
                "candidates": 8,
                "matching_trials": 12,
                "reconstruction_trials": 2,
            },
            "device": "cpu",
        }
        (tmp_path / "audit.yaml").write_text(yaml.safe_dump(declared))
        return read_spec(tmp_path / "audit.yaml")

    return read


def plain_gradient(
    model: ClientModel, loss: Loss, images: torch.Tensor, targets: torch.Tensor
) -> Gradient:
    """An ordinary backward pass of the module and the loss."""
    module = model.module
    module.zero_grad()
    loss(module(images), targets).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def _same(found: Gradient, expected: Gradient) -> None:
    whole = norm(expected)
    assert whole > 0
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * whole, name


def _focal(outputs: torch.Tensor, targets: torch.Tensor, gamma: int = 3) -> torch.Tensor:
    chosen = outputs.softmax(1)[torch.arange(len(targets)), targets]
    return (-((1 - chosen) ** gamma) * chosen.log()).mean()


WEIGHT = [0.2, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 0.5, 1.0, 1.0]


def _binary(outputs: torch.Tensor, labels: torch.Tensor, ones: float = 1.0) -> torch.Tensor:
    """The formula, with the loss of ones times so much."""
    p = torch.sigmoid(outputs[:, 0])
    return torch.where(labels == 1, -ones * p.log(), -(1 - p).log()).mean()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("declared", "outputs", "loss"),
    [
        ("cross_entropy", 10, nn.CrossEntropyLoss()),
        ({"label_smoothing": 0.1}, 10, nn.CrossEntropyLoss(label_smoothing=0.1)),
        ({"weight": WEIGHT}, 10, nn.CrossEntropyLoss(torch.tensor(WEIGHT))),
        (
            {"weight": WEIGHT, "reduction": "sum", "label_smoothing": 0.2},
            10,
            nn.CrossEntropyLoss(torch.tensor(WEIGHT), reduction="sum", label_smoothing=0.2),
        ),
        (
            {"reduction": "sum", "scale": 0.5},
            10,
            lambda o, t: 0.5 * len(o) * nn.CrossEntropyLoss()(o, t),
        ),
        ("binary_cross_entropy", 1, _binary),
        (
            {"name": "binary_cross_entropy", "pos_weight": [3.0], "reduction": "sum"},
            1,
            lambda o, t: len(o) * _binary(o, t, 3.0),
        ),
        ({"factory": "code.py:focal", "kwargs": {"gamma": 3.0}}, 10, _focal),
        ("code.py:focal", 10, lambda o, t: _focal(o, t, 2)),
        (
            {"factory": "code.py:summed", "reduction": "sum"},
            10,
            nn.CrossEntropyLoss(reduction="sum"),
        ),
        (
            {"factory": "torch.nn:CrossEntropyLoss", "kwargs": {"label_smoothing": 0.3}},
            10,
            nn.CrossEntropyLoss(label_smoothing=0.3),
        ),
    ],
)
def test_losses_of_class_indices_are_those_of_pytorch(
    declared: Any, outputs: int, loss: Loss, count: int, declare: Declare
) -> None:
    classes = max(2, outputs)
    spec = declare("classifier", declared, kwargs={"outputs": outputs}, batch_size=count)
    model = load_model(spec, CPU)
    assert model.classes == classes
    images = torch.rand(2, count, 1, 16, 16)
    labels = torch.arange(2 * count).view(2, count) % classes
    found = ClientGradients(model, Pipeline()).gradients(images, labels)
    for index in range(2):
        own = {name: tensor[index] for name, tensor in found.items()}
        _same(own, plain_gradient(model, loss, images[index], labels[index]))


def test_outputs_that_are_no_logits_are_no_classes(declare: Declare) -> None:
    spec = declare("classifier", "code.py:packed", kwargs={"outputs": 13}, labels=[9])
    model = load_model(spec, CPU)
    assert model.classes == 10
    image = torch.rand(1, 1, 16, 16)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, rest = outputs.split([10, 3], dim=1)
        return nn.CrossEntropyLoss()(logits, targets) + 0.1 * rest.square().mean()

    write_capture(
        spec.folder / "capture.safetensors", plain_gradient(model, loss, image, torch.tensor([9]))
    )
    assert prepare(spec).audited.labels == [9]
    few = declare("classifier", "code.py:packed", np.arange(40) % 4, None, {"outputs": 13})
    assert load_model(few, CPU).classes == 4
    with pytest.raises(SpecError, match=r"outputs \(1, 13\) and targets \(1,\) \(IndexError"):
        load_model(
            declare("classifier", "code.py:packed", kwargs={"outputs": 13}, labels=[11]), CPU
        )


def several_labels(count: int) -> np.ndarray[Any, Any]:
    return (np.arange(count)[:, None] // np.array([1, 2, 4]) % 2).astype(np.uint8)


def angles(count: int) -> np.ndarray[Any, Any]:
    return np.stack([np.sin(np.arange(count)), np.cos(np.arange(count))], axis=1)


def masks(count: int) -> np.ndarray[Any, Any]:
    ramp = np.add.outer(np.arange(16), np.arange(16)) // 6 % 3
    return np.stack([np.roll(ramp, shift, axis=0) for shift in range(count)]).astype(np.uint8)


TASKS = {
    "several labels": ("classifier", "binary_cross_entropy", {"outputs": 3}, several_labels),
    "regression": ("classifier", "torch.nn:MSELoss", {"outputs": 2}, angles),
    "segmentation": ("Segmenter", "cross_entropy", {"classes": 3}, masks),
}
PLAIN: dict[str, Loss] = {
    "several labels": lambda o, t: nn.BCEWithLogitsLoss()(o, t.float()),
    "regression": lambda o, t: (o - t.float()).square().mean(),
    "segmentation": lambda o, t: -o.log_softmax(1).gather(1, t.long()[:, None]).mean(),
}


def _task(task: str, declare: Declare, captured: Sequence[int] = (0,), **capture: Any) -> Spec:
    factory, loss, kwargs, make = TASKS[task]
    rows = make(500)
    return declare(factory, loss, rows, rows[list(captured)], kwargs, **capture)


@pytest.mark.parametrize("task", TASKS)
def test_targets_reach_the_loss(task: str, declare: Declare) -> None:
    spec = _task(task, declare, [3, 5], batch_size=2)
    model = load_model(spec, CPU)
    assert model.targets is not None
    rows = torch.as_tensor(TASKS[task][3](500))
    reference = index_rows(rows)
    images = torch.rand(3, 2, 1, 16, 16)
    chosen = torch.tensor([[3, 5], [7, 1], [40, 41]])
    found = ClientGradients(model, Pipeline()).gradients(images, reference.labels[chosen])
    for index in range(3):
        own = {name: tensor[index] for name, tensor in found.items()}
        _same(own, plain_gradient(model, PLAIN[task], images[index], rows[chosen[index]]))
    captured = torch.tensor(model.targets.captured)
    torch.testing.assert_close(model.targets.rows[captured].double(), rows[[3, 5]].double())


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 30), st.integers(2, 4)), elements=st.integers(0, 1)
    )
)
def test_equal_rows_of_several_labels_are_one_class(rows: np.ndarray[Any, Any]) -> None:
    table = index_rows(torch.from_numpy(rows))
    assert table.shared
    assert torch.equal(table.rows[table.labels], torch.from_numpy(rows).float())
    assert len(table.rows) == len({tuple(row) for row in rows.tolist()})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_other_targets_are_each_image_s_own(dtype: Any) -> None:
    rows = torch.from_numpy(np.zeros((5, 4, 4), dtype=dtype))
    table = index_rows(rows)
    assert not table.shared
    assert table.labels.tolist() == [0, 1, 2, 3, 4]
    assert table.rows.dtype == (torch.int64 if dtype is np.int64 else torch.float32)


def _audited(spec: Spec, folder: Path, labels: Sequence[int] = ()) -> Case:
    """Prepares an audit of what one of the private digits gives."""
    private = digits("private")
    count = spec.capture.batch_size
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, image in zip(paths, private.images, strict=False):
        to_picture(image).save(path)
    write_capture(folder / "capture.safetensors", capture_gradient(spec, paths, labels))
    return prepare(spec)


def _identifies(case: Case) -> None:
    """Candidate matching without a defense finds every canary, among targets that are told."""
    trials = case.trials.first(6)
    assert len(trials) == 6
    sent = case.client.send(*trials.members, case.contexts("test", range(6)))
    matching = Matching(case.model, case.defense)
    assert match(matching, trials, sent, np.zeros(6)) == [1] * 6


@pytest.mark.parametrize("task", TASKS)
def test_an_audit_of_more_than_a_class(task: str, declare: Declare, tmp_path: Path) -> None:
    case = _audited(_task(task, declare), tmp_path)
    assert case.spec.capture.labels is None
    assert case.model.targets is not None
    assert case.audited.labels == list(case.model.targets.captured)
    _identifies(case)
    one_group = task != "several labels"
    assert case.reference.one_group == one_group
    labels = case.reference.labels[case.trials.candidates]
    assert bool((labels == labels[:, :1]).all()) != one_group
    # What is told is the canary's target, for every candidate.
    assert torch.equal(case.trials.labels, labels[:, 0])


@pytest.mark.parametrize("task", ["several labels", "regression"])
def test_a_report_on_more_than_a_class(task: str, declare: Declare, tmp_path: Path) -> None:
    _audited(_task(task, declare), tmp_path)
    report = run_audit(_task(task, declare), Counter())
    assert report.evidence.ceiling is not None
    assert report.evidence.ceiling.successes == 12
    assert report.evidence.label is report.evidence.label_ceiling is None
    for part in ("label", "label_ceiling"):
        assert "more than a class" in report.evidence.not_measured[part]
    assert report.verdict.of("label").grade == "inconclusive"
    assert report.captured.label_method == "declared; a number stands for a row of targets"
    loss = "binary cross-entropy" if task == "several labels" else "torch.nn:MSELoss"
    assert any(f"mode, {loss} times 1" in said for said in report.assumptions)


def test_the_private_image_is_compared_under_its_target(declare: Declare, tmp_path: Path) -> None:
    _audited(_task("regression", declare), tmp_path)
    for picture, outcome in (("0.png", "agrees"), ("other.png", "contradicts")):
        to_picture(digits("private").images[7]).save(tmp_path / "other.png")
        spec = read_spec(tmp_path / "audit.yaml", [("evidence.truth", str(tmp_path / picture))])
        checks = {check.step: check.outcome for check in prepare(spec).audited.checks}
        assert checks[PRIVATE_IMAGE] == outcome


def test_a_client_s_own_code_is_given_targets(declare: Declare, tmp_path: Path) -> None:
    _audited(_task("regression", declare), tmp_path)
    (tmp_path / "client.py").write_text(
        "def step(model, images, targets):\n"
        "    (model(images) - targets).square().mean().backward()\n"
        "    return {name: p.grad for name, p in model.named_parameters()}\n"
    )
    spec = read_spec(tmp_path / "audit.yaml", [("client", {"step": "client.py:step"})])
    assert prepare(spec).doubts == []


def test_an_audit_of_one_logit(declare: Declare, tmp_path: Path) -> None:
    labels = digits("reference").labels.numpy() % 2
    spec = declare("classifier", "binary_cross_entropy", labels, kwargs={"outputs": 1})
    for label in (0, 1):
        case = _audited(spec, tmp_path, [label])
        assert case.model.classes == 2
        assert case.audited.labels == [label]  # inferred
        _identifies(case)


def test_an_audit_of_several_inferred_labels(declare: Declare, tmp_path: Path) -> None:
    factory, loss, kwargs, make = TASKS["several labels"]
    rows = make(500)
    for own in (1, 6):
        told = declare(factory, loss, rows, rows[[own]], kwargs)
        expected = _audited(told, tmp_path).audited.labels
        inferring = declare(factory, loss, rows, None, kwargs)
        assert prepare(inferring).audited.labels == expected
    unheard = [row for row in rows if row.tolist() != rows[6].tolist()]
    with pytest.raises(SpecError, match=r"the labels 1, 2 apply, .* no image of public.npz"):
        prepare(declare(factory, loss, np.stack(unheard), None, kwargs))


@pytest.mark.parametrize("bias", [True, False])
def test_the_sign_of_the_error_tells_the_ones(bias: bool, declare: Declare) -> None:
    kwargs = {"outputs": 3, "bias": bias}
    model = load_model(
        declare("classifier", "binary_cross_entropy", several_labels(8), kwargs=kwargs), CPU
    )
    assert model.head is not None
    assert model.targets is not None
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8)
    found = infer_ones(ClientGradients(model, Pipeline()).gradients(images, labels), model.head)
    assert torch.equal(found, model.targets.rows[labels].bool())
    assert why_not_inferred(model, 1) is None
    assert "several images" in str(why_not_inferred(model, 2))


@pytest.mark.parametrize("loss", [{"weight": WEIGHT}, {"weight": WEIGHT, "reduction": "sum"}])
def test_class_weights_leave_a_single_label_to_be_inferred(loss: Any, declare: Declare) -> None:
    model = load_model(declare("classifier", loss), CPU)
    assert model.head is not None
    labels = torch.arange(10)
    gradients = ClientGradients(model, Pipeline()).gradients(torch.rand(10, 1, 16, 16), labels)
    assert torch.equal(infer_labels(gradients, model.head), labels)
    assert why_not_inferred(model, 1) is None
    assert "several images" in str(why_not_inferred(model, 2))


def test_label_smoothing_hides_the_label_of_a_confident_image(declare: Declare) -> None:
    model = load_model(declare("classifier", {"label_smoothing": 0.2}), CPU)
    assert model.head is not None
    assert model.head.bias is not None
    with torch.no_grad():  # sure of class 3, whatever the image
        model.parameters[model.head.bias][3] += 20
    gradients = ClientGradients(model, Pipeline()).gradients(
        torch.rand(1, 1, 16, 16), torch.tensor([3])
    )
    assert infer_labels(gradients, model.head).tolist() != [3]
    assert "does not tell the label" in str(why_not_inferred(model, 1))


@pytest.mark.parametrize("task", ["regression", "segmentation"])
def test_targets_are_never_inferred(task: str, declare: Declare, tmp_path: Path) -> None:
    _audited(_task(task, declare), tmp_path)
    factory, loss, kwargs, make = TASKS[task]
    with pytest.raises(SpecError, match=r"cannot be inferred.*Declare capture.targets") as error:
        prepare(declare(factory, loss, make(500), None, kwargs))
    assert error.value.key == ("capture", "labels")


@pytest.mark.parametrize("loss", [{"label_smoothing": 0.1}, "code.py:focal"])
def test_labels_that_a_loss_may_hide_have_to_be_declared(
    loss: Any, declare: Declare, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"does not tell the label.*labels: \[3\]"):
        _audited(declare("classifier", loss), tmp_path, [3])
    assert prepare(declare("classifier", loss, labels=[3])).audited.labels == [3]


@pytest.mark.parametrize(
    ("loss", "key", "words"),
    [
        ("code.py:gone", "factory", "no callable 'gone'"),
        ("gone.py:focal", "factory", "is not a file"),
        ("code.py:each", None, r"returned \(2,\); expected a scalar"),
        ({"factory": "torch.nn:CrossEntropyLoss", "kwargs": {"x": 1}}, "factory", "TypeError"),
        ({"factory": "code.py:focal", "kwargs": {"x": 1}}, None, "TypeError"),
        ({"weight": [1.0, 2.0]}, None, "cannot be taken of outputs"),
        ("code.py:summed", "reduction", "mean, but .* 2 times as large"),
        ({"factory": "code.py:focal", "reduction": "sum"}, "reduction", "sum, but .* 1 times"),
    ],
)
def test_a_loss_that_cannot_be_used_is_named(
    loss: Any, key: str | None, words: str, declare: Declare
) -> None:
    with pytest.raises(SpecError, match=words) as error:
        load_model(declare("classifier", loss, batch_size=2), CPU)
    assert error.value.key == (("model", "loss") if key is None else ("model", "loss", key))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "hinge"}, "name"),
        ({"name": "cross_entropy", "factory": "code.py:focal"}, "either name or factory"),
        ({"name": "binary_cross_entropy", "label_smoothing": 0.1}, "are for cross_entropy"),
        ({"pos_weight": [1.0]}, "is for binary_cross_entropy"),
        ({"kwargs": {"x": 1}}, "are for a factory"),
    ],
)
def test_a_loss_is_declared_in_one_way(loss: Any, words: str, declare: Declare) -> None:
    with pytest.raises(SpecError, match=words):
        declare("classifier", loss)


def test_outputs_that_no_loss_fits(declare: Declare) -> None:
    with pytest.raises(SpecError, match=r"returned \(1, 1\).*expected logits \(n, classes\)"):
        load_model(declare("classifier", "cross_entropy", kwargs={"outputs": 1}), CPU)
    with pytest.raises(SpecError, match=r"returned \(1, 10\).*one logit an image"):
        load_model(declare("classifier", "binary_cross_entropy"), CPU)
    with pytest.raises(SpecError, match=r"outputs \(1, 10\) and targets \(1, 3\)"):
        load_model(declare("classifier", "binary_cross_entropy", several_labels(9)), CPU)
    with pytest.raises(SpecError, match="UserWarning: Using a target size"):
        load_model(
            declare("classifier", "torch.nn:MSELoss", np.arange(9.0), kwargs={"outputs": 1}), CPU
        )


def test_targets_that_do_not_belong_to_the_reference_set(declare: Declare, tmp_path: Path) -> None:
    own, mask = several_labels(500), masks(500)
    bce = ("classifier", "binary_cross_entropy")
    with pytest.raises(SpecError, match=r"labels of evidence\.reference are class indices"):
        load_model(declare("classifier", "cross_entropy", None, own[:1]), CPU)
    with pytest.raises(SpecError, match=r"rows have the shape \(2,\), .* \(3,\)"):
        load_model(declare(*bce, own, own[:1, :2], {"outputs": 3}), CPU)
    with pytest.raises(SpecError, match="give labels or targets, not both"):
        declare(*bce, own, own[:1], {"outputs": 3}, labels=[1])
    np.savez(tmp_path / "odd.npz", images=np.zeros((5, 16, 16), np.uint8), labels=own[:3])
    with pytest.raises(InputError, match=r"odd.npz: labels has 3 rows; expected 5"):
        read_image_set(
            ImageSetSpec(npz=Path("odd.npz")), tmp_path, (), "reference", None, targets=True
        )
    spec = declare("Segmenter", "cross_entropy", mask, mask[:2])
    with pytest.raises(AuditError, match="2 labels; 1"):
        _audited(spec, tmp_path)
    _audited(declare("Segmenter", "cross_entropy", mask, mask[:1]), tmp_path)
    with pytest.raises(SpecError, match="targets has 2 entries; the capture is made of 1"):
        prepare(declare("Segmenter", "cross_entropy", mask, mask[:2]))
    with pytest.raises(SpecError, match="class indices, but reference labels are not"):
        prepare(declare("Segmenter", "cross_entropy", mask, labels=[1]))


def test_targets_need_a_reference_set_and_a_prior_without_classes(
    declare: Declare, tmp_path: Path
) -> None:
    mask = masks(500)
    _audited(declare("Segmenter", "cross_entropy", mask, mask[:1]), tmp_path)
    declared = yaml.safe_load((tmp_path / "audit.yaml").read_text())
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({**declared, "prior": {"bundled": "digits"}}))
    with pytest.raises(SpecError) as error:
        prepare(read_spec(path))
    assert error.value.key == ("prior",)
    del declared["evidence"]["reference"]
    path.write_text(yaml.safe_dump(declared))
    with pytest.raises(SpecError, match="samples have no such targets") as error:
        prepare(read_spec(path))
    assert error.value.key == ("evidence", "reference")


@pytest.mark.parametrize("task", ["own loss", "segmentation"])
def test_images_are_not_mixed_where_their_targets_cannot_be(
    task: str, declare: Declare, tmp_path: Path
) -> None:
    if task == "own loss":
        declare("classifier", "code.py:focal", batch_size=2)
    else:
        _task(task, declare, [0, 1], batch_size=2)
    spec = read_spec(tmp_path / "audit.yaml", [("defense", [{"name": "mixup"}])])
    defense, model = load_client(spec, CPU)
    with pytest.raises(SpecError, match="may change what they are to give"):
        Matching(model, defense)


def test_mixed_targets_are_means(declare: Declare) -> None:
    spec = _task("several labels", declare, [0, 1], batch_size=2)
    model = load_model(spec, CPU)
    mixed = model.mixable_targets_of(torch.tensor([0, 1]))
    assert mixed is not None
    assert mixed.is_floating_point()
    one_logit = load_model(
        declare("classifier", "binary_cross_entropy", kwargs={"outputs": 1}, batch_size=2), CPU
    )
    images = torch.rand(2, 1, 16, 16)
    half = one_logit.loss(one_logit.parameters, images, torch.tensor([0.5, 0.5]))
    ends = [one_logit.loss(one_logit.parameters, images, torch.tensor([e, e])) for e in (0, 1)]
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)


def test_the_short_form_of_a_loss() -> None:
    assert LossSpec(name="cross_entropy").is_plain
    assert not LossSpec(label_smoothing=0.1).is_plain
    assert str(LossSpec(name="binary_cross_entropy")) == "binary cross-entropy"
    assert str(LossSpec(factory="code.py:focal")) == "code.py:focal"


@pytest.mark.parametrize("task", ["one logit", "regression"])
def test_a_sub_model_is_tried_with_the_declared_loss(
    task: str, declare: Declare, tmp_path: Path
) -> None:
    if task == "one logit":
        declare("classifier", "binary_cross_entropy", kwargs={"outputs": 1})
    else:
        _task(task, declare)
    steps = [("defense", [{"name": "federated_dropout", "kept": 0.5}])]
    defense, model = load_client(read_spec(tmp_path / "audit.yaml", steps), CPU)
    ClientGradients(model, defense).try_out()


def test_class_weights_make_images_depend_on_each_other(declare: Declare) -> None:
    weighted = {"name": "cross_entropy", "weight": [1.0] * 5 + [20.0] * 5}
    for loss, adds_up in (("cross_entropy", True), (weighted, False)):
        spec = declare("classifier", loss, kwargs={"outputs": 10}, batch_size=2, labels=[5, 3])
        assert ClientGradients(load_model(spec, CPU), Pipeline()).adds_up == adds_up


def test_the_tensors_of_ones_own_loss_follow_the_model(declare: Declare, tmp_path: Path) -> None:
    (tmp_path / "weighted.py").write_text(
        "import torch\n"
        "class Weighted(torch.nn.CrossEntropyLoss):\n"
        "    def __init__(self):\n"
        "        super().__init__(weight=torch.arange(1.0, 11.0))\n"
    )
    spec = declare("classifier", "weighted.py:Weighted", kwargs={"outputs": 10}, labels=[3])
    for dtype in (torch.float32, torch.float64):
        model = load_model(spec, CPU, dtype)
        images = torch.rand(1, 1, 16, 16, dtype=dtype)
        found = ClientGradients(model, Pipeline()).gradients(images, torch.tensor([3]))
        assert all(tensor.dtype == dtype for tensor in found.values())


def test_a_layer_that_is_used_twice_is_no_head(declare: Declare, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(
        "import torch\n"
        "class Twice(torch.nn.Module):\n"
        "    def __init__(self, times):\n"
        "        super().__init__()\n"
        "        self.times, self.first = times, torch.nn.Linear(256, 10)\n"
        "        self.mix = torch.nn.Linear(10, 10)\n"
        "    def forward(self, images):\n"
        "        values = self.first(images.flatten(1))\n"
        "        for _ in range(self.times):\n"
        "            values = self.mix(values.tanh())\n"
        "        return values\n"
    )
    for times in (1, 2):
        declare("classifier", "cross_entropy", kwargs={"outputs": 10})
        factory = [("model.factory", "twice.py:Twice"), ("model.kwargs", {"times": times})]
        head = load_model(read_spec(tmp_path / "audit.yaml", factory), CPU).head
        assert (head is None) == (times == 2)
