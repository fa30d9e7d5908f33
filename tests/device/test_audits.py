"""Whole audits on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ggl_audit.audit import run_audit
from ggl_audit.errors import SpecError
from ggl_audit.priors import training as training_module
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec
from tests.conftest import Counter
from tests.device import pretended
from tests.device.conftest import NAMED
from tests.priors.test_training import pictures
from tests.test_ledger import content

pytestmark = pytest.mark.device

SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("dp", {"attack__optimizer": "cma"}),
    ("undefended", {"attack__optimizer": "adam", "evidence__distance": "representation"}),
]


CLIENTS = Path(__file__).parent.parent / "known_answers" / "clients.py"

FEW = {
    "attack__evaluations": 130,
    "attack__steps": 4,
    "evidence__matching_trials": 12,
    "evidence__reconstruction_trials": 2,
    "evidence__control_trials": 1,
}


def audited(sample: Callable[..., Spec], name: str, device: str, changes: dict[str, Any]) -> Report:
    return run_audit(sample(name, device=device, **FEW, **changes), Counter())


@pytest.mark.parametrize(("name", "changes"), SAMPLES, ids=str)
def test_an_audit_says_the_same_as_on_the_processor(
    sample: Callable[..., Spec], name: str, changes: dict[str, Any], device: torch.device
) -> None:
    there, here = (audited(sample, name, one, changes) for one in (str(device), "cpu"))
    is_random = name in ("noise", "dp")
    if not is_random:
        assert there.verdict.grade == here.verdict.grade
    assert [check.outcome for check in there.evidence.checks] == [
        check.outcome for check in here.evidence.checks
    ]
    for one in ("ceiling", "label"):
        found, expected = getattr(there.evidence, one), getattr(here.evidence, one)
        # Noise is drawn by the device's own generator, and ties fall as they fall.
        spread = 3 if is_random else 1
        assert abs(found.successes - expected.successes) <= spread
    assert there.captured.labels == here.captured.labels


def test_a_clients_own_code_sends_from_the_device(
    sample: Callable[..., Spec], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggl_audit.experiments.noise.RELEASES", 60)
    own = {"step": f"{CLIENTS}:step", "kwargs": {"bound": 1.0, "std": 1.0}}
    spec = sample("dp", device=str(device), client=own, **FEW)
    report = run_audit(spec, Counter())
    assert report.evidence.noise is not None
    assert not report.evidence.noise.violations


def test_the_same_audit_gives_the_same_report_again(
    sample: Callable[..., Spec], device: torch.device
) -> None:
    first, second = (audited(sample, "sparsified", str(device), {}) for _ in range(2))
    assert content(first) == content(second)


def test_a_prior_is_trained_and_goes_on(device: torch.device, tmp_path: Path) -> None:
    from ggl_audit.priors.making import architecture_for, make_prior
    from ggl_audit.priors.training import Schedule

    data = pictures(30)
    for name, stop in (("whole", None), ("parts", 4)):
        schedule = Schedule(steps=7, batch=8)
        for resume in [False] if stop is None else [False, True]:
            done = 0

            def advance(more: int, stop: int | None = stop, resume: bool = resume) -> None:
                nonlocal done
                done += more
                if stop is not None and not resume and done >= stop:
                    raise KeyboardInterrupt

            try:
                make_prior(
                    tmp_path / name, data, None, architecture_for(data, 6, 16), schedule, device,
                    "a test", "none", advance, 2, resume=resume,
                )  # fmt: skip
            except KeyboardInterrupt:
                assert not resume
    whole, parts = (
        (tmp_path / name / "generator.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    assert training_module.ADAM_SLOTS


@pytest.mark.usefixtures("device")
@pytest.mark.skipif(NAMED != pretended.NAME, reason="no other device lacks what it is told to")
def test_auto_takes_the_processor_where_an_operator_is_lacking(
    sample: Callable[..., Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretended, "LACKING", {"convolution"})
    progress = Counter()
    report = run_audit(sample("undefended", device="auto", **FEW), progress)
    assert report.environment["device"] == "cpu"
    assert progress.said == [
        "The audit computes on the processor, as pretended lacks something: The operator "
        "'aten::convolution' is not implemented for pretended."
    ]
    with pytest.raises(SpecError, match="convolution"):
        run_audit(sample("undefended", device="pretended", **FEW), Counter())


@pytest.mark.skipif(
    not NAMED.startswith("cuda"), reason="a device of this process alone; spawned ones have none"
)
def test_workers_share_a_device(sample: Callable[..., Spec]) -> None:
    spec = sample("sparsified", device=NAMED, **FEW)
    alone, shared = run_audit(spec, Counter()), run_audit(spec, Counter(), workers=2)
    assert content(alone) == content(shared)
