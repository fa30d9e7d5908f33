"""Everything that only an accelerator can show, in one run of some minutes.

`python benchmarks/gpu.py` runs the tests that are marked `device` on it, measures candidates a
second beside a plain loop, audits the sample and faces, and writes docs/gpu.json, of which
`python docs/make.py` makes docs/gpu.md. Every figure is written as soon as it is there, and a part
that fails leaves its error in its place. The faces need the public data for experiments (a
generator of CelebA's faces, the Caltech faces): `--data FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from throughput import DEFENSES, Case, lenet, measure, residual, small_cnn, write

from ggl_audit import __version__
from ggl_audit.basics.device import choose_device, name_of, usual_memory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SAMPLE = ROOT / "sample_specs" / "digits_sparsified.yaml"
FACES, GENERATOR = "faces/caltech_faces_easy_64.npz", "generators/celeba32_dcgan_fletchersarip.pt"
PRIVATE = 7

CASES = (
    Case("LeNet", lenet, 16, 1024),
    Case("3-layer CNN", small_cnn, 16, 1024),
    Case("ResNet-18", residual, 4, 128),
    Case("ResNet-18, 224x224", residual, 2, 32, size=224),
)

PARTS = ("tests", "throughput", "audits")

Written = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """One audit that is timed.

    Attributes:
        name: in the page.
        size: of a face, in pixels along an edge; 0 for the sample of digits.
        options: of `ggl-audit run`, as on the command line.
        limit: seconds after which it ends with what it has.
        on_processor: whether it is made there, for comparison.
    """

    name: str
    size: int
    options: tuple[str, ...] = ()
    limit: int = 60
    on_processor: bool = False


FEWER = (
    "--set=evidence.matching_trials=50",
    "--set=evidence.reconstruction_trials=2",
    "--set=evidence.control_trials=1",
)
AUDITS = (
    Audit("faces, ResNet-18, no defense", 32, limit=150),
    Audit("digits, sparsified", 0),
    Audit(
        "faces, ResNet-18, clip 1 and noise multiplier 1",
        32,
        ("--set=defense=[{name: clip, bound: 1.0}, {name: noise, std: 1.0}]",),
    ),
    Audit("digits, sparsified, on the processor", 0, on_processor=True),
    Audit("faces, ResNet-18, 224x224, no defense, fewer trials", 224, FEWER),
)


def marked_tests(device: str) -> Written:
    """Runs the tests that are marked ``device`` there."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-q"]
    done = subprocess.run(  # noqa: S603
        [*command, "-m", "device", "tests/device", "--tb=short", "-W", "default"],
        cwd=ROOT,
        env={**os.environ, "GGL_AUDIT_TEST_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        write(done.stdout[-6000:])
    return {
        "said": lines[-1] if lines else done.stderr[-300:],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(time.perf_counter() - began, 1),
    }


def throughput(device: torch.device, case: Case, defense: str, seconds: float) -> Written:
    """Measures candidates a second of a plain loop and ours, in turns."""
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    plain, ours = measure(case, defense, "l2", device, seconds, turns=3)
    return {
        "model": case.name,
        "defense": defense,
        "plain": round(plain, 1),
        "ours": round(ours, 1),
        "ratio": round(ours / plain, 1),
        "peak_mib": _peak(device),
    }


def _peak(device: torch.device) -> int | None:
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return None if held is None else held // 2**20


def audit(one: Audit, device: str, data: Path, folder: Path) -> Written:
    """Runs one audit in a process of its own, and takes what its report says of it."""
    spec = SAMPLE if one.size == 0 else face_spec(one.size, data, folder)
    report = folder / "report.json"
    where = "cpu" if one.on_processor else device
    began = time.perf_counter()
    done = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "ggl_audit", "run", str(spec), "--exit-zero", "-v"),
            *(f"--time-limit={one.limit}", f"--device={where}", f"--output={report}", *one.options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if not report.is_file():
        raise RuntimeError(done.stderr[-1500:])
    written = json.loads(report.read_text())
    report.unlink()
    cost, evidence = written["cost"], written["evidence"]
    return {
        "audit": one.name,
        "cut_short": "cut short" in written["verdict"]["reason"],
        "warned": [line for line in done.stderr.splitlines() if "Warning" in line],
        "grade": written["verdict"]["grade"],
        "ceiling": _rate(evidence["ceiling"]),
        "floor": _rate(evidence["floor"]),
        "seconds": round(seconds, 1),
        "evaluations": cost["evaluations"],
        "by_experiment": {
            each["name"]: round(each["seconds"], 1)
            for each in written["experiments"]
            if each["trials"]
        },
        "peak_mib": None
        if cost["peak_memory_bytes"] is None
        else cost["peak_memory_bytes"] // 2**20,
    }


def _rate(rate: dict[str, Any] | None) -> str | None:
    return None if rate is None else f"{rate['successes']} of {rate['trials']}"


def face_spec(size: int, data: Path, folder: Path) -> Path:
    """Writes what an audit of a ResNet-18 on faces needs, and captures a gradient of one."""
    with np.load(data / FACES, allow_pickle=False) as stored:
        scans = [Image.fromarray(scan) for scan in stored["images"]]
    # Cut out as CelebA's faces are, of which the generator draws nothing but the face.
    box = (12, 8, 52, 48)
    shown = [scan.resize((size, size), Image.Resampling.LANCZOS, box=box) for scan in scans]
    faces = np.stack([np.asarray(face) for face in shown])
    Image.fromarray(faces[PRIVATE]).save(folder / "private.png")
    public = np.delete(faces, PRIVATE, axis=0)
    np.savez(folder / "faces.npz", images=public, labels=np.zeros(len(public), dtype=np.int64))
    # A spec names files below its own folder.
    shutil.copy(HERE / "face_models.py", folder / "face_models.py")
    shutil.copy(data / GENERATOR, folder / "generator.pt")
    spec = folder / f"faces_{size}.yaml"
    resized = "" if size == 32 else f"\n  resize: [{size}, {size}]"
    spec.write_text(
        f"""version: 1
model:
  factory: "torchvision:resnet18"
  kwargs: {{num_classes: 2}}
  input: {{shape: [3, {size}, {size}], mean: [0.5], std: [0.5]}}
capture:
  gradient: capture.safetensors
  stage: raw
prior:
  factory: face_models.py:FaceGenerator
  weights: generator.pt
  latent: {{shape: [100], distribution: uniform}}
  output_range: [-1, 1]{resized}
evidence:
  reference: {{npz: faces.npz}}
  truth: private.png
"""
    )
    done = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "ggl_audit", "capture", str(spec)),
            *("--image", str(folder / "private.png"), "--label", "0"),
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return spec


def main() -> None:
    """Writes the figures, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn (default: 0.5)")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="keep what is there")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    measured_with: Written = {
        "command": "python " + " ".join(["benchmarks/gpu.py", *sys.argv[1:]]),
        "device": name_of(device),
        "ggl_audit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "memory_mib": usual_memory(device),
    }
    output: Path = arguments.output
    figures: Written = json.loads(output.read_text()) if output.is_file() else {}
    for part in set(PARTS) - set(arguments.skip):
        figures[part] = {**measured_with, "rows": []}

    def keep(part: str, work: Callable[[], Written], name: str = "") -> None:
        try:
            found = work()
        except Exception as error:
            found = {"name": name, "failed": f"{type(error).__name__}: {error}"}
        figures[part]["rows"].append(found)
        write(f"{part}: {json.dumps(found)}")
        output.write_text(json.dumps(figures, indent=1) + "\n")

    named = str(device)
    if "tests" not in arguments.skip:
        keep("tests", lambda: marked_tests(named))
    if "throughput" not in arguments.skip:
        for case in CASES:
            for defense in DEFENSES:
                work = _timed(device, case, defense, arguments.seconds)
                keep("throughput", work, f"{case.name}, {defense}")
    if "audits" not in arguments.skip:
        for one in AUDITS:
            with tempfile.TemporaryDirectory() as folder:
                keep("audits", _audited(one, named, arguments.data, Path(folder)), one.name)


def _timed(device: torch.device, case: Case, defense: str, seconds: float) -> Callable[[], Written]:
    return lambda: throughput(device, case, defense, seconds)


def _audited(one: Audit, device: str, data: Path, folder: Path) -> Callable[[], Written]:
    return lambda: audit(one, device, data, folder)


if __name__ == "__main__":
    main()
