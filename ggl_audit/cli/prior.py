"""``ggl-audit prior``: train, list and show priors."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ggl_audit.cli import options
from ggl_audit.cli.endings import TRAINING_INTERRUPTED, end

if TYPE_CHECKING:
    from ggl_audit.inputs.images import ImageSet, Part
    from ggl_audit.priors.generator import Architecture
    from ggl_audit.priors.training import Schedule

SOURCES = (
    "a bundled set, a folder (CLASS_INDEX/*.png), an .npz (images, labels), FILE.npz:SPLIT of "
    "MedMNIST, or torchvision:NAME:FOLDER, on disk"
)

app = typer.Typer(help="Train, list and show priors.", no_args_is_help=True)


@app.command("train")
def train(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: Annotated[str, typer.Option("--data", help=f"What it may see: {SOURCES}.")],
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            help="Images it may not see, for the card's inversion PSNR, or none. Unless given, "
            "every tenth image of each class of the data.",
        ),
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="No classes: labels are not needed or used.")
    ] = False,
    latent: Annotated[
        int, typer.Option("--latent", min=1, max=4096, help="Dimension of the latent.")
    ] = 48,
    width: Annotated[
        int,
        typer.Option(
            "--width", min=8, max=1024, help="Feature maps of the generator's first block."
        ),
    ] = 48,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of each network.")] = 4000,
    augmentation: Annotated[
        float,
        typer.Option(
            "--augmentation",
            min=0,
            max=1,
            help="How much the images are varied: 0 not at all, 1 as handwriting varies.",
        ),
    ] = 1.0,
    reconstruction: Annotated[
        float,
        typer.Option(
            "--reconstruction",
            min=0,
            help="Weight of drawing all the images, not only typical ones.",
        ),
    ] = 0.03,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all randomness.")] = 0,
    licence: Annotated[
        str, typer.Option("--licence", help="Of the weights, for the card.")
    ] = "not stated",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")
    ] = False,
    checkpoint_steps: Annotated[
        int, typer.Option("--checkpoint-steps", min=1, help="From one checkpoint to the next.")
    ] = 200,
    device: Annotated[
        str,
        typer.Option("--device", envvar="GGL_AUDIT_DEVICE", help="auto, cpu, cuda, xpu or mps."),
    ] = "auto",
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a GAN on images, as a prior for `run`; an interrupted training can be resumed."""
    options.begin(context, threads=threads, verbose=verbose, quiet=quiet)
    from ggl_audit.basics.device import choose_device
    from ggl_audit.cli.progress import AuditProgress
    from ggl_audit.priors.checkpoint import CHECKPOINT_NAME
    from ggl_audit.priors.held_out import hold_out
    from ggl_audit.priors.making import architecture_for, make_prior
    from ggl_audit.priors.training import INVERSION_STEPS, Schedule

    labelled = not unconditional
    seen = _images(data, "prior", labelled=labelled)
    unseen = None
    if held_out is None:
        seen, unseen = hold_out(seen)
    elif held_out != "none":
        unseen = _images(held_out, "reference", labelled=labelled)
    architecture = architecture_for(seen, latent, width, conditional=labelled)
    schedule = Schedule(
        steps=steps, seed=seed, reconstruction=reconstruction, augmentation=augmentation
    )
    done = 0
    with AuditProgress(shown=not quiet) as progress, _interruptible() as check_interrupt:
        progress.start(steps + (INVERSION_STEPS if unseen is not None else 0))
        progress.stage("training")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            progress.advance(more)
            if done == steps and unseen is not None:
                progress.stage("inverting held-out images")
            check_interrupt()

        try:
            card = make_prior(
                output,
                seen,
                unseen,
                architecture,
                schedule,
                choose_device(device),
                _command(output, data, held_out, architecture, schedule),
                licence,
                advance,
                checkpoint_steps,
                resume=resume,
            )
        except KeyboardInterrupt:
            checkpoint = output / CHECKPOINT_NAME
            how = "the same command with --resume goes on" if checkpoint.is_file() else "start anew"
            end(TRAINING_INTERRUPTED(how=how))
            raise typer.Exit(3) from None
    typer.echo(f"wrote {output}", err=True)
    if card.inversion is not None:
        typer.echo(f"held-out images at best: {card.inversion.psnr_db} dB", err=True)


@app.command("list")
def list_priors() -> None:
    """List the bundled priors."""
    from ggl_audit.cli.listing import Kind, list_parts

    list_parts(Kind.PRIORS)


@app.command("show")
def show(
    prior: Annotated[str, typer.Argument(help="A bundled prior, or a folder of `prior train`.")],
) -> None:
    """Show a prior's card."""
    from ggl_audit.priors.card import read_card, render_card
    from ggl_audit.priors.loading import prior_folder
    from ggl_audit.spec import PriorSpec

    given = Path(prior)
    declared = PriorSpec(trained=given) if given.is_dir() else PriorSpec(bundled=prior)
    folder = prior_folder(declared, Path())
    assert folder is not None
    typer.echo(render_card(read_card(folder)), nl=False)


def _images(source: str, part: Part, *, labelled: bool) -> ImageSet:
    from ggl_audit.cli.options import image_set
    from ggl_audit.inputs.torchvision_set import PREFIX, read_torchvision_set

    if source.startswith(PREFIX):
        data = read_torchvision_set(source)
    else:
        data = image_set(source, part, labelled=labelled)
    return data if labelled else replace(data, labels=data.labels.new_zeros(len(data)))


def _command(
    output: Path, data: str, held_out: str | None, architecture: Architecture, schedule: Schedule
) -> str:
    """The command for the card, without the names of folders on this machine."""

    def name(source: str) -> str:
        return ":".join(Path(part).name for part in source.split(":"))

    arguments: list[object] = ["--data", name(data)]
    arguments += [] if held_out is None else ["--held-out", name(held_out)]
    arguments += ["--unconditional"] if architecture.classes is None else []
    arguments += ["--latent", architecture.latent, "--width", architecture.width]
    arguments += ["--steps", schedule.steps, "--augmentation", schedule.augmentation]
    arguments += ["--reconstruction", schedule.reconstruction, "--seed", schedule.seed]
    return shlex.join(["ggl-audit", "prior", "train", output.name, *map(str, arguments)])


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C and SIGTERM back until what this gives is called; a second one is at once."""
    interrupted = False

    def remember(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    before = {kind: signal.signal(kind, remember) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
