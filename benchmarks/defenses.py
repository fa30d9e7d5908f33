"""Audits every defense at the literature's usual strength, and writes a table of what it keeps.

    python benchmarks/defenses.py --task digits -o defenses.md

Each row is a spec, a capture and an audit, as `ggl-audit capture` and `ggl-audit run` make them.
The digits are the bundled ones. The faces need `../shared/data` beside the repository: a generator
trained on CelebA, and the Caltech faces, which it has not seen.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient, take
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.loading import load_client
from ggl_audit.cli.progress import AuditProgress
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.client.randomness import client_context
from ggl_audit.defenses import build_pipeline, shipped
from ggl_audit.errors import AuditError
from ggl_audit.evidence.bounds import Rate
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits, read_image, read_image_set, write_image
from ggl_audit.inputs.spec_file import parse_defense, read_spec
from ggl_audit.report.model import Report
from ggl_audit.spec import Spec

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
FACES = SHARED / "faces" / "caltech_faces_easy_64.npz"
FACE_GENERATOR = SHARED / "generators" / "celeba32_dcgan_fletchersarip.pt"
PRIVATE_IMAGES = 16


@dataclass(frozen=True)
class Case:
    """One row: a defense at a usual strength.

    Attributes:
        label: names it in the table.
        defense: as ``--defense`` takes it.
        changes: what else differs from the base spec, by dotted key.
    """

    label: str
    defense: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)


def update(**local: Any) -> dict[str, Any]:
    """What a capture of local training declares."""
    return {"capture.kind": "update", "capture.local": {"lr": 0.1, **local}}


def promised(unit: str, reduction: str) -> dict[str, Any]:
    """A guarantee for one release that everybody takes part in."""
    once = {"rounds": 1, "sampling_rate": 1, "delta": 1e-5}
    return {"guarantee": {"unit": unit, "reduction": reduction, **once}}


HYBRID = ["translate_x 9, contrast 6, translate_y 2", "translate_y 3, contrast 7, contrast 7"]
FOUR = {"capture.batch_size": 4}
SMALLER = {
    "evidence.matching_trials": 100,
    "evidence.reconstruction_trials": 10,
    "evidence.control_trials": 2,
}
RANDOM_WEIGHTS = {"model.weights": None}

CASES = [
    Case("none"),
    Case("noise, Gaussian, std 0.01", "noise:std=0.01"),
    Case("noise, Gaussian, std 0.1", "noise:std=0.1"),
    Case("noise, Laplace, std 0.1", "noise:std=0.1,distribution=laplace"),
    Case("clip to norm 1", "clip:bound=1"),
    Case("clip to norm 1, each tensor", "clip:bound=1,scope=layer"),
    Case("clip to norm 1, then noise of std 0.1", "clip:bound=1+noise:std=0.1"),
    Case(
        "DP-SGD, one image: clip to 1, multiplier 1",
        "clip:bound=1+noise:std=1",
        promised("sample", "sum"),
    ),
    Case(
        "DP-SGD, batch of 4, multiplier 0.1",
        "dp_sgd:bound=1,noise_multiplier=0.1",
        {**FOUR, **promised("sample", "mean")},
    ),
    Case(
        "DP-SGD, batch of 4, multiplier 1",
        "dp_sgd:bound=1,noise_multiplier=1",
        {**FOUR, **promised("sample", "mean")},
    ),
    Case(
        "DP-FedAvg, 4 clients, multiplier 1",
        "dp_fedavg:bound=1,noise_multiplier=1,clients=4",
        promised("client", "mean"),
    ),
    Case("sparsify, 90 % of each tensor", "sparsify:fraction=0.9"),
    Case("sparsify, 99 % of each tensor", "sparsify:fraction=0.99"),
    Case("sparsify, 90 % of the whole", "sparsify:fraction=0.9,scope=global"),
    Case(
        "sparsify, 90 %, error feedback over 5 rounds", "sparsify:fraction=0.9,error_feedback=5"
    ),
    Case("random mask, 90 % of each tensor", "random_k:fraction=0.9"),
    Case("threshold of 0.01 (86 % removed)", "threshold:least=0.01"),
    Case("quantize, 8 bits", "quantize:bits=8"),
    Case("quantize, 4 bits", "quantize:bits=4"),
    Case("quantize, 4 bits, each tensor", "quantize:bits=4,scope=layer"),
    Case("quantize, 2 bits", "quantize:bits=2"),
    Case("QSGD, 16 levels of the maximum", "qsgd:levels=16,norm=max"),
    Case("QSGD, 16 levels of the l2 norm", "qsgd:levels=16"),
    Case("QSGD, 1 level of the l2 norm", "qsgd:levels=1"),
    Case("TernGrad, clipped at 2.5", "terngrad:clip=2.5"),
    Case("sign", "sign"),
    Case("sign, mean scale, error feedback over 5 rounds", "sign:scale=mean,error_feedback=5"),
    Case("float16", "float_format:format=float16"),
    Case("bfloat16", "float_format:format=bfloat16"),
    Case("8-bit float (E4M3), scaled", "float_format:format=float8_e4m3,scale=tensor"),
    Case("clip to 1, sparsify 90 %, 4 bits", "clip:bound=1+sparsify:fraction=0.9+quantize:bits=4"),
    Case("Soteria, 60 %", "soteria:fraction=0.6"),
    Case("Soteria, 80 %", "soteria:fraction=0.8"),
    Case("federated dropout, 50 % kept", "federated_dropout:kept=0.5"),
    Case("PRECODE, 256 dimensions, random weights", "precode:size=256", RANDOM_WEIGHTS),
    Case("ATS, hybrid policy", "none", {"defense": [{"name": "ats", "policies": HYBRID}]}),
    Case("none, batch of 4", "none", FOUR),
    Case("mixup, batch of 4", "mixup", FOUR),
    Case("FedAvg, 1 image, 5 epochs", "none", update(epochs=5)),
    Case(
        "FedAvg, 4 images in twos, 2 epochs",
        "none",
        {**SMALLER, **FOUR, **update(batch_size=2, epochs=2)},
    ),
    Case(
        "FedAvg, the same, in unknown order",
        "none",
        {**SMALLER, **FOUR, **update(batch_size=2, epochs=2, order="shuffled")},
    ),
    Case(
        "FedProx, 1 image, 5 epochs, mu 0.1",
        "none",
        {**SMALLER, **update(epochs=5, proximal=0.1)},
    ),
    Case("secure aggregation, 4 clients", "secure_aggregation:clients=4", SMALLER),
    Case("secure aggregation, 16 clients", "secure_aggregation:clients=16", SMALLER),
    Case("SecAdam, fresh, 1 client", "sec_adam"),
    Case("SecAdam, round 5, 1 client", "sec_adam:round=5"),
    Case("SecAdam, fresh, 4 clients", "sec_adam:clients=4", SMALLER),
    Case("Adam's moments in the clear", "none", {"capture.kind": "moments"}),
    Case("encryption, for the server with the key", "encryption:key_holder=the server"),
    Case(
        "encryption, for who lacks the key", "encryption:key_holder=the server,view=outsider"
    ),
]  # fmt: skip

POPULAR = (
    "none",
    "noise, Gaussian, std 0.1",
    "DP-SGD, one image: clip to 1, multiplier 1",
    "sparsify, 99 % of each tensor",
    "quantize, 4 bits",
    "sign",
    "Soteria, 80 %",
    "PRECODE, 256 dimensions, random weights",
)


@dataclass(frozen=True)
class Task:
    """What is private, and what the audits of all cases share.

    Attributes:
        name: digits or faces.
        title: names it for the reader.
        about: model, images and prior, in a sentence or two.
        base: the spec that the cases change.
        budget: what an audit may spend.
        private: picture files, and the class of each.
        labels: theirs.
        cases: the rows.
    """

    name: Literal["digits", "faces"]
    title: str
    about: str
    base: Path
    budget: dict[str, Any]
    private: list[Path]
    labels: list[int]
    cases: list[Case]


def digits_task(scratch: Path) -> Task:
    """The bundled digits: images, prior and a small CNN at round 0."""
    untouched = digits("private")
    private = [scratch / f"{i}.png" for i in range(PRIVATE_IMAGES)]
    for path, image in zip(private, untouched.images, strict=False):
        write_image(path, image)
    return Task(
        name="digits",
        title="Handwritten digits, 16x16",
        about="A CNN of 20,000 parameters at round 0, the bundled conditional prior, 500 reference "
        "digits, candidates of one digit (`sample_specs/digits_undefended.yaml`).",
        base=HERE.parent / "sample_specs" / "digits_undefended.yaml",
        budget={
            "attack.method": "ggl",
            "attack.optimizer": "cma",
            "attack.evaluations": 1500,
            "evidence.matching_trials": 200,
            "evidence.reconstruction_trials": 20,
            "evidence.control_trials": 5,
        },
        private=private,
        labels=untouched.labels[:PRIVATE_IMAGES].tolist(),
        cases=CASES,
    )


def faces_task(scratch: Path) -> Task:
    """The Caltech faces at 32x32, all of one class, and a generator of CelebA's faces."""
    with np.load(FACES, allow_pickle=False) as stored:
        scans = [Image.fromarray(scan) for scan in stored["images"]]
    faces = np.stack([_face(scan) for scan in scans])
    private = [scratch / f"{i}.png" for i in range(PRIVATE_IMAGES)]
    for path, face in zip(private, faces, strict=False):
        Image.fromarray(face).save(path)
    public = faces[PRIVATE_IMAGES:]
    reference = scratch / "faces.npz"
    np.savez(reference, images=public, labels=np.zeros(len(public), dtype=np.int64))
    return Task(
        name="faces",
        title="Faces, 32x32 in colour",
        about="A 3-layer CNN of 58,000 parameters with random weights, a DCGAN trained on CelebA "
        f"as the prior, {len(public)} Caltech faces as the reference, all of one class "
        "(`benchmarks/faces.yaml`). They show few people often, so that candidates are alike.",
        base=HERE / "faces.yaml",
        budget={
            "prior.weights": str(FACE_GENERATOR),
            "attack.method": "ggl",
            "attack.optimizer": "cma",
            "attack.evaluations": 2000,
            "evidence.matching_trials": 100,
            "evidence.reconstruction_trials": 10,
            "evidence.control_trials": 0,  # the row without a defense is the control
            "evidence.reference": {"npz": str(reference)},
        },
        private=private,
        labels=[0] * PRIVATE_IMAGES,
        cases=[case for case in CASES if case.label in POPULAR],
    )


def _face(scan: Image.Image) -> NDArray[np.uint8]:
    # Cut out as CelebA's faces are, of which the generator draws nothing but the face.
    return np.asarray(scan.resize((32, 32), Image.Resampling.LANCZOS, box=(12, 8, 52, 48)))


QUICK = {
    "attack.evaluations": 200,
    "evidence.matching_trials": 25,
    "evidence.reconstruction_trials": 4,
    "evidence.control_trials": 2,
}


def audit(task: Task, case: Case, scratch: Path, quick: bool) -> Report:
    """Declares, captures and audits one case, as the command line does.

    Raises:
        AuditError: the tool refuses.
    """
    changes = {
        "capture.gradient": str(scratch / "capture.safetensors"),
        "evidence.truth": str(task.private[0]),
        "defense": parse_defense(case.defense),
        **task.budget,
        **case.changes,
        **(QUICK if quick else {}),
    }
    if case.changes.get("capture.kind") == "moments":
        changes["capture.previous"] = str(scratch / "previous.safetensors")
    spec = read_spec(task.base, changes.items())
    clients = build_pipeline(spec.defense, spec.folder).aggregation.clients
    images = clients * spec.capture.batch_size
    capture(spec, task.private[: images + 1], task.labels[: images + 1], images)
    with AuditProgress(shown=False) as progress:
        return run_audit(spec, progress)


def capture(spec: Spec, private: Sequence[Path], labels: Sequence[int], images: int) -> None:
    """Writes what is captured of the first images; the one after them is of an earlier round."""
    if spec.capture.previous is None:
        sent = _sent(spec, private[:images], labels[:images])
    else:
        beta1 = spec.capture.beta1
        before, now = (
            {name: (1 - beta1) * tensor for name, tensor in sent.items()}
            for sent in (_sent(spec, private[i : i + 1], labels[i : i + 1]) for i in (1, 0))
        )
        write_capture(spec.capture.previous, before)
        sent = {name: beta1 * before[name] + tensor for name, tensor in now.items()}
    write_capture(spec.capture.gradient, sent)


def _sent(spec: Spec, private: Sequence[Path], labels: Sequence[int]) -> Gradient:
    cpu = torch.device("cpu")
    defense, model = load_client(spec, cpu)
    if not defense.earlier_rounds:
        return capture_gradient(spec, private, labels)
    # Earlier rounds are of public images, as those of the canaries are.
    assert spec.evidence.reference is not None
    public = read_image_set(
        spec.evidence.reference, spec.folder, ("evidence", "reference"), "reference", model.shape
    )
    client = DeclaredClient(ClientGradients(model, defense), defense, public)
    images = torch.stack([read_image(path, model.shape) for path in private])
    context = client_context(spec.seed, "captured client", cpu)
    return take(client.send(images[None], torch.tensor([labels]), [context]), 0)


def rate(measured: Rate | None) -> str:
    """A rate with its 95 % interval."""
    if measured is None:
        return ""
    ends = f"{100 * measured.lower:.0f} to {100 * measured.upper:.0f} %"
    return f"{measured.successes}/{measured.trials} ({ends})"


def row(case: Case, report: Report) -> str:
    """One line of the table."""
    found, null = report.evidence.floor, report.evidence.controls.null
    promise = report.evidence.guarantee
    cells = [
        case.label,
        report.verdict.grade,
        rate(report.evidence.ceiling),
        rate(found),
        f"{null.successes}/{null.trials}" if null else "",
        f"{found.psnr_db:.1f} ({null.psnr_db:.1f})" if found and null else "",
        rate(report.evidence.membership),
        f"at most {promise.reconstruction_bound:.0%} (mu {promise.mu:.3g}, epsilon "
        f"{promise.epsilon:.3g})"
        if promise
        else "",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| defense | grade | ceiling | floor | null | PSNR, dB (null) | membership | promised |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(task: Task, case: Case, quick: bool) -> tuple[str, str, Report | None]:
    """One line of the table, a note where there is no grade, and the report."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = audit(task, case, Path(folder), quick)
    except AuditError as error:
        return f"| {case.label} | not audited |{'  |' * 6}", f"- {case.label}: {error}", None
    note = ""
    if report.verdict.grade == "inconclusive":
        note = f"- {case.label}: {report.verdict.reason}"
    return row(case, report), note, report


def section(
    task: Task, only: Sequence[str], quick: bool, device: str, processes: int
) -> Iterator[str]:
    """The lines of a task: its table, notes on what has no grade, and how it was measured."""
    started = time.perf_counter()
    task = replace(task, budget={**task.budget, "device": device})
    cases = [c for c in task.cases if not only or any(o in (c.label, *names(c)) for o in only)]
    yield f"## {task.title}\n\n{task.about}\n\n{HEADER}"
    notes, last = [], None
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for written, note, report in pool.map(
            line, repeat(task), cases, repeat(quick), chunksize=1
        ):
            yield written
            notes += [note] if note else []
            last = report or last
    if notes:
        yield "\nWithout a grade:\n\n" + "\n".join(notes)
    if last is not None:
        yield f"\n{measured(last, time.perf_counter() - started, processes)}"


def measured(report: Report, seconds: float, processes: int) -> str:
    """How it was measured, as far as the reports tell."""
    on, evidence = report.environment, report.spec["evidence"]
    return (
        f"Seed {report.spec['seed']}, {report.spec['attack']['evaluations']:,} evaluations for "
        f"each picture, {evidence['candidates']} candidates. ggl-audit {report.tool.version}, "
        f"PyTorch {on['torch']}, {on['platform']}, {on['device']} with {on['threads']} "
        f"thread(s) of {os.cpu_count()} cores, {processes} audits at a time; "
        f"{seconds / 60:.0f} minutes."
    )


def names(case: Case) -> list[str]:
    """The steps of a case's defense, by name."""
    steps = case.changes.get("defense", parse_defense(case.defense))
    return [step["name"] for step in steps]


def main(
    task: Annotated[str, typer.Option(help="digits, faces or all.")] = "all",
    only: Annotated[
        list[str] | None, typer.Option(help="A row's label, or a defense's name. Repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small budget: does it run?")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    processes: Annotated[int, typer.Option(help="Audits at a time.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A Markdown file.")] = None,
) -> None:
    """Audits every defense at its usual strength and writes a table."""
    if task not in ("digits", "faces", "all"):
        raise typer.BadParameter("expected digits, faces or all", param_hint="--task")
    missing = {*shipped()} - {name for case in CASES for name in names(case)}
    if missing:
        raise typer.BadParameter(f"no row has {', '.join(sorted(missing))}: add one to CASES")
    lines = []

    def say(written: str) -> None:
        lines.append(written)
        typer.echo(written)

    makers = {"digits": digits_task, "faces": faces_task}
    for name, make in makers.items():
        if task not in (name, "all"):
            continue
        lacking = [path.name for path in (FACES, FACE_GENERATOR) if not path.is_file()]
        if name == "faces" and lacking:
            say(f"## Faces\n\nSkipped: ../shared/data has no {' and no '.join(lacking)}.\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for written in section(make(Path(folder)), only or [], quick, device, processes):
                say(written)
    if output is not None:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
