from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.beside import ELSEWHERE, STATISTICS_IN_EVAL
from ggl_audit.inputs.capture import read_capture, read_update, write_capture
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import Spec
from tests.conftest import plain_gradient

Tensors = dict[str, torch.Tensor]
HERE = Path(__file__).parent


@pytest.fixture
def good(model: ClientModel) -> Tensors:
    return plain_gradient(model, torch.rand(1, 16, 16), 4)


@pytest.fixture
def batch_norm(sample: Callable[..., Spec]) -> ClientModel:
    factory = f"{HERE.parent / 'known_answers' / 'models.py'}:tiny_cnn"
    return load_model(
        sample(
            "undefended",
            model__factory=factory,
            model__kwargs={"batch_norm": True},
            model__weights=None,
        ),
        torch.device("cpu"),
    )


def test_a_capture_comes_back_in_the_order_of_the_model(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "g.safetensors"
    write_capture(path, dict(reversed(good.items())))
    read = read_capture(path, model)
    assert list(read.gradient) == list(model.parameters)
    assert all(torch.equal(read.gradient[name], good[name]) for name in good)
    assert (read.how, read.unsent, read.unused) == ("name", [], {})


def test_a_slice_of_a_larger_tensor_was_sent_with_all_of_it(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "g.pt"
    of_samples = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in good.items()}
    torch.save({name: pair[0] for name, pair in of_samples.items()}, path)
    read = read_capture(path, model)
    assert all(torch.equal(read.gradient[name], good[name]) for name in good)
    assert len(read.beside.unmeasured[ELSEWHERE]) == len(good)
    assert read_capture(path, model, ["*(beyond*"]).beside.unmeasured == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda g: g.update({"odd.0.bias": g.pop("0.bias")}),
            ["holds 'odd.0.bias'", "'0.bias' has that shape"],
        ),
        (
            lambda g: g.update({"0.bias": torch.ones(32)}),
            [r"'0.bias' has the shape \(32,\)", "'2.bias' or '5.bias' has that shape"],
        ),
        (lambda g: g.update({"0.bias": torch.ones(16, dtype=torch.int8)}), ["'0.bias' is int8"]),
        (lambda g: g["2.bias"].__setitem__(3, torch.nan), ["'2.bias' holds 1 values", "NaN"]),
        (lambda g: g["2.bias"].__setitem__(3, torch.inf), ["infinite"]),
        (lambda g: [t.zero_() for t in g.values()], ["every value is zero"]),
        (lambda g: [g.pop(n) for n in list(g)] + [g.update(x=torch.ones(2))], ["holds 'x'"]),
        (
            lambda g: g.update({n: t.expand(8, *t.shape).clone() for n, t in g.items()}),
            [r"the shape \(8, 16, 1, 3, 3\)", "each of 8 samples", "grad_sample"],
        ),
        (
            lambda g: g.update({f"module.{n}": t.clone() for n, t in g.items()}),
            [r"are of two wrappers"],
        ),
    ],
)
def test_a_capture_that_does_not_fit_is_named(
    model: ClientModel, good: Tensors, tmp_path: Path, change: object, words: list[str]
) -> None:
    change(good)
    path = tmp_path / "g.safetensors"
    save_file(good, path)
    for word in words:
        with pytest.raises(InputError, match=word):
            read_capture(path, model)


@pytest.mark.parametrize("wrapper", ["module.", "_module.", "_orig_mod.module.", "model."])
def test_a_wrapper_in_the_names_is_taken_off_and_said(
    model: ClientModel, good: Tensors, tmp_path: Path, wrapper: str
) -> None:
    path = tmp_path / "g.pt"
    torch.save({wrapper + name: tensor for name, tensor in good.items()}, path)
    read = read_capture(path, model)
    assert all(torch.equal(read.gradient[name], good[name]) for name in good)
    assert read.how == f"name without {wrapper!r}"
    assert read.sources["0.bias"] == wrapper + "0.bias"


def test_a_list_is_matched_by_order(model: ClientModel, good: Tensors, tmp_path: Path) -> None:
    as_list, as_arrays = tmp_path / "list.pt", tmp_path / "flower.npz"
    torch.save(list(good.values()), as_list)
    np.savez(as_arrays, *(tensor.numpy() for tensor in good.values()))
    for path in (as_list, as_arrays):
        read = read_capture(path, model)
        assert all(torch.equal(read.gradient[name], good[name]) for name in good)
        assert read.how == "order of the trained parameters"


def test_a_list_of_the_state_dict_holds_buffers_too(
    batch_norm: ClientModel, tmp_path: Path
) -> None:
    state = batch_norm.module.state_dict()
    assert len(state) > len(batch_norm.parameters)
    tensors = {n: torch.randn(t.shape) if t.is_floating_point() else t for n, t in state.items()}
    path = tmp_path / "flower.npz"
    np.savez(path, *(tensor.numpy() for tensor in tensors.values()))
    read = read_capture(path, batch_norm)
    assert read.how == "order of the state dict"
    assert all(torch.equal(read.gradient[n], tensors[n]) for n in batch_norm.parameters)
    buffers = {name for name in state if "running" in name}
    assert set(read.beside.unmeasured) == {STATISTICS_IN_EVAL}
    assert {read.sources.get(n, n) for n in batch_norm.parameters} == set(read.sources.values())
    assert len(read.beside.unmeasured[STATISTICS_IN_EVAL]) == len(buffers)


@pytest.mark.parametrize("values", [True, False])
def test_the_sign_of_an_update_is_not_that_of_the_values_beside_it(
    sample: Callable[..., Spec], tmp_path: Path, values: bool
) -> None:
    factory = f"{HERE.parent / 'known_answers' / 'models.py'}:tiny_cnn"
    spec = sample(
        "undefended",
        model__factory=factory,
        model__kwargs={"batch_norm": True},
        model__weights=None,
        model__mode="train",
    )
    model = load_model(spec, torch.device("cpu"))
    gradient = {name: torch.randn(t.shape) for name, t in model.parameters.items()}
    changes = {n: -0.05 * torch.ones_like(t) for n, t in model.state.items() if "running" in n}
    sent = {n: model.state[n] - t for n, t in changes.items()} if values else changes
    declared = 1 if values else -1
    path = tmp_path / "g.safetensors"
    save_file({**gradient, **{n: t.clone() for n, t in sent.items()}}, path)
    plain, turned = (read_capture(path, model, negated=sign) for sign in (False, True))
    assert changes
    for name in model.parameters:
        assert torch.equal(plain.gradient[name], gradient[name])
        assert torch.equal(turned.gradient[name], -gradient[name])
    for name, change in changes.items():
        torch.testing.assert_close(plain.beside.statistics[name], change)
        torch.testing.assert_close(turned.beside.statistics[name], declared * change)


def test_a_list_in_another_order_is_refused(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "g.pt"
    torch.save(list(good.values())[::-1], path)
    with pytest.raises(InputError, match=r"another order than the trained parameters.* at 0 has"):
        read_capture(path, model)
    torch.save(list(good.values())[1:], path)
    with pytest.raises(InputError, match=r"a list of 7 tensors without names; expected 8 for"):
        read_capture(path, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_and_their_rounding_said(
    model: ClientModel, good: Tensors, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "g.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in good.items()}, path)
    read = read_capture(path, model)
    assert all(t.dtype == torch.float32 for t in read.gradient.values())
    assert read.rounding == max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, tensor in good.items():
        assert torch.allclose(read.gradient[name], tensor, rtol=read.rounding, atol=1e-7)


def test_parameters_that_are_not_there_are_taken_for_never_sent(
    sample: Callable[..., Spec], good: Tensors, tmp_path: Path
) -> None:
    kept = {name: tensor for name, tensor in good.items() if not name.startswith("0.")}
    path = tmp_path / "g.safetensors"
    save_file(kept, path)
    inferred = prepare(sample("undefended", capture__gradient=str(path), evidence__truth=None))
    assert list(inferred.audited.observed) == list(kept) == list(inferred.model.parameters)
    assert inferred.audited.fitted.unsent == ["0.weight", "0.bias"]
    assert any("lacks 0.weight and 1 more" in doubt.text for doubt in inferred.doubts)
    declared = prepare(
        sample(
            "undefended",
            capture__gradient=str(path),
            capture__unsent=["0.*"],
            evidence__truth=None,
        )
    )
    assert list(declared.audited.observed) == list(kept)
    assert (declared.audited.fitted.unsent, declared.doubts) == ([], [])
    for name, tensor in kept.items():
        assert torch.equal(declared.audited.observed[name], inferred.audited.observed[name])
        assert torch.equal(declared.audited.observed[name], tensor)


@pytest.mark.parametrize("key", ["model__frozen", "capture__unsent"])
def test_what_is_declared_to_be_missing_must_be(
    sample: Callable[..., Spec], good: Tensors, tmp_path: Path, key: str
) -> None:
    path = tmp_path / "g.safetensors"
    save_file(good, path)
    spec = sample("undefended", capture__gradient=str(path), **{key: ["0.*"]})
    with pytest.raises(InputError, match=r"'0.weight' is not zero, but '0.weight' \(16, 1, 3, 3\)"):
        prepare(spec)
    save_file({n: t * (0 if n.startswith("0.") else 1) for n, t in good.items()}, path)
    assert "0.weight" not in prepare(spec).audited.observed


def test_a_pattern_that_names_nothing_is_refused(sample: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match=r"'0\.wieght' is no trained parameter.*'0\.weight'"):
        load_client(sample("undefended", model__frozen=["0.wieght"]), torch.device("cpu"))
    with pytest.raises(SpecError, match="no parameter is left"):
        load_client(sample("undefended", capture__unsent=["*"]), torch.device("cpu"))


def test_an_update_is_the_weights_before_less_those_after(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    torch.save(model.parameters, before)
    torch.save({n: t - 0.1 * good[n] for n, t in model.parameters.items()}, after)
    for first in (None, before):
        update = read_update(first, after, model)
        for name, tensor in good.items():
            assert torch.allclose(update.gradient[name], 0.1 * tensor, atol=1e-7)
        assert 1e-7 < update.rounding < 1e-3


def test_an_update_that_rounding_swallows_is_refused(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    after = tmp_path / "after.pt"
    for rate, refused in ((1e-3, True), (10.0, False)):
        trained = {n: (t - rate * good[n]).bfloat16() for n, t in model.parameters.items()}
        torch.save(trained, after)
        if refused:
            with pytest.raises(InputError, match="hardly larger than their rounding"):
                read_update(None, after, model)
        else:
            read_update(None, after, model)


def test_checkpoints_that_do_not_belong_together_are_refused(
    model: ClientModel, good: Tensors, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    torch.save(model.parameters, after)
    with pytest.raises(InputError, match="the same weights as the model"):
        read_update(None, after, model)
    torch.save({n: t - 0.1 * good[n] for n, t in model.parameters.items()}, after)
    torch.save({n: 1.001 * t for n, t in model.parameters.items()}, before)
    with pytest.raises(InputError, match="other weights than the model"):
        read_update(before, after, model)
    lacking = dict(list(model.parameters.items())[1:])
    torch.save(lacking, before)
    with pytest.raises(InputError, match=r"'0.weight' is only in one of capture.before"):
        read_update(before, after, model)
    frozen = model.without(["0.weight"])
    with pytest.raises(InputError, match=r"'0.weight' is not what it is in the model"):
        read_update(None, after, frozen)


def test_a_capture_is_written_whole_or_not_at_all(good: Tensors, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is written as \.safetensors"):
        write_capture(tmp_path / "g.pt", good)
    with pytest.raises(InputError, match="there is no folder"):
        write_capture(tmp_path / "none" / "g.safetensors", good)
    assert list(tmp_path.iterdir()) == []


def test_channels_in_the_order_of_opencv(sample: Callable[..., Spec]) -> None:
    model = load_model(sample("undefended"), torch.device("cpu"))
    images = torch.rand(2, 3, 16, 16)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    bgr = ClientModel(**{**vars(model), "bgr": True, "mean": mean})
    swapped = torch.stack([images[:, 2], images[:, 1], images[:, 0]], dim=1)
    assert torch.equal(bgr.normalize(images), (swapped - mean) / model.std)
    with pytest.raises(SpecError, match="bgr is for 3 channels"):
        sample("undefended", model__input__channels="bgr")


def test_frozen_parameters_are_no_part_of_the_gradient(
    sample: Callable[..., Spec], good: Tensors
) -> None:
    _, model = load_client(
        sample("undefended", model__frozen=["0.*", "7.bias"]), torch.device("cpu")
    )
    module = model.module
    assert set(model.parameters) == set(good) - {"0.weight", "0.bias", "7.bias"}
    assert model.head is not None
    assert model.head.bias is None
    assert isinstance(module, nn.Module)
