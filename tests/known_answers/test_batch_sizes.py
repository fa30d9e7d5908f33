"""What must come out for 1, 2, 4, 8 and 16 images in a release, all of which the auditor holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom

from ggl_audit.audit import run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import SpecError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, write_image
from ggl_audit.inputs.png_uri import png_uri
from ggl_audit.report.html import render_html
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter

SIZES = [1, 2, 4, 8, 16]
SMALL = {
    "attack__evaluations": 49,
    "evidence__candidates": 16,
    "evidence__matching_trials": 20,
    "evidence__reconstruction_trials": 2,
    "evidence__control_trials": 1,
}
UNREACHABLE = 1e-4


def private(size: int) -> tuple[torch.Tensor, list[int]]:
    """Private digits, labels of which come up repeatedly from 8 on."""
    data = digits("private")
    chosen = [(7 * i + 3) % len(data) for i in range(size)]
    return data.images[chosen], data.labels[chosen].tolist()


Declare = Callable[..., Spec]


@pytest.fixture
def captured(sample: Declare, tmp_path: Path) -> Declare:
    """Captures so many images under a defense, and declares that they are held."""

    def declare(size: int, defense: list[dict[str, Any]], **keys: Any) -> Spec:
        images, labels = private(size)
        paths = [tmp_path / f"private_{i}.png" for i in range(size)]
        for path, image in zip(paths, images, strict=True):
            write_image(path, image)
        capture = tmp_path / "sent.safetensors"
        usual = {"capture__batch_size": size, "evidence__truth": [*map(str, paths)], **SMALL}
        spec = sample(
            "undefended", capture__gradient=str(capture), defense=defense, **{**usual, **keys}
        )
        write_capture(capture, capture_gradient(spec, paths, labels))
        return spec

    return declare


@pytest.fixture
def audit(captured: Declare) -> Callable[..., Report]:
    return lambda *args, **keys: run_audit(captured(*args, **keys), Counter())


@pytest.mark.parametrize("size", SIZES)
def test_an_undefended_release_does_not_pass(audit: Callable[..., Report], size: int) -> None:
    report = audit(size, [])
    images, labels = private(size)
    assert (report.verdict.exit_code, report.verdict.grade) in [(1, "C"), (1, "D"), (1, "F")]
    captured, evidence = report.captured, report.evidence
    assert sorted(captured.labels) == sorted(labels)
    assert captured.truths == [png_uri(image) for image in images]
    (check,) = [check for check in evidence.checks if check.step == "the private image"]
    assert check.outcome == "agrees"
    assert evidence.ceiling is not None
    assert evidence.ceiling.successes == evidence.ceiling.trials
    assert evidence.label is not None
    assert evidence.label.successes == evidence.label.trials
    for pictures in (captured.reconstructions, captured.nulls):
        assert [found.truth for found in pictures] == list(range(size))
        assert sorted(found.label for found in pictures) == sorted(labels)
        assert all(found.metrics and found.metrics.psnr_db for found in pictures)
    for found in captured.reconstructions:
        assert found.matching_rank == 1
        assert found.rank is not None
        assert found.candidates == 16
    assert not captured.not_measured
    shown = 3 + len(captured.by_attack)
    assert len(captured.by_attack) == 3
    assert render_html(report).count("data:image/png;base64,") == shown * size


@pytest.mark.parametrize("size", SIZES)
def test_a_release_in_very_large_noise_is_not_reconstructed(
    audit: Callable[..., Report], size: int
) -> None:
    labels = private(size)[1]
    report = audit(size, [{"name": "noise", "std": 30.0}], capture__labels=labels)
    assert report.verdict.grade not in ("D", "F")
    (check,) = [check for check in report.evidence.checks if check.step == "the private image"]
    assert check.outcome == "agrees"
    chance = 1 / 16
    for rate in (report.evidence.ceiling, report.evidence.membership):
        if rate is None:
            assert size == 1
            continue
        assert rate.successes <= binom.ppf(1 - UNREACHABLE, rate.trials, chance)
    assert [found.truth for found in report.captured.reconstructions] == list(range(size))
    assert all(found.matching_rank is not None for found in report.captured.reconstructions)


@pytest.mark.parametrize("size", SIZES[1:])
def test_members_of_an_undefended_batch_are_found(audit: Callable[..., Report], size: int) -> None:
    report = audit(size, [], attack__evaluations=13, evidence__reconstruction_trials=0)
    membership = report.evidence.membership
    assert membership is not None
    assert membership.successes >= membership.trials - 2


@pytest.mark.parametrize("clients", [2, 4])
def test_a_cohort_of_batches_is_checked_and_ranked_client_by_client(
    audit: Callable[..., Report], clients: int
) -> None:
    """A clip of each client's own gradient makes it matter whose images are whose."""
    steps = [{"name": "clip", "bound": 0.2}, {"name": "secure_aggregation", "clients": clients}]
    labels = private(2 * clients)[1]
    few = {"attack__evaluations": 13, "evidence__reconstruction_trials": 0}
    report = audit(2 * clients, steps, capture__batch_size=2, capture__labels=labels, **few)
    (check,) = [check for check in report.evidence.checks if check.step == "the private image"]
    assert check.outcome == "agrees"
    assert [found.matching_rank for found in report.captured.reconstructions] == [1] * 2 * clients


def test_images_in_another_order_than_their_labels_contradict(
    captured: Declare, tmp_path: Path
) -> None:
    paths = [str(tmp_path / f"private_{i}.png") for i in (3, 2, 1, 0)]
    spec = captured(4, [], capture__labels=private(4)[1], evidence__truth=paths)
    checks = prepare(spec).audited.checks
    (check,) = [check for check in checks if check.step == "the private image"]
    assert check.outcome == "contradicts"


def test_other_images_than_the_captured_are_not_taken_for_these(
    captured: Declare, tmp_path: Path
) -> None:
    """With inferred labels it is not decided, as another order might fit."""
    spec = captured(4, [])
    write_image(tmp_path / "private_1.png", digits("private").images[150])
    case = prepare(spec)
    assert case.audited.truth_labels is None
    assert not [check for check in case.audited.checks if check.step == "the private image"]
    report = run_audit(spec, Counter())
    assert {"rank", "check"} <= set(report.captured.not_measured)
    assert all(found.rank is None for found in report.captured.reconstructions)


@pytest.mark.parametrize("held", [1, 3, 5])
def test_some_of_the_images_are_refused(captured: Declare, tmp_path: Path, held: int) -> None:
    paths = [str(tmp_path / f"private_{i % 4}.png") for i in range(held)]
    spec = captured(4, [], evidence__truth=paths)
    with pytest.raises(SpecError, match=f"names {held} images; the capture is made of 4") as error:
        prepare(spec)
    assert error.value.key == ("evidence", "truth")
