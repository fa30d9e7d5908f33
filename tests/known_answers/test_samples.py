"""The sample audits must come out as the physics says, at several seeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggl_audit.audit import run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.inputs.capture import write_capture
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

ENOUGH = {
    "attack__method": "ggl",
    "attack__optimizer": "cma",
    "attack__evaluations": 1200,
    "evidence__matching_trials": 60,
    "evidence__reconstruction_trials": 12,
    "evidence__control_trials": 6,
}
FEWER = {**ENOUGH, "attack__evaluations": 300}


def audit(spec: Spec) -> Report:
    return run_audit(spec, Counter())


@pytest.mark.parametrize("name", ["undefended", "sparsified", "sign", "noise"])
def test_what_leaks_never_passes(sample: Callable[..., Spec], name: str) -> None:
    """Over several seeds it is among the scenarios."""
    report = audit(sample(name, **ENOUGH))
    assert report.verdict.grade in ("C", "D", "F")
    assert report.verdict.exit_code == 1
    assert "GGL002" in [finding.id for finding in report.findings]
    if name != "noise":
        assert report.verdict.grade == "F"
        found = report.captured.reconstructions[0]
        assert (found.rank, found.matching_rank) == (1, 1)
        assert report.captured.labels == [2]
        assert found.metrics is not None
        assert found.metrics.psnr_db is not None
        assert found.metrics.psnr_db > 18


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_differential_privacy_is_never_called_reconstructed(
    sample: Callable[..., Spec], seed: int
) -> None:
    report = audit(sample("dp", **FEWER, seed=seed))
    assert report.verdict.grade in ("A", "B", "C")
    guarantee, ceiling = report.evidence.guarantee, report.evidence.ceiling
    assert guarantee is not None
    assert ceiling is not None
    assert guarantee.epsilon == pytest.approx(4.3772, abs=1e-4)
    assert ceiling.lower <= guarantee.reconstruction_bound
    assert "GGL006" not in [finding.id for finding in report.findings]


def test_the_null_control_finds_nothing_and_the_undefended_one_works(
    sample: Callable[..., Spec],
) -> None:
    report = audit(sample("noise", **{**ENOUGH, "evidence__reconstruction_trials": 20}))
    null, undefended = report.evidence.controls.null, report.evidence.controls.undefended
    assert null is not None
    assert undefended is not None
    assert null.lower <= null.chance
    assert undefended.successes >= 5
    assert undefended.psnr_db > null.psnr_db + 5


def test_noise_that_was_left_out_is_a_contradiction(
    sample: Callable[..., Spec], samples: Path
) -> None:
    capture = str((samples / "captures" / "undefended.safetensors").absolute())
    for name in ("noise", "dp"):
        report = audit(sample(name, capture__gradient=capture))
        assert (report.verdict.grade, report.verdict.exit_code) == ("inconclusive", 3)
        assert "GGL005" in [finding.id for finding in report.findings]


@pytest.mark.parametrize(
    ("name", "other"), [("sparsified", "undefended"), ("sign", "sparsified"), ("sign", "noise")]
)
def test_a_capture_with_another_defense_is_a_contradiction(
    sample: Callable[..., Spec], samples: Path, name: str, other: str
) -> None:
    capture = str((samples / "captures" / f"{other}.safetensors").absolute())
    report = audit(sample(name, capture__gradient=capture))
    assert report.verdict.grade == "inconclusive"
    assert report.findings[0].id == "GGL005"


def no_pass(report: Report, *words: str) -> None:
    assert (report.verdict.grade, report.verdict.exit_code) == ("inconclusive", 3)
    for word in words:
        assert word in report.verdict.reason


QUICK = {"attack__evaluations": 13, "evidence__matching_trials": 60}


def test_a_step_that_the_capture_cannot_show_earns_no_pass(sample: Callable[..., Spec]) -> None:
    """Undefended but for its sparsity, declared as noise that the sparsity would hide."""
    steps = [
        {"name": "clip", "bound": 1.0},
        {"name": "noise", "std": 10.0},
        {"name": "sparsify", "fraction": 0.9},
    ]
    few = {**QUICK, "evidence__matching_trials": 20}
    no_pass(audit(sample("sparsified", **few, defense=steps)), "cannot show noise")
    steps = [
        {"name": "sparsify", "fraction": 0.5},
        {"name": "clip", "bound": 1.0},
        {"name": "noise", "std": 1.0},
    ]
    report = audit(sample("dp", **few, defense=steps, evidence__truth=None))
    no_pass(report, "cannot show sparsify")


def test_steps_after_noise_without_a_known_likelihood_earn_no_pass(
    sample: Callable[..., Spec],
) -> None:
    steps = [
        {"name": "clip", "bound": 1.0},
        {"name": "noise", "std": 3.0},
        {"name": "sparsify", "fraction": 0.5},
        {"name": "sign"},
    ]
    no_pass(audit(sample("raw", **QUICK, defense=steps)), "better matching")


def test_matching_sees_noise_through_the_sign(sample: Callable[..., Spec]) -> None:
    """Where the distance of replicas would find next to nothing."""
    steps = [{"name": "noise", "std": 0.1}, {"name": "sign"}]
    report = audit(sample("raw", **QUICK, defense=steps))
    assert report.verdict.of("image").grade == "C"
    assert report.evidence.ceiling is not None
    assert report.evidence.ceiling.successes > 20


def test_candidates_that_cannot_be_told_apart_earn_no_pass(
    sample: Callable[..., Spec], tmp_path: Path
) -> None:
    import numpy as np

    images = np.zeros((40, 16, 16), np.uint8)
    np.savez(tmp_path / "same.npz", images=images, labels=np.full(40, 2))
    reference = {"npz": str(tmp_path / "same.npz")}
    no_pass(
        audit(sample("sparsified", **QUICK, evidence__reference=reference)),
        "even without the defense",
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("undefended", {"model__weights": "weights/trained.safetensors"}),
        ("sparsified", {"model__input": {"shape": [1, 16, 16], "mean": [0.0], "std": [1.0]}}),
        ("sign", {"model__weights": "weights/trained.safetensors"}),
        ("undefended", {"model__loss": {"scale": 0.5}}),
        ("dp", {"defense": [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": 1.1}]}),
    ],
)
def test_a_wrong_model_shows_where_the_private_image_is_held(
    sample: Callable[..., Spec], name: str, changes: dict[str, object]
) -> None:
    report = audit(sample(name, **changes))
    no_pass(report, "contradicts")
    assert report.findings[0].id == "GGL005"


def test_a_scaled_loss_under_noise_shows_without_the_private_image(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    good = load_file(samples / "captures" / "undefended.safetensors")
    scaled = {name: 65536 * tensor for name, tensor in good.items()}
    save_file(scaled, tmp_path / "amp.safetensors")
    capture = str(tmp_path / "amp.safetensors")
    report = audit(sample("dp", **QUICK, capture__gradient=capture, evidence__truth=None))
    no_pass(report, "clip(bound=1.0, scope=global")


def test_a_weak_prior_cannot_make_a_pass(sample: Callable[..., Spec], tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(
        "import torch\n"
        "class Blank(torch.nn.Module):\n"
        "    def forward(self, latents):\n"
        "        return torch.zeros(len(latents), 1, 16, 16) + 0 * latents.sum()\n"
    )
    report = audit(
        sample(
            "sparsified",
            **FEWER,
            prior={"factory": f"{tmp_path / 'noise.py'}:Blank", "latent": {"shape": [4]}},
        )
    )
    assert report.verdict.of("image").grade == "C"
    assert "GGL007" in [finding.id for finding in report.findings]


def test_a_raw_capture_is_defended_by_the_tool(sample: Callable[..., Spec]) -> None:
    report = audit(sample("raw", **FEWER))
    assert report.verdict.grade == "F"
    checked = ["the declared model and loss", "the private image"]
    assert [check.step for check in report.evidence.checks] == checked
    assert "capture.stage is raw" in report.evidence.not_measured["checks"]


@pytest.mark.parametrize(
    "name", ["undefended", "sparsified", "sign", "noise", "dp", "trained", "raw"]
)
def test_the_captures_are_made_again_bit_for_bit(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path, name: str
) -> None:
    spec = sample(name)
    again = tmp_path / "again.safetensors"
    write_capture(again, capture_gradient(spec, [samples / "captures" / "private.png"], [2]))
    assert again.read_bytes() == spec.resolve(spec.capture.gradient).read_bytes()


def test_a_capture_of_another_tool_is_the_same_gradient(
    sample: Callable[..., Spec], samples: Path
) -> None:
    """A plain training step in single precision, as a client's own code does it."""
    import sys

    sys.path.insert(0, str(samples))
    from models import small_cnn

    from ggl_audit.inputs.images import read_image

    module = small_cnn()
    module.load_state_dict(load_file(samples / "weights" / "round_0.safetensors"))
    image = read_image(samples / "captures" / "private.png", (1, 16, 16))
    torch.nn.CrossEntropyLoss()(module((image[None] - 0.5) / 0.5), torch.tensor([2])).backward()
    captured = load_file(samples / "captures" / "undefended.safetensors")
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_readme_names_the_samples(samples: Path) -> None:
    readme = (samples.parent / "README.md").read_text()
    for path in samples.glob("digits_*.yaml"):
        assert re.search(rf"`{path.stem}`", readme), path.stem


def test_a_gradient_of_nothing_does_not_fail(
    sample: Callable[..., Spec], samples: Path, tmp_path: Path
) -> None:
    good = load_file(samples / "captures" / "dp.safetensors")
    torch.manual_seed(0)
    save_file({name: torch.randn_like(t) for name, t in good.items()}, tmp_path / "n.safetensors")
    report = audit(sample("dp", **FEWER, capture__gradient=str(tmp_path / "n.safetensors")))
    assert report.verdict.grade in ("A", "B", "C")
