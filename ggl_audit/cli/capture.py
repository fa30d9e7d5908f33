"""``ggl-audit capture``: write what a client of the declared model would send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggl_audit.cli import options
from ggl_audit.messages import Message

NO_OUTPUT = Message(
    "capturing/no-output",
    "not declared",
    "Say where to with --output.",
    advice="Say where to write by `--output`.",
)


def capture(
    context: typer.Context,
    spec: Annotated[Path, typer.Argument(help="The spec that declares model and defense.")],
    image: Annotated[
        list[Path], typer.Option("--image", help="A private image, a picture file; repeatable.")
    ],
    label: Annotated[
        list[int] | None,
        typer.Option(
            "--label",
            help="Its class index; as often as --image, unless there are capture.targets.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: capture.gradient of the spec."),
    ] = None,
    defense: options.Defense = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    verbose: options.Verbose = False,
    settings: options.Set = None,
) -> None:
    """Write what clients of the declared model and defense send, as safetensors."""
    options.begin(context, threads=threads, verbose=verbose)
    from ggl_audit.case.capturing import capture_gradient
    from ggl_audit.errors import SpecError
    from ggl_audit.inputs.capture import write_capture

    declared = options.load_spec(spec, defense=defense, seed=seed, settings=settings)
    with options.located(declared):
        gradient = capture_gradient(declared, image, label or [])
        path = output
        if path is None and declared.capture.gradient is not None:
            path = declared.resolve(declared.capture.gradient)
        if path is None:
            raise SpecError(("capture", "gradient"), NO_OUTPUT())
        write_capture(path, gradient)
    typer.echo(f"wrote {path}", err=True)
