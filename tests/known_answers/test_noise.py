"""Noise that is not what was declared, in the client's own code and in captures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.preparation import prepare
from ggl_audit.defenses import Check
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.experiments.noise import planned_releases, try_noise, why_no_noise_test
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

FEWER = 24
CODE = Path(__file__).parent / "clients.py"
FEW = {
    "attack__evaluations": 13,
    "attack__method": "ggl",
    "evidence__reconstruction_trials": 0,
    "evidence__matching_trials": 60,
}
GUARANTEE = {"unit": "sample", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}


@pytest.fixture(autouse=True)
def fewer_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as these mistakes take."""
    monkeypatch.setattr("ggl_audit.experiments.noise.RELEASES", FEWER)


def own(kind: str, **more: Any) -> dict[str, Any]:
    return {"step": f"{CODE}:noise_of", "kwargs": {"std": 1.0, "kind": kind}, **more}


def outcome_of(spec: Spec) -> NoiseTest | None:
    case, progress = prepare(spec), Counter()
    if why_no_noise_test(case):
        return None
    found = try_noise(case, planned_releases(case), progress.advance)
    assert progress.done == planned_releases(case)
    return found


@pytest.mark.parametrize(
    ("kind", "fault", "words"),
    [
        ("seeded", "repeated", "the noise is the same in releases 1 and 2"),
        ("tiled", "repeated", "every value is the one 64 places before it"),
        ("tensors alike", "repeated", "2.weight and 5.weight begin with the same noise"),
        ("a hundredth without", "missing", "values of the gradient (1 %) have no noise"),
        ("head without", "missing", "values of 7.weight (100%) have no noise"),
        ("five times the share", "share", "times the declared one"),
    ],
)
def test_wrong_noise_of_a_clients_own_code_is_named(
    sample: Callable[..., Spec], kind: str, fault: str, words: str
) -> None:
    noise = outcome_of(sample("dp", client=own(kind)))
    assert noise is not None
    assert noise.releases == FEWER
    assert noise.violations[0].fault == fault
    assert words in noise.violations[0].detail


@pytest.mark.parametrize("seed", range(3))
def test_right_noise_of_a_clients_own_code_is_not_accused(
    sample: Callable[..., Spec], seed: int
) -> None:
    noise = outcome_of(sample("dp", client=own("right"), seed=seed))
    assert noise is not None
    assert noise.violations == []


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_what_is_sent_in_half_precision_is_not_taken_for_noise_on_a_grid(
    sample: Callable[..., Spec], kind: str
) -> None:
    noise = outcome_of(sample("dp", client=own(f"sent in {kind}")))
    assert noise is not None
    assert noise.violations == []
    noise = outcome_of(sample("dp", client=own("drawn in bfloat16")))
    assert noise is not None
    assert noise.violations[0].fault == "discrete"


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_batch_leaves_the_declared_noise(sample: Callable[..., Spec], reduction: str) -> None:
    """The companions' share is taken out, with a mean's noise enlarged by the batch."""
    guarantee = {**GUARANTEE, "reduction": reduction}
    std = 1.0 if reduction == "mean" else 3.0
    (step := own("", batch_size=3)).update(
        step=f"{CODE}:{'step' if reduction == 'mean' else 'summed'}",
        kwargs={"bound": 1.0, "std": std},
    )
    defense = [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": std}]
    noise = outcome_of(sample("dp", client=step, guarantee=guarantee, defense=defense))
    assert noise is not None
    assert noise.violations == []
    weak = {**step, "kwargs": {"bound": 1.0, "std": 0.9 * std}}
    noise = outcome_of(sample("dp", client=weak, guarantee=guarantee, defense=defense))
    assert noise is not None
    assert noise.violations[0].fault == "scale"
    assert " has 0.9" in noise.violations[0].detail


def test_a_batch_that_is_captured_is_tested_as_it_is_sent(
    sample: Callable[..., Spec], samples: Path
) -> None:
    step = {"step": f"{CODE}:step", "kwargs": {"bound": 1.0, "std": 0.5}, "batch_size": 2}
    keys = {
        "client": step,
        "capture__batch_size": 2,
        "capture__labels": [2, 3],
        "evidence__truth": None,
        "guarantee": {**GUARANTEE, "reduction": "mean"},
        "defense": [
            {"name": "clip", "bound": 1.0, "unit": "sample"},
            {"name": "noise", "std": 0.5},
        ],
    }
    noise = outcome_of(sample("dp", **keys))
    assert noise is not None
    assert noise.violations == []


def test_where_noise_cannot_be_told_the_report_says_why(sample: Callable[..., Spec]) -> None:
    for keys, words in (
        ({"client": None}, "client.step"),
        ({"client": own("right"), "evidence__matching_trials": 0}, "matching_trials is 0"),
    ):
        report = run_audit(sample("dp", **{**FEW, **keys}), Counter())
        assert report.evidence.noise is None
        assert words in report.evidence.not_measured["noise"]
    steps = [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": 1.0}, {"name": "sign"}]
    signed = sample("raw", client=own("right"), defense=steps)
    assert outcome_of(signed) is None


def test_wrong_noise_earns_no_pass(sample: Callable[..., Spec]) -> None:
    """Without a declared guarantee too; the report holds it as JSON."""
    for guarantee, finding in (({}, "GGL006"), ({"guarantee": None}, "GGL005")):
        progress = Counter()
        public = {"evidence__public": ["label"]}
        spec = sample("dp", **FEW, **guarantee, **public, client=own("tensors alike"))
        report = run_audit(spec, progress)
        assert progress.planned == progress.done
        assert planned_releases(prepare(spec)) == FEWER
        assert (report.verdict.grade, report.verdict.exit_code) == ("inconclusive", 3)
        assert "begin with the same noise" in report.verdict.reason
        assert finding in [found.id for found in report.findings]
        again = Report.model_validate_json(report.model_dump_json())
        assert again.evidence.noise is not None
        assert again.evidence.noise.violations[0].fault == "repeated"


def seen(spec: Spec) -> list[Check]:
    return [check for check in prepare(spec).audited.checks if check.step == "the declared noise"]


def replaced(samples: Path, folder: Path, change: Callable[[Gradient, Gradient], Gradient]) -> str:
    """The capture of the DP sample with other noise, given its share and its noise."""
    plain = load_file(samples / "captures" / "undefended.safetensors")
    norm = torch.stack([tensor.norm() for tensor in plain.values()]).norm()
    share = {name: tensor / norm.clamp(min=1) for name, tensor in plain.items()}
    draw = torch.Generator().manual_seed(5)
    noise = {name: torch.randn(t.shape, generator=draw) for name, t in share.items()}
    other = change(share, noise)
    sent = {name: share[name] + other[name] for name in share}
    save_file({n: t.contiguous() for n, t in sent.items()}, folder / "sent.safetensors")
    return str(folder / "sent.safetensors")


def alike(share: Gradient, noise: Gradient) -> Gradient:
    return {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        for name, tensor in noise.items()
    }


def tile(share: Gradient, noise: Gradient) -> Gradient:
    short = torch.randn(64, generator=torch.Generator().manual_seed(3))
    return {
        name: short.repeat(-(-t.numel() // 64))[: t.numel()].view_as(t) for name, t in noise.items()
    }


def hundredth_without(share: Gradient, noise: Gradient) -> Gradient:
    draw = torch.Generator().manual_seed(3)
    return {n: t * (torch.rand(t.shape, generator=draw) > 0.01) for n, t in noise.items()}


def coarse(share: Gradient, noise: Gradient) -> Gradient:
    return {name: (20 * tensor).round() / 20 for name, tensor in noise.items()}


def heavy(share: Gradient, noise: Gradient) -> Gradient:
    laplace = torch.distributions.Laplace(0.0, 2**-0.5)
    torch.manual_seed(0)
    return {name: laplace.sample(tensor.shape) for name, tensor in noise.items()}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(
    ("change", "words", "needs_truth"),
    [
        (alike, "begin with the same noise", False),
        (tile, "64 places before it", False),
        (hundredth_without, "have no noise", False),
        (coarse, "as on a grid", False),
        (heavy, "of the noise", True),
    ],
)
def test_wrong_noise_in_a_capture_is_named(
    sample: Callable[..., Spec],
    samples: Path,
    tmp_path: Path,
    change: Callable[[Gradient, Gradient], Gradient],
    words: str,
    needs_truth: bool,
    held: bool,
) -> None:
    keys: dict[str, Any] = {"capture__gradient": replaced(samples, tmp_path, change)}
    if not held:
        keys["evidence__truth"] = None
    (check,) = seen(sample("dp", **keys))
    wrong = held or not needs_truth
    assert check.outcome == ("contradicts" if wrong else "agrees")
    assert (words in check.detail) == wrong


def test_a_capture_that_was_rounded_to_half_precision_is_not_accused(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    """Whatever the file's own format is."""
    sent = load_file(samples / "captures" / "dp.safetensors")
    for kind in (torch.float16, torch.bfloat16):
        for stored in (kind, torch.float32):
            rounded = {name: tensor.to(kind).to(stored) for name, tensor in sent.items()}
            save_file(rounded, tmp_path / "rounded.safetensors")
            keys = {"capture__gradient": str(tmp_path / "rounded.safetensors")}
            for held in ({}, {"evidence__truth": None}):
                (check,) = seen(sample("dp", **keys, **held))
                assert check.outcome == "agrees"


@pytest.mark.parametrize("name", ["dp", "noise", "trained"])
@pytest.mark.parametrize("held", [True, False])
def test_the_samples_noise_is_right(sample: Callable[..., Spec], name: str, held: bool) -> None:
    (check,) = seen(sample(name, **({} if held else {"evidence__truth": None})))
    assert check.outcome == "agrees"


def test_another_private_image_is_not_taken_for_wrong_noise(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    """Beside weak noise the wrong image leaves much; that is said of the image."""
    from ggl_audit.inputs.images import digits, write_image

    write_image(tmp_path / "other.png", digits("private").images[40])
    case = prepare(sample("noise", evidence__truth=str(tmp_path / "other.png")))
    outcomes = {check.step: check.outcome for check in case.audited.checks}
    assert outcomes["the declared noise"] == "agrees"


def test_noise_that_two_captures_share_is_named(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    first = replaced(samples, tmp_path, lambda share, noise: noise)
    sent = load_file(first)
    sent["7.bias"] = sent["7.bias"] + 0.5
    save_file(sent, tmp_path / "second.safetensors")
    others = [str(tmp_path / "second.safetensors")]
    found = seen(sample("dp", capture__gradient=first, capture__others=others))
    assert [check.outcome for check in found] == ["agrees", "contradicts"]
    assert "of the captures of the round" in found[1].detail


def test_an_update_has_the_rounding_of_its_weights(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    """Noise that is small beside the weights lies on their grid, which is no fault of the noise."""
    weights = load_file(samples / "weights" / "round_0.safetensors")
    draw = torch.Generator().manual_seed(0)
    after = {n: w - 1e-5 * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    save_file({n: weights[n] - after[n] for n in weights}, tmp_path / "update.safetensors")
    local = {"lr": 0.1, "epochs": 1}
    keys = {
        "capture__gradient": str(tmp_path / "update.safetensors"),
        "capture__kind": "update",
        "capture__local": local,
        "evidence__truth": None,
        "defense": [{"name": "noise", "std": 1e-5}],
        "guarantee": None,
    }
    assert all(check.outcome == "agrees" for check in seen(sample("dp", **keys)))
