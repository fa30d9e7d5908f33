"""Options that several commands share, and how they change a spec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggl_audit.errors import SpecError

if TYPE_CHECKING:
    from ggl_audit.inputs.images import ImageSet, Part
    from ggl_audit.spec import Spec

SpecFile = Annotated[
    Path | None, typer.Argument(help="The audit's YAML file; flags override it.", metavar="[SPEC]")
]
ModelFactory = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="file.py:callable, package:callable, torchvision:name, or a file of "
        "torch.export.save (.pt2).",
    ),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="The model's weights.")]
Shape = Annotated[
    str | None, typer.Option("--shape", help="The model's images: channels,height,width.")
]
GradientFile = Annotated[Path | None, typer.Option("--gradient", help="The captured gradient.")]
Defense = Annotated[
    str | None,
    typer.Option("--defense", help="For example clip:bound=1+noise:std=0.1, or none."),
]
PriorName = Annotated[
    str | None, typer.Option("--prior", help="A bundled prior, or a folder of `prior train`.")
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="A bundled set, an .npz[:SPLIT], or a folder.")
]
Truth = Annotated[
    list[Path] | None,
    typer.Option("--truth", help="The private image, if it is held; of a batch all. Repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", envvar="GGL_AUDIT_DEVICE", help="auto, cpu, cuda, xpu or mps."),
]
Attack = Annotated[
    str | None,
    typer.Option("--attack", help="ggl for the latent search alone, or auto for all that fit."),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory", envvar="GGL_AUDIT_MEMORY", help="MiB for candidates' gradients at a time."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        envvar="GGL_AUDIT_THREADS",
        help="Threads to compute with; else OMP_NUM_THREADS, else one for each core that may be "
        "used.",
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        envvar="GGL_AUDIT_TIME_LIMIT",
        help="Seconds after which the audit ends, graded for what it has.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", envvar="GGL_AUDIT_SEED", help="Decides all randomness.")
]
FailOn = Annotated[
    str | None,
    typer.Option("--fail-on", envvar="GGL_AUDIT_FAIL_ON", help="Exit 1 at this grade or worse."),
]
LedgerFile = Annotated[
    Path | None,
    typer.Option(
        "--ledger",
        envvar="GGL_AUDIT_LEDGER",
        help="A file that keeps what each trial gave; the same command goes on from there.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        envvar="GGL_AUDIT_WORKERS",
        min=1,
        help="Processes of one thread each that share the trials.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what libraries warn of, each once.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the spec: --set attack.evaluations=500."),
]


def begin(
    context: typer.Context, *, threads: int | None, verbose: bool, quiet: bool = False
) -> None:
    """Decides what has to be decided before a command loads the libraries that compute.

    Args:
        context: of the command, which ends with it.
        threads: to compute with, where that was asked for.
        verbose: whether warnings of libraries are shown, while the command runs.
        quiet: whether it is not even said that there were any.

    Raises:
        AuditError: there are not so many threads.
    """
    from ggl_audit.basics.threads import limit_threads
    from ggl_audit.cli.logs import library_warnings

    limit_threads(threads)
    log = library_warnings(shown=verbose, told=not quiet)
    context.with_resource(log)


def load_spec(
    path: Path | None,
    *,
    model: str | None = None,
    weights: Path | None = None,
    shape: str | None = None,
    gradient: Path | None = None,
    defense: str | None = None,
    prior: str | None = None,
    reference: str | None = None,
    truth: list[Path] | None = None,
    attack: str | None = None,
    device: str | None = None,
    memory: int | None = None,
    time_limit: float | None = None,
    seed: int | None = None,
    fail_on: str | None = None,
    settings: list[str] | None = None,
) -> Spec:
    """Reads a spec and applies the flags; paths given as flags start at the current folder.

    Raises:
        AuditError: the spec or a flag cannot be used.
    """
    from ggl_audit.inputs.spec_file import parse_defense, parse_override, read_spec

    overrides: list[tuple[str, Any]] = []

    def override(key: str, value: Any) -> None:
        if value is not None:
            overrides.append((key, value))

    if model is not None:
        overrides += _model_source(model).items()
    override("model.weights", _absolute(weights))
    override("model.input.shape", None if shape is None else _numbers(shape))
    override("capture.gradient", _absolute(gradient))
    override("defense", None if defense is None else parse_defense(defense))
    override("prior", None if prior is None else _prior(prior))
    override("evidence.reference", None if reference is None else _image_source(reference))
    override("evidence.truth", [_absolute(path) for path in truth] if truth else None)
    override("attack.method", attack)
    override("device", device)
    override("memory", memory)
    override("time_limit", time_limit)
    override("seed", seed)
    override("gate.fail_on", fail_on)
    overrides += [parse_override(text) for text in settings or []]
    return read_spec(path, overrides)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _absolute_factory(factory: str) -> str:
    source, _, name = factory.rpartition(":")
    return f"{Path(source).absolute()}:{name}" if source.endswith(".py") else factory


def _model_source(text: str) -> dict[str, str | None]:
    """The key that a model is declared by, and no other that a spec may have."""
    from ggl_audit.spec import MODEL_SOURCES

    # Of a .pt file that is no program, its reader says what it is.
    saved = Path(text).suffix in (".pt", ".pt2")
    own = str(Path(text).absolute()) if saved else _absolute_factory(text)
    kind = "exported" if saved else "factory"
    return {**{f"model.{key}": None for key in MODEL_SOURCES}, f"model.{kind}": own}


def _numbers(text: str) -> list[int | str]:
    return [int(part) if part.strip().isdecimal() else part for part in text.split(",")]


def _prior(text: str) -> dict[str, str]:
    folder = Path(text)
    return {"trained": str(folder.absolute())} if folder.is_dir() else {"bundled": text}


def image_set(text: str, part: Part, *, labelled: bool = True) -> ImageSet:
    """Reads the image set that an option names; its labels are not needed unless ``labelled``.

    Raises:
        AuditError: there is no such set, or it is broken.
    """
    from pydantic import ValidationError

    from ggl_audit.basics.validation import first_problem
    from ggl_audit.inputs.images import read_image_set
    from ggl_audit.spec import ImageSetSpec

    try:
        declared = ImageSetSpec.model_validate(_image_source(text))
    except ValidationError as error:
        raise SpecError(*first_problem(error, lambda _: ImageSetSpec.model_fields)) from None
    return read_image_set(declared, Path(), ("data",), part, labelled=labelled)


def _image_source(text: str) -> dict[str, str]:
    path = Path(text)
    if path.is_dir():
        return {"folder": str(path.absolute())}
    if path.suffix == ".npz":
        return {"npz": str(path.absolute())}
    npz, _, split = text.rpartition(":")
    if npz.endswith(".npz"):
        return {"npz": str(Path(npz).absolute()), "split": split}
    return {"bundled": text}


@contextmanager
def located(spec: Spec) -> Iterator[None]:
    """Adds the file and line to errors about keys of the spec."""
    try:
        yield
    except SpecError as error:
        error.location = error.location or spec.locate(error.key)
        raise
