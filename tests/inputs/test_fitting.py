"""Whatever a tool writes of a model is fitted back to it, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn

from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import AuditError, InputError, SpecError
from ggl_audit.inputs.capture import read_capture
from ggl_audit.inputs.fitting import Known, fit_file, know_tensors, same_shape_hint
from ggl_audit.inputs.layouts import swapped, trace_arrangements
from ggl_audit.inputs.model import call_with
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.tensors import Tensors
from ggl_audit.spec import Spec

FACTORY = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two stages that are one, batch norm, and a scalar."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.stage1 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.stage2 = self.stage1
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.tanh(self.stage1(torch.tanh(self.bn(self.conv(x)))) * self.scale)
        return self.fc(x.flatten(1))
'''
namespace: dict[str, Any] = {}
exec(FACTORY, namespace)  # noqa: S102
NET: nn.Module = namespace["Net"]()

STATE = {name: torch.randn(t.shape) for name, t in NET.state_dict().items()}
STATE["stage2.weight"], STATE["stage2.bias"] = STATE["stage1.weight"], STATE["stage1.bias"]
TWINS = {"stage2.weight": "stage1.weight", "stage2.bias": "stage1.bias"}
ONCE = {name: tensor for name, tensor in STATE.items() if name not in TWINS}
PARAMETERS = [name for name, _ in NET.named_parameters()]
COUNTER = "bn.num_batches_tracked"
ARRANGEMENTS = trace_arrangements(NET, torch.rand(1, 1, 16, 16))


def known(unsent: frozenset[str] = frozenset(), *, channels_last: bool = False) -> Known:
    arrangements = ARRANGEMENTS if channels_last else None
    state = dict(NET.state_dict())
    return know_tensors(
        NET, state, PARAMETERS, PARAMETERS, unsent, arrangements, "capture.layout", may_lack=True
    )


def channels_last(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As Keras has it, by a plain statement of its own."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    if name == "fc.weight":
        return tensor.reshape(10, 4, 4, 4).permute(0, 2, 3, 1).reshape(10, 64).T
    return tensor


def is_written(found: Tensors, names: list[str]) -> bool:
    wanted = {TWINS.get(name, name) for name in names}
    return found.keys() == wanted and all(torch.equal(found[n], STATE[n]) for n in wanted)


def refusal(found: Tensors, listed: Known) -> str:
    try:
        fit_file(found, listed)
    except AuditError as error:
        return error.said.text
    return ""


SHAPES = st.sampled_from(["as it is", "(1,)"])
WRAPPERS = st.sampled_from(["", "module.", "model._orig_mod.", "net.", "student.backbone."])
UNSENT = st.sets(st.sampled_from([*STATE]), max_size=4).map(
    lambda names: frozenset(names | {n for n, first in TWINS.items() if first in names})
)


@given(UNSENT, SHAPES, WRAPPERS, st.booleans(), st.booleans())
def test_what_is_written_by_name_is_fitted(
    unsent: frozenset[str], shape: str, wrapper: str, once: bool, last: bool
) -> None:
    """Any names are left out, and any other prefix is taken off where all of the model is there."""
    if wrapper == "student.backbone.":
        unsent = unsent - {*PARAMETERS, *TWINS}
    names = [name for name in (ONCE if once else STATE) if name not in unsent]
    written = {
        wrapper + name: channels_last(name, STATE[name]) if last else STATE[name] for name in names
    }
    if shape == "(1,)":
        written = {name: torch.atleast_1d(tensor) for name, tensor in written.items()}
    fit = fit_file(written, known(unsent, channels_last=last))
    assert is_written(fit.tensors, names)
    assert fit.unknown == []


@given(UNSENT, SHAPES, st.sampled_from(["all", "parameters", "no counts"]), st.booleans())
def test_what_is_written_in_order_is_fitted(
    unsent: frozenset[str], shape: str, order: str, last: bool
) -> None:
    names = {
        "all": [*STATE],
        "parameters": PARAMETERS,
        "no counts": [name for name in STATE if name != COUNTER],
    }[order]
    names = [name for name in names if name not in unsent]
    tensors = [channels_last(n, STATE[n]) if last else STATE[n] for n in names]
    if shape == "(1,)":
        tensors = [torch.atleast_1d(tensor) for tensor in tensors]
    written = {str(place): tensor for place, tensor in enumerate(tensors)}
    listed = known(unsent, channels_last=last)
    refused = refusal(written, listed)
    if refused:
        # What is left out can make two orders of one shape; then neither is taken.
        assert unsent
        assert "may be" in refused
    else:
        assert is_written(fit_file(written, listed).tensors, names)


@given(st.permutations([*ONCE]))
def test_another_order_is_not_taken_where_shapes_tell(names: list[str]) -> None:
    written = {str(place): ONCE[name] for place, name in enumerate(names)}
    same = all(ONCE[one].shape == ONCE[other].shape for one, other in zip(names, ONCE, strict=True))
    refused = refusal(written, known())
    assert same == (refused == "")
    assert same or "in another order than the state dict without what is tied" in refused


@pytest.mark.parametrize("shape", [(0,), (1,), (7,)])
def test_a_count_of_any_shape_is_one_and_its_value_is_lost_if_it_has_none(
    shape: tuple[int, ...],
) -> None:
    """torch.Tensor(array) makes so many numbers of a count, whatever is in memory there."""
    written = {**STATE, COUNTER: torch.full(shape, torch.nan)}
    for found in (written, {str(i): t for i, t in enumerate(written.values())}):
        fit = fit_file(found, known())
        assert (COUNTER in fit.tensors) == (shape == (1,))
        assert is_written({**fit.tensors, COUNTER: STATE[COUNTER]}, [*STATE])


def test_a_scalar_without_a_value_is_not_there() -> None:
    fit = fit_file({**STATE, "scale": torch.zeros(0)}, known())
    assert "scale" not in fit.tensors
    with pytest.raises(AuditError, match=r"'scale' has the shape \(2,\)"):
        fit_file({**STATE, "scale": torch.zeros(2)}, known())


def test_tied_tensors_that_differ_are_refused() -> None:
    with pytest.raises(AuditError, match=r"'stage1.bias' and 'stage2.bias' differ"):
        fit_file({**STATE, "stage2.bias": STATE["stage1.bias"] + 1}, known())
    last = {name: t for name, t in STATE.items() if name not in TWINS.values()}
    fit = fit_file(last, known())
    assert fit.sources["stage1.weight"] == "stage2.weight"


def test_a_list_of_another_length_is_compared_with_each_order() -> None:
    written = {str(i): t for i, t in enumerate([*STATE.values()][2:])}
    words = (
        r"a list of 12 tensors.*; expected 9 for the trained parameters \(at 0 it has \(4,\) where "
        r"'scale' has \(\)\); 14 for the state dict \(at 0 .*; 12 for the state dict without what "
        r"is tied \(at 0 .*; 13 for the state dict without counts of batches \(at 0"
    )
    with pytest.raises(AuditError, match=words) as raised:
        fit_file(written, known())
    assert "capture.unsent" in raised.value.said.remedy
    ends = {str(i): STATE[name] for i, name in enumerate(PARAMETERS[:-1])}
    with pytest.raises(AuditError, match=r"trained parameters \(it ends before 'fc\.bias'\)"):
        fit_file(ends, known())


def test_no_tensor_has_a_shape_only_where_none_has() -> None:
    lacking = same_shape_hint((4, 4, 3, 3), known(), ["stage1.weight"])
    assert lacking == "Of the model's tensors, 'stage1.weight' has that shape."
    there = same_shape_hint((4, 4, 3, 3), known(), ["conv.weight"])
    assert there.startswith("'stage1.weight' of the model has that shape, and the file holds it")
    assert same_shape_hint((9, 9), known(), []).startswith("No tensor of the model has that shape")


def test_a_transposed_layer_is_said_to_be_one() -> None:
    with pytest.raises(AuditError, match=r"'fc.weight' has the shape \(64, 10\)") as raised:
        fit_file({**STATE, "fc.weight": STATE["fc.weight"].T}, known())
    assert raised.value.said.remedy.startswith("Is it transposed?")
    assert swapped((10, 64)) == (64, 10)


def test_the_adapter_of_peft_has_no_name_in_its_files() -> None:
    module = nn.ModuleDict(
        {"fc": nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})})}
    )
    state = dict(module.state_dict())
    listed = know_tensors(module, state, [*state], [*state])
    fit = fit_file({"fc.lora_A.weight": torch.ones(2, 3)}, listed)
    assert [*fit.tensors] == ["fc.lora_A.default.weight"]


# Whole files


@pytest.fixture
def spec(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., Spec]:
    (tmp_path / "nets.py").write_text(FACTORY)
    torch.manual_seed(0)
    net = namespace["Net"]()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    save_model(net, str(tmp_path / "weights.safetensors"))
    before = [tensor.numpy().copy() for tensor in net.state_dict().values()]
    net.train()
    images, labels = torch.rand(4, 1, 16, 16), torch.tensor([2, 7, 1, 5])
    nn.functional.cross_entropy(net(images), labels).backward()
    save_file({n: p.grad for n, p in net.named_parameters()}, tmp_path / "gradient.safetensors")
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    save_model(net, str(tmp_path / "after.safetensors"))
    for name, arrays in (("before", before), ("after", net.state_dict().values())):
        once = [np.atleast_1d(np.asarray(a)).astype(np.float32) for a in arrays]
        np.savez(tmp_path / f"{name}.npz", *once)
        kept = [a for a, n in zip(once, net.state_dict(), strict=True) if "bn" not in n]
        np.savez(tmp_path / f"{name}_fedbn.npz", *kept)

    def declare(**more: Any) -> Spec:
        keys = {
            "model__factory": f"{tmp_path / 'nets.py'}:Net",
            "model__mode": "train",
            "model__input__mean": [0.0],
            "model__input__std": [1.0],
            "capture__batch_size": 4,
            "capture__labels": [2, 7, 1, 5],
            "evidence__truth": None,
        }
        return sample("undefended", **{**keys, **more})

    return declare


@pytest.mark.parametrize("weights", ["weights.pt", "weights.safetensors", "before.npz"])
def test_files_without_duplicates_or_scalars_are_whole(
    spec: Callable[..., Spec], tmp_path: Path, weights: str
) -> None:
    own = {"model__weights": str(tmp_path / weights)}
    gradient = {"capture__gradient": str(tmp_path / "gradient.safetensors")}
    expected = prepare(spec(**own, **gradient))
    assert (expected.audited.fitted.unsent, expected.audited.fitted.unused) == ([], {})
    for after in ("after.safetensors", "after.npz"):
        update = {"capture__gradient": None, "capture__kind": "update"}
        update |= {"capture__local": {"lr": 0.1}, "capture__after": str(tmp_path / after)}
        captured = prepare(spec(**own, **update)).audited.fitted
        assert captured.unsent == []
        assert not {"stage2.weight", "stage2.bias"} & captured.unused.keys()
        for name, tensor in expected.audited.observed.items():
            torch.testing.assert_close(captured.gradient[name], 0.1 * tensor, rtol=1e-3, atol=1e-6)


def test_a_list_without_what_is_never_sent(spec: Callable[..., Spec], tmp_path: Path) -> None:
    update = {
        "model__weights": str(tmp_path / "weights.pt"),
        "capture__gradient": None,
        "capture__kind": "update",
        "capture__local": {"lr": 0.1},
        "capture__before": str(tmp_path / "before_fedbn.npz"),
        "capture__after": str(tmp_path / "after_fedbn.npz"),
    }
    with pytest.raises(InputError, match=r"a list of 9 tensors.*where 'bn.weight' has \(4,\)"):
        prepare(spec(**update))
    case = prepare(spec(**update, capture__unsent=["*bn*"]))
    assert case.audited.fitted.how == "order of the state dict without what is not sent"
    assert [*case.audited.observed] == [name for name in PARAMETERS if "bn" not in name]
    assert case.audited.fitted.unsent == []
    assert case.model.unsent == {name for name in STATE if "bn" in name}


def test_patterns_of_what_is_never_sent_are_of_buffers_too(
    spec: Callable[..., Spec], tmp_path: Path
) -> None:
    own = {"model__weights": str(tmp_path / "weights.pt")}
    cpu = torch.device("cpu")
    _, model = load_client(spec(**own, capture__unsent=["*running*", "*tracked"]), cpu)
    assert [*model.parameters] == PARAMETERS
    assert model.unsent == {"bn.running_mean", "bn.running_var", COUNTER}
    _, tied = load_client(spec(**own, capture__unsent=["stage2.*"]), cpu)
    assert "stage1.weight" in tied.parameters  # as it is sent by its other name
    _, both = load_client(spec(**own, capture__unsent=["stage*"]), cpu)
    assert not {"stage1.weight", "stage2.weight"} & both.parameters.keys()
    with pytest.raises(SpecError, match=r"'bn2\.\*' is no parameter or buffer of the model"):
        load_client(spec(**own, capture__unsent=["bn2.*"]), cpu)
    with pytest.raises(SpecError, match=r"'bn\.running_mean' is no trained parameter"):
        load_client(spec(**own, model__frozen=["bn.running_mean"]), cpu)


def test_one_rule_for_one_file(spec: Callable[..., Spec], tmp_path: Path) -> None:
    """What is read as weights is read as a capture, and what is refused is refused as both."""
    weights = {name: tensor + 0.01 for name, tensor in NET.state_dict().items() if "bn" not in name}
    counts = {name: tensor for name, tensor in NET.state_dict().items() if "bn" in name}
    whole = {**weights, **counts}
    arrays = [tensor.numpy() for name, tensor in whole.items() if name != COUNTER]
    good = {
        "plain.pt": whole,
        "prefix.pt": {f"lit.body.{name}": tensor for name, tensor in whole.items()},
        "half.pt": {name: t.half() if t.is_floating_point() else t for name, t in whole.items()},
        "checkpoint.pt": {"state_dict": whole, "epoch": 3, "path": tmp_path},
    }
    order = [name for name in NET.state_dict() if name != COUNTER]
    np.savez(tmp_path / "list.npz", *[whole[name].numpy() for name in order])
    assert len(arrays) == len(order)
    for name, content in good.items():
        torch.save(content, tmp_path / name)
    bad = {
        "shape.pt": ({**whole, "fc.bias": torch.ones(11)}, r"'fc.bias' has the shape \(11,\)"),
        "swapped.pt": ([*whole.values()][::-1], "another order|expected"),
        "nan.pt": ({**whole, "fc.bias": torch.full((10,), torch.nan)}, "NaN or infinite"),
        "quantized.pt": ({**whole, "fc.bias": torch.ones(10).char()}, "is int8; expected floating"),
        "two.pt": ({f"{w}.{n}": t for w in "ab" for n, t in whole.items()}, "two wrappers"),
        "tied.pt": ({**whole, "stage2.bias": torch.ones(4)}, "differ, and are one tensor"),
    }
    for name, (content, _) in bad.items():
        torch.save(content, tmp_path / name)
    plain = load_model(spec(model__weights=str(tmp_path / "plain.pt")), torch.device("cpu"))
    for name in (*good, "list.npz"):
        load_model(spec(model__weights=str(tmp_path / name)), torch.device("cpu"))
        assert read_capture(tmp_path / name, plain).unsent == []
    for name, (_, words) in bad.items():
        with pytest.raises(InputError, match=words):
            load_model(spec(model__weights=str(tmp_path / name)), torch.device("cpu"))
        with pytest.raises(InputError, match=words):
            read_capture(tmp_path / name, plain)


@pytest.mark.parametrize("of_what", ["layer", "weight"])
def test_a_model_with_tied_weights_keeps_its_own(of_what: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    if of_what == "layer":
        module[2] = module[0]
    else:
        module[2].weight = module[0].weight
    own = [*module.parameters()]
    other = {name: torch.rand(p.shape, requires_grad=True) for name, p in module.named_parameters()}
    images = torch.rand(4, 3)
    found = call_with(module, other, images)
    last = other["0.bias"] if of_what == "layer" else other["2.bias"]
    taken = torch.tanh(images @ other["0.weight"].T + other["0.bias"])
    torch.testing.assert_close(found, taken @ other["0.weight"].T + last)
    assert all(one is before for one, before in zip(module.parameters(), own, strict=True))
