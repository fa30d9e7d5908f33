"""Running statistics that clients send, against PyTorch's own layers after a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import stack
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.errors import InputError, SpecError
from ggl_audit.evidence.covered_statistics import OVER_EVERYTHING
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.spec import Spec

MODELS = """
import torch
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(4), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 10)
    def forward(self, x):
        return self.head(self.norm(self.two(self.norm(self.one(x)).relu())).mean((2, 3)))

class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(256, 10)
        self.register_buffer("usual", torch.ones(256))
    def forward(self, x):
        return self.head(self.body(x))

def net(kind="batch", momentum=0.1):
    torch.manual_seed(3)
    if kind == "twice":
        return Twice()
    if kind == "averaging":
        return Averaging()
    if kind == "flat":
        layer = nn.BatchNorm1d(256, momentum=momentum)
        return nn.Sequential(nn.Flatten(), layer, nn.Linear(256, 10))
    layer = {
        "batch": nn.BatchNorm2d,
        "instance": lambda n, momentum: nn.InstanceNorm2d(n, momentum, track_running_stats=True),
    }[kind]
    return nn.Sequential(
        layer(1, momentum=momentum), nn.Conv2d(1, 6, 3), layer(6, momentum=momentum), nn.SiLU(),
        nn.Conv2d(6, 6, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(216, 10),
    )
"""
LR, SIZE = 0.1, 4

Declare = Callable[..., Spec]


def own_model(**kwargs: Any) -> nn.Module:
    there: dict[str, Any] = {}
    exec(MODELS, there)  # noqa: S102
    module: nn.Module = there["net"](**kwargs)
    return module


def private() -> tuple[torch.Tensor, torch.Tensor]:
    data = digits("private")
    return data.images[:SIZE], data.labels[:SIZE]


def trained(module: nn.Module, epochs: int = 1, size: int = SIZE) -> nn.Module:
    """The module after PyTorch's own loop."""
    images, labels = private()
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), LR)
    for _ in range(epochs):
        for part in torch.arange(SIZE).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images[part] * 2 - 1), labels[part]).backward()
            optimizer.step()
    return module


@pytest.fixture
def declare(sample: Declare, tmp_path: Path) -> Callable[..., Spec]:
    """A spec of a model in a file, of which `after` is what a client sent."""
    (tmp_path / "models.py").write_text(MODELS)
    images, labels = private()
    truths = [tmp_path / f"{index}.png" for index in range(SIZE)]
    for path, image in zip(truths, images, strict=True):
        write_image(path, image)

    def read(after: dict[str, torch.Tensor], kwargs: dict[str, Any], **keys: Any) -> Spec:
        save_file(own_model(**kwargs).state_dict(), tmp_path / "before.safetensors")
        save_file({n: t.contiguous() for n, t in after.items()}, tmp_path / "after.safetensors")
        usual = {
            "model__factory": f"{tmp_path / 'models.py'}:net",
            "model__kwargs": kwargs,
            "model__weights": str(tmp_path / "before.safetensors"),
            "model__mode": "train",
            "capture__gradient": None,
            "capture__after": str(tmp_path / "after.safetensors"),
            "capture__kind": "update",
            "capture__batch_size": SIZE,
            "capture__labels": labels.tolist(),
            "capture__local": {"lr": LR},
            "evidence__truth": [*map(str, truths)],
        }
        return sample("undefended", **{**usual, **keys})

    return read


def outcome(case: Case) -> str:
    (check,) = [check for check in case.audited.checks if check.step == "the private image"]
    return check.outcome


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7},
        {"kind": "flat"},
        {"kind": "instance"},
        {"kind": "twice"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("epochs", "size"), [(1, 4), (3, 2)])
def test_candidates_give_the_statistics_of_a_plain_loop(
    declare: Declare, tmp_path: Path, kwargs: dict[str, Any], epochs: int, size: int
) -> None:
    before = own_model(**kwargs)
    after = trained(before, epochs, size).state_dict()
    local = {"lr": LR, "epochs": epochs, "batch_size": size}
    case = prepare(declare(after, kwargs, capture__local=local))
    statistics = case.model.statistics
    assert statistics is not None
    images, labels = private()
    computed = ClientGradients(case.model, case.defense).gradients(images[None], labels[None])
    for name in statistics.names:
        changed = before.state_dict()[name] - after[name]
        torch.testing.assert_close(
            computed[name][0] / statistics.unit, changed, rtol=1e-4, atol=1e-6
        )
    assert {n for n in after if "running" in n} == set(statistics.names)
    assert outcome(case) == "agrees"
    assert not case.doubts


def test_statistics_alone_tell_who_was_there(declare: Declare, tmp_path: Path) -> None:
    before = own_model()
    after = trained(before).state_dict()
    noise = torch.Generator().manual_seed(0)
    for name, _ in before.named_parameters():  # the parameters drown in noise
        after[name] = before.state_dict()[name] + torch.randn(after[name].shape, generator=noise)
    defense = [{"name": "clip", "bound": 0.1, "over": "parameters"}, {"name": "noise", "std": 1.0}]
    case = prepare(declare(after, {}, defense=defense))
    assert outcome(case) == "agrees"
    images, labels = private()
    others = digits("private").images[10:40]
    tried = images.repeat(31, 1, 1, 1, 1)
    tried[1:, 2] = others  # each in the place of the third
    matching = Matching(case.model, case.defense)
    observed = stack([case.audited.observed])
    distances = matching.distances(tried[None], labels.expand(1, 31, -1), observed)
    assert int(distances.argmin()) == 0


def test_attacks_follow_the_statistics(declare: Declare, tmp_path: Path) -> None:
    case = prepare(declare(trained(own_model()).state_dict(), {}))
    images, labels = private()
    derivatives = Derivatives(case.model, case.defense, "l2")
    start, step = (0.8 * images + 0.1)[None], 1e-3
    observed = stack([case.audited.observed])
    distance, slope = derivatives(start, labels[None], observed)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    ahead, behind = (
        derivatives(start + sign * step * direction, labels[None], observed)[0] for sign in (1, -1)
    )
    assert float((ahead - behind) / (2 * step)) == pytest.approx(
        float((slope * direction).sum()), rel=0.02
    )
    without = Derivatives(case.model, case.defense, "l2")
    only = {n: t for n, t in observed.items() if n in case.model.parameters}
    assert float(distance) != pytest.approx(float(without(start, labels[None], only)[0]), rel=1e-3)


def test_a_cohorts_statistics_are_averaged(declare: Declare, tmp_path: Path) -> None:
    before = own_model()
    images, labels = private()
    sent = []
    for part in torch.arange(SIZE).split(2):
        module = copy.deepcopy(before).train()
        optimizer = torch.optim.SGD(module.parameters(), LR)
        nn.functional.cross_entropy(module(images[part] * 2 - 1), labels[part]).backward()
        optimizer.step()
        sent.append(module.state_dict())
    after = {name: (sent[0][name].float() + sent[1][name].float()) / 2 for name in sent[0]}
    defense = [{"name": "secure_aggregation", "clients": 2}]
    case = prepare(declare(after, {}, capture__batch_size=2, defense=defense))
    assert outcome(case) == "agrees"


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("over", [None, "everything", "parameters"])
def test_a_clip_over_every_array_is_replayed_as_such(
    declare: Declare, tmp_path: Path, over: str | None, noise: float
) -> None:
    before = own_model()
    old, new = before.state_dict(), trained(before).state_dict()
    update = {name: new[name].float() - old[name].float() for name in new}
    factor = 0.5 / torch.sqrt(sum(u.square().sum() for u in update.values()))
    random = torch.Generator().manual_seed(2)
    after = {
        name: old[name] + factor * u + noise * torch.randn(u.shape, generator=random)
        for name, u in update.items()
    }
    defense: list[dict[str, Any]] = [{"name": "clip", "bound": 0.5}]
    defense[0] |= {} if over is None else {"over": over}
    defense += [{"name": "noise", "std": noise}] if noise else []
    case = prepare(declare(after, {}, defense=defense))
    assert outcome(case) == ("contradicts" if over == "parameters" else "agrees")
    assert case.defense.clear.is_over_everything == (over != "parameters")
    assert not case.defense.clear.names or over == "parameters"


def test_what_mode_implies_and_the_file_lacks_is_asked_for(
    declare: Declare, tmp_path: Path
) -> None:
    before = own_model()
    new = trained(before).state_dict()
    only = {name: new[name] for name, _ in before.named_parameters()}
    (doubt,) = prepare(declare(only, {})).doubts
    assert "whether they were sent is not said" in doubt.text
    said = prepare(declare(only, {}, capture__unsent=["*running_*"]))
    assert not said.doubts
    with pytest.raises(InputError, match="says that it is never sent"):
        prepare(declare(new, {}, capture__unsent=["*running_*"]))


def test_one_statistic_of_a_layer_is_enough(declare: Declare, tmp_path: Path) -> None:
    new = trained(own_model()).state_dict()
    kept = {name: tensor for name, tensor in new.items() if "running_mean" not in name}
    case = prepare(declare(kept, {}, capture__unsent=["*running_mean"]))
    assert case.model.statistics is not None
    assert case.model.statistics.names == ("0.running_var", "2.running_var")
    assert outcome(case) == "agrees"


@pytest.mark.parametrize("what", ["values", "changes", "list"])
def test_a_gradient_with_statistics_beside_it(declare: Declare, tmp_path: Path, what: str) -> None:
    before = own_model()
    old, new = before.state_dict(), trained(before).state_dict()
    parameters = dict(before.named_parameters())
    sent = {
        name: (old[name] - new[name]) / LR
        if name in parameters
        else new[name]
        if what != "changes" or "num" in name
        else old[name] - new[name]
        for name in new
    }
    path = tmp_path / "sent.npz"
    if what == "list":
        np.savez(path, *[tensor.numpy() for tensor in sent.values()])
    else:
        np.savez(path, **{name: tensor.numpy() for name, tensor in sent.items()})
    keys = {
        "capture__after": None,
        "capture__gradient": str(path),
        "capture__kind": "gradient",
        "capture__local": None,
    }
    case = prepare(declare(new, {}, **keys))
    assert case.model.statistics is not None
    assert outcome(case) == "agrees"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("optimizer.state.0.exp_avg", (6, 1, 3, 3), "optimizer state"),
        ("__opt_state_0_0_momentum_buffer", (6, 1, 3, 3), "optimizer state"),
        ("val_loss", (), "metrics"),
        ("num_examples", (1,), "counts"),
        ("secret", (7,), "tensors that are not the model's"),
        ("another", (6, 1, 3, 3), "in a parameter's shape"),
    ],
)
def test_what_else_was_sent_is_a_doubt_unless_it_is_said_why_not(
    declare: Declare, tmp_path: Path, name: str, shape: tuple[int, ...], kind: str
) -> None:
    new = {**trained(own_model()).state_dict(), name: torch.full(shape, 0.5)}
    (doubt,) = prepare(declare(new, {})).doubts
    assert kind in doubt.text
    assert name in doubt.text
    ignored = [{"name": name, "reason": "it is the server's own"}]
    case = prepare(declare(new, {}, capture__ignored=ignored))
    assert not case.doubts
    assert case.audited.fitted.beside.ignored == [name]


@pytest.mark.parametrize(
    ("around", "name"),
    [
        (lambda state: {"state_dict": state, "images": torch.rand(4, 1, 16, 16)}, "images"),
        (
            lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}},
            "exp_avg",
        ),
        (lambda state: {"model": state, "pixels": [[0.5] * 256]}, "pixels.0"),
        (
            lambda state: {
                n: torch.rand(99) if n == "0.num_batches_tracked" else t for n, t in state.items()
            },
            "0.num_batches_tracked",
        ),
        (
            lambda state: {**state, "usual": torch.cat([torch.rand(9) * 48, torch.ones(1) * 1e8])},
            "",
        ),
    ],
    ids=["images", "optimizer", "pixels", "counter", "large"],
)
def test_what_a_checkpoint_has_elsewhere_is_a_doubt(
    declare: Declare,
    tmp_path: Path,
    around: Callable[[dict[str, torch.Tensor]], dict[str, Any]],
    name: str,
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(around(trained(own_model()).state_dict()), path)
    spec = declare({"x": torch.ones(1)}, {}, capture__after=str(path))
    (doubt,) = prepare(spec).doubts
    assert name in doubt.text


def test_the_clients_own_code_sends_its_statistics(declare: Declare, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(
        "from torch.nn import functional as F\n"
        "def step(model, images, labels):\n"
        "    F.cross_entropy(model(images), labels).backward()\n"
        "    sent = {name: p.grad for name, p in model.named_parameters()}\n"
        "    count = labels.sum() * 0.0 + len(labels)\n"
        "    return {**sent, **dict(model.named_buffers()), 'num_examples': count}\n"
    )
    before = own_model()
    images, labels = private()
    module = copy.deepcopy(before).train()
    nn.functional.cross_entropy(module(images * 2 - 1), labels).backward()
    sent = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    save_file({**sent, **dict(module.named_buffers())}, tmp_path / "sent.safetensors")
    keys = {
        "capture__after": None,
        "capture__gradient": str(tmp_path / "sent.safetensors"),
        "capture__kind": "gradient",
        "capture__local": None,
        "client": {"step": f"{tmp_path / 'client.py'}:step"},
    }
    case = prepare(declare({"x": torch.ones(1)}, {}, **keys))
    assert outcome(case) == "agrees"
    (doubt,) = case.doubts
    assert "the client's own code sends counts ('num_examples')" in doubt.text
    assert case.model.statistics is not None


def test_statistics_that_did_not_change_tell_nothing(declare: Declare, tmp_path: Path) -> None:
    before = own_model()
    new = {**trained(before).state_dict()}
    new |= {name: t for name, t in before.state_dict().items() if "running" in name}
    case = prepare(declare(new, {}, capture__unsent=["*running*"]))
    assert outcome(case) == "agrees"
    assert not case.doubts
    assert case.model.statistics is None


def test_ignored_is_for_what_is_there_and_no_parameter(declare: Declare, tmp_path: Path) -> None:
    new = trained(own_model()).state_dict()
    with pytest.raises(InputError, match="holds nothing that capture"):
        prepare(declare(new, {}, capture__ignored=[{"name": "odd", "reason": "none"}]))
    with pytest.raises(InputError, match=r"'1\.bias', a trained parameter"):
        prepare(declare(new, {}, capture__ignored=[{"name": "1.*", "reason": "none"}]))
    with pytest.raises(SpecError, match="reason"):
        prepare(declare(new, {}, capture__ignored=[{"name": "odd"}]))


def test_statistics_that_change_in_eval_mode_are_a_doubt(declare: Declare, tmp_path: Path) -> None:
    new = trained(own_model()).state_dict()
    doubts = prepare(declare(new, {}, model__mode="eval", evidence__truth=[])).doubts
    assert any(
        "running statistics of layers that are in eval mode" in doubt.text for doubt in doubts
    )
    old = own_model().state_dict()
    kept = {name: old[name] if "running" in name or "num" in name else new[name] for name in new}
    assert not prepare(declare(kept, {}, model__mode="eval", evidence__truth=[])).doubts


def test_a_count_that_the_declaration_has_not_is_a_doubt(declare: Declare, tmp_path: Path) -> None:
    new = trained(own_model()).state_dict()
    new["0.num_batches_tracked"] += 4
    (doubt,) = prepare(declare(new, {})).doubts
    assert "0.num_batches_tracked went up by 5, and by 1 as declared" in doubt.text


def test_a_buffer_of_ones_own_that_changed_is_a_doubt(declare: Declare, tmp_path: Path) -> None:
    kwargs = {"kind": "averaging"}
    new = trained(own_model(**kwargs)).state_dict()
    assert not prepare(declare(new, kwargs)).doubts
    (doubt,) = prepare(declare({**new, "usual": new["usual"] * 0.9}, kwargs)).doubts
    assert "buffers that were changed ('usual')" in doubt.text


def test_statistics_whose_values_before_are_not_known_are_a_doubt(
    declare: Declare, tmp_path: Path
) -> None:
    before = own_model()
    spec = declare(trained(before).state_dict(), {}, evidence__truth=[])
    save_file(dict(before.named_parameters()), tmp_path / "before.safetensors")
    (doubt,) = prepare(spec).doubts
    assert "whose values before are not in model.weights" in doubt.text


def test_noise_over_everything_is_looked_for(declare: Declare, tmp_path: Path) -> None:
    before = own_model()
    new = trained(before).state_dict()
    random, std = torch.Generator().manual_seed(2), 0.1
    parameters = dict(before.named_parameters())
    noise = {name: std * torch.randn(new[name].shape, generator=random) for name in new}
    right = {name: new[name] + noise[name] for name in new}
    wrong = {name: right[name] if name in parameters else new[name] for name in new}
    uncounted = {name: tensor for name, tensor in wrong.items() if "num" not in name}
    defense = [
        {"name": "clip", "bound": 1e3, "over": "everything"},
        {"name": "noise", "std": std},
    ]
    for after, expected in ((right, "hidden"), (wrong, "contradicts"), (uncounted, "contradicts")):
        keys = {"evidence__truth": []}
        case = prepare(declare(after, {}, defense=defense, **keys))
        (check,) = [c for c in case.audited.checks if c.step == OVER_EVERYTHING]
        assert check.outcome == expected, check.detail
