from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ggl_audit.attack.matching import Matching
from ggl_audit.basics.gradient import Gradient, flat, stack, take
from ggl_audit.case.preparation import prepare
from ggl_audit.client.clients import DeclaredClient, OwnClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Clip, Context, Noise, Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.experiments.alternatives import other_layouts, other_models
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.spec import Spec
from tests.conftest import contexts, plain_gradient
from tests.known_answers.clients import step

DEFENSE = Pipeline([Clip(bound=0.5), Noise(std=1e-4)])


def context() -> Context:
    return Context(torch.Generator().manual_seed(3))


def own(model: ClientModel, batch_size: int, averaged: bool, scale: float = 1.0) -> OwnClient:
    def client(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
        sent = step(module, images, labels, bound=0.5, std=1e-4 / batch_size)
        return {name: scale * tensor for name, tensor in sent.items()}

    clients = ClientGradients(model, DEFENSE)
    return OwnClient(client, clients, DEFENSE, digits("reference"), batch_size, averaged)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("averaged", [True, False])
def test_what_is_left_of_a_batch_is_the_images_own_share(
    model: ClientModel, batch_size: int, averaged: bool
) -> None:
    data = digits("private")
    client = own(model, batch_size, averaged, scale=1.0 if averaged else batch_size)
    sent = client.send(data.images[:2, None], data.labels[:2, None], contexts(2))
    for i in range(2):
        alone = plain_gradient(model, data.images[i], int(data.labels[i]))
        expected = Clip(bound=0.5).apply(alone, context())
        difference = flat(take(sent, i)) - flat(expected)
        assert float(difference.norm()) < 0.05 * 0.5
        assert float(difference.std()) == pytest.approx(1e-4, rel=0.2)


def test_the_same_context_gives_the_same_batches(model: ClientModel) -> None:
    data = digits("private")
    first, second = (
        own(model, 3, averaged=True).send(data.images[:1, None], data.labels[:1, None], contexts(1))
        for _ in range(2)
    )
    assert torch.equal(flat(first), flat(second))


def test_the_clients_code_cannot_change_the_model(model: ClientModel) -> None:
    before = {name: p.clone() for name, p in model.module.named_parameters()}

    def training(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
        sent = step(module, images, labels, bound=1.0, std=0.1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter -= sent[name]
        return sent

    client = OwnClient(
        training, Matching(model, DEFENSE), DEFENSE, digits("reference"), 1, averaged=True
    )
    data = digits("private")
    client.send(data.images[:1, None], data.labels[:1, None], contexts(1))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_declared_client_does_what_is_declared(model: ClientModel) -> None:
    data = digits("private")
    clip = Pipeline([Clip(bound=0.5)])
    sent = DeclaredClient(ClientGradients(model, clip), clip).send(
        data.images[:3, None], data.labels[:3, None], contexts(3)
    )
    plain = stack(
        [
            clip.apply(plain_gradient(model, image, int(label)), context())
            for image, label in zip(data.images[:3], data.labels[:3], strict=True)
        ]
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def step(model, images, labels): raise ValueError('planted')", "ValueError: planted"),
        ("def step(model, images, labels): return [1]", "returned a list"),
        ("def step(model, images, labels): return {'x': labels}", "'x'"),
        ("def step(model, images): return {}", "TypeError"),
        ("other = 1", "no callable 'step'"),
        (
            "def step(model, images, labels):\n"
            "    return {n: p.detach() / 0 for n, p in model.named_parameters()}",
            "NaN or infinite",
        ),
    ],
)
def test_a_fault_in_the_clients_code_is_told_before_anything_is_run(
    sample: Callable[..., Spec], tmp_path: Path, code: str, problem: str
) -> None:
    (tmp_path / "client.py").write_text(code)
    spec = sample("dp", client={"step": f"{tmp_path / 'client.py'}:step"})
    with pytest.raises(SpecError, match=problem) as error:
        prepare(spec)
    assert error.value.key[:1] == ("client",)


def test_a_batch_needs_what_each_sample_may_add(sample: Callable[..., Spec]) -> None:
    client = {"step": "client.py:step", "batch_size": 4}
    with pytest.raises(SpecError, match="needs guarantee"):
        sample("dp", client=client, guarantee=None)


def test_companions_cannot_be_taken_out_after_a_step_that_follows_the_noise(
    sample: Callable[..., Spec],
) -> None:
    steps = [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": 1.0}, {"name": "sign"}]
    path = Path(__file__).parent / "known_answers" / "clients.py"
    client = {"step": f"{path}:step", "kwargs": {"bound": 1.0, "std": 1.0}, "batch_size": 2}
    with pytest.raises(SpecError, match="cannot be taken out"):
        prepare(sample("raw", defense=steps, client=client, guarantee=GUARANTEE))


GUARANTEE = {"unit": "sample", "reduction": "sum", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}


def test_the_clients_code_is_compared_with_the_declaration(sample: Callable[..., Spec]) -> None:
    path = Path(__file__).parent / "known_answers" / "clients.py"
    step_as = {"step": f"{path}:step"}
    right = {**step_as, "kwargs": {"bound": 1.0, "std": 1.0}}
    assert prepare(sample("dp", client=right)).doubts == []
    wrong = {**step_as, "kwargs": {"bound": 1.0, "std": 0.5}}
    assert "own code contradicts" in prepare(sample("dp", client=wrong)).doubts[0].text
    batch = {**right, "batch_size": 3}
    mean = {**GUARANTEE, "reduction": "mean"}
    doubts = prepare(sample("dp", client=batch, guarantee=mean)).doubts
    assert "a mean over 3 images" in doubts[0].text


def test_what_else_a_capture_may_be_is_tried_as_far_as_it_can_be(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    """Dropout has no train mode here, which must not end the audit."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(dropout=0.0):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(dropout),\n"
        "        nn.ReLU(), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))"
    )
    names = []
    for dropout in (0.0, 0.5):
        model = {
            "factory": f"{tmp_path / 'net.py'}:net",
            "kwargs": {"dropout": dropout},
            "input": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
        }
        spec = sample("undefended", model=model, evidence__truth=None)
        loaded = load_model(spec, torch.device("cpu"))
        data = digits("private")
        gradient = plain_gradient(loaded, data.images[0], int(data.labels[0]))
        save_file(gradient, tmp_path / "g.safetensors")
        spec = sample(
            "undefended",
            model=model,
            evidence__truth=None,
            capture__gradient=str(tmp_path / "g.safetensors"),
        )
        case = prepare(spec)
        tried = [*other_models(case), *other_layouts(case)]
        names.append([cause.text for cause, _ in tried])
    assert names[0] == ["the model was in train mode", *names[1]]
    assert any("mean [0.1307]" in cause for cause in names[1])
    assert not any("mean [0.5]" in cause for cause in names[1])
    assert "5.weight and 6.weight are swapped" in names[1]
