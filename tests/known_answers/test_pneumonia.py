"""The audit of a hospital's classifier, whose public images are not in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggl_audit.audit import run_audit
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.preparation import prepare
from ggl_audit.errors import InputError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import fingerprints, read_image
from ggl_audit.inputs.spec_file import read_spec
from ggl_audit.spec import Spec
from tests.conftest import SAMPLES, Counter

RADIOGRAPH = SAMPLES / "captures" / "radiograph.png"
REDUCED = {
    "attack.evaluations": 500,
    "attack.steps": 40,
    "evidence.matching_trials": 40,
    "evidence.reconstruction_trials": 8,
    "evidence.control_trials": 2,
    "device": "cpu",
}


def pneumonia(shared: Path, **overrides: Any) -> Spec:
    npz = str((shared / "medmnist" / "pneumoniamnist.npz").absolute())
    changes = {**REDUCED, "evidence.reference": {"npz": npz, "split": "test"}}
    changes |= {key.replace("__", "."): value for key, value in overrides.items()}
    return read_spec(SAMPLES / "pneumonia.yaml", changes.items())


def test_without_the_data_it_says_how_to_give_them() -> None:
    with pytest.raises(InputError, match=r"pneumoniamnist\.npz: no such file.*--reference"):
        prepare(read_spec(SAMPLES / "pneumonia.yaml", REDUCED.items()))


def test_all_that_it_names_fits(shared: Path, tmp_path: Path) -> None:
    case = prepare(pneumonia(shared))
    assert case.audited.labels == [0]
    assert [check.outcome for check in case.audited.checks] == ["agrees"] * len(case.audited.checks)
    assert len(case.audited.checks) == 2
    assert len(case.reference) == 624
    radiograph = read_image(RADIOGRAPH, (1, 28, 28))[None]
    assert not {*fingerprints(radiograph)} & {*fingerprints(case.reference.images)}
    assert not case.audited.prior_saw_truth
    write_capture(tmp_path / "again.safetensors", capture_gradient(case.spec, [RADIOGRAPH], [0]))
    shipped = SAMPLES / "captures" / "pneumonia.safetensors"
    assert (tmp_path / "again.safetensors").read_bytes() == shipped.read_bytes()


def test_undefended_radiographs_are_reconstructed(shared: Path, tmp_path: Path) -> None:
    capture = tmp_path / "undefended.safetensors"
    write_capture(capture, capture_gradient(pneumonia(shared, defense=[]), [RADIOGRAPH], [0]))
    report = run_audit(pneumonia(shared, defense=[], capture__gradient=str(capture)), Counter())
    floor, null = report.evidence.floor, report.evidence.controls.null
    assert floor is not None
    assert null is not None
    assert floor.lower > floor.chance
    assert floor.psnr_db is not None
    assert null.psnr_db is not None
    assert floor.psnr_db > null.psnr_db + 3
    # Eight trials are too few to tell C, D and F apart at every seed.
    assert report.verdict.exit_code == 1
