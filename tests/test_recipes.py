"""The recipes of docs/recipes.md, each run as it stands there, and with the usual mistakes."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from ggl_audit.case.appearance import appearance_of
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.errors import AuditError
from ggl_audit.inputs.spec_file import read_spec

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "yaml")}
OUTPUTS = dict(text.split("\n", 1) for kind, text in BLOCKS if kind == "console")
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")

CHEAP = {
    "device": "cpu",
    "attack.evaluations": 13,
    "attack.method": "ggl",
    "evidence.matching_trials": 2,
    "evidence.reconstruction_trials": 1,
}

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a program of the page in a folder with all of its files, and returns its variables.

    Replacements are mistakes to plant, as pairs of a text that stands in the program once.
    """
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    shutil.copy(samples / "captures" / "private.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = {Path(name).stem for name in FILES}
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another test

    def run(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
        text = FILES[name]
        for right, wrong in replacements:
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        Path(name).write_text(text)
        return runpy.run_path(name)

    yield run
    for name in own:
        sys.modules.pop(name, None)


def prepared(name: str, **changes: Any) -> Case:
    overrides = {**CHEAP, **{key.replace("__", "."): value for key, value in changes.items()}}
    return prepare(read_spec(Path(name), overrides.items()))


def outcomes(name: str, **changes: Any) -> dict[str, str]:
    """From each check, by its first word or words, to its outcome."""
    return {c.step.split("(")[0]: c.outcome for c in prepared(name, **changes).audited.checks}


def says_what_the_page_says(name: str, *more: str) -> bool:
    """Whether `ggl-audit check` prints the page's lines, `...` for some, whatever the numbers."""
    command = f"$ ggl-audit check {name}"
    flags = [f"--set={key}={value}" for key, value in CHEAP.items()]
    result = CliRunner().invoke(app, [*command.split()[2:], *flags, *more])
    assert result.exit_code == 0, result.output
    said, *parts = (
        " ".join(NUMBER.sub("N", text).split())
        for text in (result.stdout, *OUTPUTS[command].split("...\n"))
    )
    return re.search(".*".join(map(re.escape, parts)), said) is not None


def test_every_block_of_the_page_is_used() -> None:
    assert set(FILES) == {
        "models.py", "data.py", "loop.py", "loop.yaml", "amp.py", "dp.py", "dp.yaml",
        "flower_client.py", "flower_client.yaml", "flower_arrays.py", "flower_server.py",
        "flower_server.yaml",
    }  # fmt: skip
    assert len(FILES) + len(OUTPUTS) == len(BLOCKS)


GRADIENT = "the declared model and loss"
PICTURE = "the private image"


class TestALoop:
    def test_the_recipe(self, run: Run) -> None:
        run("loop.py")
        assert says_what_the_page_says("loop.yaml")
        assert outcomes("loop.yaml") == {GRADIENT: "agrees", PICTURE: "agrees"}

    def test_mixed_precision(self, run: Run) -> None:
        run("amp.py")
        assert outcomes("loop.yaml") == {GRADIENT: "agrees", PICTURE: "agrees"}
        run("amp.py", ("scaler.unscale_(optimizer)\n", ""))
        assert outcomes("loop.yaml") == {GRADIENT: "contradicts", PICTURE: "contradicts"}

    def test_several_backward_passes(self, run: Run) -> None:
        again = "loss = F.cross_entropy(model(images.flip(3)), labels + 1)\nloss.backward()\n"
        run("loop.py", ("loss.backward()\n", f"loss.backward()\n{again}"))
        assert outcomes("loop.yaml")[GRADIENT] == "contradicts"
        both = {"capture__batch_size": 2, "evidence__truth": None}
        seen = prepared("loop.yaml", **both, model__loss={"reduction": "sum"})
        assert {check.outcome for check in seen.audited.checks} == {"agrees"}
        said = appearance_of(seen, seen.audited)
        assert "It looks like a sum over 2 images, with the declared loss." in said

    def test_another_normalization(self, run: Run) -> None:
        run("loop.py")
        wrong = outcomes("loop.yaml", model__input__mean=[0.1307], model__input__std=[0.3081])
        assert wrong[PICTURE] == "contradicts"

    def test_weights_saved_after_the_step(self, run: Run) -> None:
        save = 'torch.save(model.state_dict(), "weights.pt")'
        run("loop.py", (save, ""), ("optimizer.step()\n", f"optimizer.step()\n{save}\n"))
        assert outcomes("loop.yaml") == {GRADIENT: "contradicts", PICTURE: "contradicts"}

    def test_a_head_that_was_not_used(self, run: Run) -> None:
        unused = "model = net()\nmodel.aside = torch.nn.Linear(2, 2)\n"
        skips = "model.forward = lambda images: model[:5](images)"
        with pytest.raises(AuditError, match=r"'aside\.weight' has no gradient"):
            run("loop.py", ("model = net()", unused + skips))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
class TestAnOpacusStep:
    @pytest.fixture(autouse=True)
    def _opacus(self) -> None:
        pytest.importorskip("opacus", reason="opacus, a development dependency, is not installed")

    def test_the_recipe(self, run: Run) -> None:
        names = run("dp.py")
        images, labels = names["images"], names["labels"]
        assert len(labels) > 1
        drawn = {"capture__batch_size": len(labels), "capture__labels": labels.tolist()}
        seen = prepared("dp.yaml", **drawn)
        assert {check.outcome for check in seen.audited.checks} == {"agrees"}
        flags = [f"--set={k.replace('__', '.')}={v}" for k, v in drawn.items()]
        assert says_what_the_page_says("dp.yaml", *flags)

        # What is left beside each image's clipped gradient is the noise of the sum.
        module = seen.model.module
        total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(module(image[None]), label[None])
            gradient = torch.autograd.grad(loss, list(module.parameters()))
            norm = torch.stack([tensor.norm() for tensor in gradient]).norm()
            for name, tensor in zip(total, gradient, strict=True):
                total[name] += tensor / max(1.0, float(norm))
        noise = torch.cat([(seen.audited.observed[n] - t).flatten() for n, t in total.items()])
        assert noise.std() == pytest.approx(1, abs=4 / (2 * len(noise)) ** 0.5)
        assert abs(noise.mean()) < 4 / len(noise) ** 0.5

    @pytest.mark.parametrize(
        "mistake",
        [
            ("optimizer.step()\n", ""),
            ("optimizer.step()\n", "optimizer.signal_skip_step()\noptimizer.step()\n"),
            ("name: size * p.grad", "name: p.grad"),
        ],
    )
    def test_a_capture_without_its_noise(self, run: Run, mistake: tuple[str, str]) -> None:
        labels = run("dp.py", mistake)["labels"].tolist()
        wrong = outcomes("dp.yaml", capture__batch_size=len(labels), capture__labels=labels)
        assert wrong["noise"] == "contradicts"

    @pytest.mark.parametrize("size", ["== 4", "< 4", "> 4"])
    def test_a_mean(self, run: Run, size: str) -> None:
        """Right for a batch of the expected size alone."""
        drawn = f"next(batch for batch in loader if len(batch[1]) {size})"
        mean = ("name: size * p.grad", "name: p.grad")
        labels = run("dp.py", ("next(iter(loader))", drawn), mean)["labels"].tolist()
        found = outcomes(
            "dp.yaml",
            capture__batch_size=len(labels),
            capture__labels=labels,
            model__loss={"reduction": "mean"},
            guarantee__reduction="mean",
        )
        assert ("contradicts" in found.values()) == (size != "== 4")


def first_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return runpy.run_path("models.py")["net"](batch_norm=True).state_dict()


class TestAFlowerClient:
    @pytest.fixture(autouse=True)
    def _flower(self) -> None:
        pytest.importorskip("flwr", reason="flwr, a development dependency, is not installed")

    def fit(self, run: Run, *mistakes: tuple[str, str]) -> list[np.ndarray]:
        """One round through Flower's own messages; what the server gets back."""
        from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays

        client = run("flower_client.py", *mistakes)["client_fn"](None)
        start = [tensor.numpy() for tensor in first_weights().values()]
        return parameters_to_ndarrays(
            client.fit(FitIns(ndarrays_to_parameters(start), {})).parameters
        )

    def test_the_recipe(self, run: Run) -> None:
        trained = self.fit(run)
        assert says_what_the_page_says("flower_client.yaml")
        assert outcomes("flower_client.yaml") == {PICTURE: "agrees"}
        start = torch.load("weights.pt", weights_only=True)
        update = load_file("update.safetensors")
        assert len(update) == len(trained) == len(start)
        for place, (before, after) in enumerate(zip(start.values(), trained, strict=True)):
            if before.is_floating_point():
                np.testing.assert_array_equal(update[str(place)], before.numpy() - after)
        for mistake in (
            {"capture__local__lr": 0.02},
            {"capture__local__epochs": 1},
            {"model__mode": "eval"},
        ):
            assert outcomes("flower_client.yaml", **mistake)[PICTURE] == "contradicts"

    def test_another_sign(self, run: Run) -> None:
        self.fit(run, ("parameters, trained,", "trained, parameters,"))
        assert outcomes("flower_client.yaml") == {GRADIENT: "contradicts", PICTURE: "contradicts"}
        declared = {"capture__sign": "after_minus_before"}
        assert outcomes("flower_client.yaml", **declared) == {PICTURE: "agrees"}

    def test_another_optimizer(self, run: Run) -> None:
        self.fit(run, ("torch.optim.SGD(", "torch.optim.Adam("))
        assert outcomes("flower_client.yaml") == {PICTURE: "contradicts"}
        declared = {"capture__local__optimizer": "adam"}
        assert outcomes("flower_client.yaml", **declared) == {PICTURE: "agrees"}

    def test_weights_that_share_the_models_memory(self, run: Run) -> None:
        shared = (
            "self.train()\n",
            "parameters = self.get_parameters(config)\n        self.train()\n",
        )
        with pytest.raises(AuditError, match="the same before and after training"):
            self.fit(run, shared)

    def test_arrays_with_names(self, run: Run) -> None:
        from flwr.app import ArrayRecord

        fit = run("flower_arrays.py")["fit"]
        start = first_weights()
        trained = fit(ArrayRecord(start)).to_torch_state_dict()
        assert outcomes("flower_client.yaml") == {PICTURE: "agrees"}
        update = load_file("update.safetensors")
        assert update.keys() == start.keys()
        for name, tensor in trained.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(update[name], start[name] - tensor, rtol=0, atol=0)

    def test_the_server(self, run: Run) -> None:
        from flwr.common import ndarrays_to_parameters
        from flwr.server.client_manager import SimpleClientManager
        from flwr.server.client_proxy import ClientProxy

        client = run("flower_client.py")["client_fn"](None)

        class Here(ClientProxy):
            """A client in this very process."""

            def fit(self, ins, timeout, group_id):
                return client.fit(ins)

            get_properties = get_parameters = evaluate = reconnect = None

        start = [tensor.numpy() for tensor in first_weights().values()]
        manager = SimpleClientManager()
        manager.register(Here("0"))
        recorder = run("flower_server.py")["Recorder"](
            min_fit_clients=1, min_evaluate_clients=1, min_available_clients=1
        )
        sent = recorder.configure_fit(1, ndarrays_to_parameters(start), manager)
        results = [(proxy, proxy.fit(ins, None, 1)) for proxy, ins in sent]
        recorder.aggregate_fit(1, results, [])
        assert outcomes("flower_server.yaml") == {PICTURE: "agrees"}
        assert outcomes("flower_client.yaml") == {PICTURE: "agrees"}
        wrong = outcomes("flower_server.yaml", capture__local__lr=0.02)
        assert wrong[PICTURE] == "contradicts"
