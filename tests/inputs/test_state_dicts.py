from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from safetensors.torch import save_file
from torch import nn

from ggl_audit.errors import InputError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import Spec

CPU = torch.device("cpu")

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(784, 10))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 10))

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net()
    def forward(self, x):
        return self.model(x)
"""

Weights = dict[str, torch.Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
    )


class LightningLike(nn.Module):
    """A training module around the model, with a weighted loss and a metric's state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = nn.CrossEntropyLoss(weight=torch.ones(10))
        self.register_buffer("train_acc", torch.zeros(()))


@pytest.fixture
def trained() -> nn.Sequential:
    torch.manual_seed(1)
    module = net()
    module(torch.rand(8, 1, 16, 16))  # so that the running statistics are their own
    return module.eval()


@pytest.fixture
def load(tmp_path: Path, sample: Callable[..., Spec]) -> Callable[..., ClientModel]:
    (tmp_path / "nets.py").write_text(FACTORY)

    def read(path: Path, factory: str = "net", **more: Any) -> ClientModel:
        spec = sample(
            "undefended",
            model__factory=f"{tmp_path / 'nets.py'}:{factory}",
            model__weights=str(path),
            **more,
        )
        return load_model(spec, CPU)

    return read


def _is(model: ClientModel, trained: nn.Module) -> None:
    """Compares all tensors in the order of the state dict, whatever their names."""
    found, expected = model.module.state_dict().values(), trained.state_dict().values()
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        LightningLike,
        lambda module: torch.compile(nn.DataParallel(module)),
        lambda module: LightningLike(torch.compile(module)),
    ],
)
def test_a_wrapped_model_s_state_dict_fits(
    wrap: Callable[[nn.Module], nn.Module],
    trained: nn.Sequential,
    load: Callable[..., ClientModel],
    tmp_path: Path,
) -> None:
    weights = {name: t.clone() for name, t in wrap(trained).state_dict().items()}
    assert "0.weight" not in weights
    torch.save(weights, tmp_path / "w.pt")
    _is(load(tmp_path / "w.pt"), trained)


def test_the_state_dict_of_opacus_fits(load: Callable[..., ClientModel], tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 10))
    weights = GradSampleModule(plain).state_dict()
    assert next(iter(weights)) == "_module.1.weight"
    torch.save(weights, tmp_path / "w.pt")
    _is(load(tmp_path / "w.pt", "plain"), plain)


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._module."])
def test_prefixes(
    prefix: str, trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    save_file({prefix + n: t for n, t in trained.state_dict().items()}, tmp_path / "w.safetensors")
    _is(load(tmp_path / "w.safetensors"), trained)


def test_a_wrapper_in_the_factory(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    _is(load(tmp_path / "w.safetensors", "Wrapped"), trained)


def _saved(weights: Weights, path: Path) -> Path:
    save_file(weights, path / "w.safetensors")
    return path / "w.safetensors"


def test_what_does_not_fit_is_named(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    wrapped = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    without = {name: t for name, t in wrapped.items() if name != "model.4.bias"}
    with pytest.raises(InputError, match=r"has no '4.bias' \(10,\)"):
        load(_saved(without, tmp_path))
    with pytest.raises(InputError, match=r"holds 'model.5.bias', which the model .* does not have"):
        load(_saved({**wrapped, "model.5.bias": torch.zeros(1)}, tmp_path))
    load(_saved({**wrapped, "loss_fn.weight": torch.zeros(1)}, tmp_path))
    two = {f"net.{name}": tensor.clone() for name, tensor in trained.state_dict().items()}
    with pytest.raises(InputError, match=r"'model\.0\.\w+' and 'net\.0\.\w+'"):
        load(_saved({**wrapped, **two}, tmp_path))
    other = {f"layers_{name}": t for name, t in trained.state_dict().items()}
    with pytest.raises(InputError, match=r"has no '0\.weight'"):
        load(_saved(other, tmp_path))


def test_a_module_calls_its_model_what_it_likes(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    student = {f"student.net.{name}": t for name, t in trained.state_dict().items()}
    beside = {"criterion.pos_weight": torch.ones(1), "student.extra": torch.ones(1)}
    _is(load(_saved({**student, **beside}, tmp_path)), trained)
    teacher = {name.replace("student", "teacher"): t.clone() for name, t in student.items()}
    with pytest.raises(InputError, match=r"'student\.net\.\S+' and 'teacher\.net\.\S+'"):
        load(_saved({**student, **teacher}, tmp_path))
    lacking = {name: tensor for name, tensor in student.items() if "4.bias" not in name}
    with pytest.raises(InputError, match=r"has no '0\.weight'"):
        load(_saved(lacking, tmp_path))


def test_a_list_is_in_the_order_of_the_state_dict(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    arrays = [tensor.numpy() for tensor in trained.state_dict().values()]
    np.savez(tmp_path / "w.npz", *arrays)
    _is(load(tmp_path / "w.npz"), trained)
    without_counts = [array for array in arrays if array.ndim > 0]
    np.savez(tmp_path / "w.npz", *without_counts)
    model = load(tmp_path / "w.npz")
    assert torch.equal(model.constants["1.running_var"], trained[1].running_var)  # type: ignore[arg-type]


def test_a_list_of_parameters_is_enough_where_there_are_no_statistics(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    np.savez(tmp_path / "w.npz", *[p.detach().numpy() for p in trained.parameters()])
    with pytest.raises(
        InputError, match=r"has no '1\.running_mean' \(4,\), which the model .* needs"
    ):
        load(tmp_path / "w.npz")
    model = load(tmp_path / "w.npz", model__mode="train")
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.parameters[name], parameter)


def test_a_list_in_another_order_is_named(load: Callable[..., ClientModel], tmp_path: Path) -> None:
    torch.save([torch.zeros(s) for s in ((8,), (8, 256), (10, 8), (10,))], tmp_path / "w.pt")
    words = r"another order than the trained parameters.* at 0 has the shape \(8,\).*'1.weight'"
    with pytest.raises(InputError, match=words):
        load(tmp_path / "w.pt", "plain")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(
    dtype: torch.dtype, trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    weights = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in trained.state_dict().items()
    }
    model = load(_saved(weights, tmp_path))
    for name, parameter in model.parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].float())


def test_quantized_weights_are_refused(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    weights = {**trained.state_dict(), "4.bias": torch.ones(10, dtype=torch.int8)}
    with pytest.raises(InputError, match=r"'4\.bias' is int8; expected floating point"):
        load(_saved(weights, tmp_path))


def test_counts_of_batches_are_not_needed(
    trained: nn.Sequential, load: Callable[..., ClientModel], tmp_path: Path
) -> None:
    kept = {n: t for n, t in trained.state_dict().items() if "tracked" not in n}
    model = load(_saved(kept, tmp_path))
    assert torch.equal(model.constants["1.running_mean"], trained[1].running_mean)  # type: ignore[arg-type]
    del kept["1.running_mean"]
    with pytest.raises(InputError, match=r"has no '1\.running_mean'"):
        load(_saved(kept, tmp_path))
    load(_saved(kept, tmp_path), model__mode="train")
