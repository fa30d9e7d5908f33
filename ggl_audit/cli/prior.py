"""``ggl-audit prior``: train, list and show priors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train, list and show priors.", no_args_is_help=True)


@app.command("train")
def train(
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: Annotated[
        str, typer.Option("--data", help="A bundled set, an .npz (images, labels), or a folder.")
    ],
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="Images it may not see, for the card's inversion PSNR."),
    ] = None,
    latent: Annotated[int, typer.Option("--latent", min=1, help="Dimension of the latent.")] = 48,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of each network.")] = 4000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all randomness.")] = 0,
    licence: Annotated[
        str, typer.Option("--licence", help="Of the weights, for the card.")
    ] = "not stated",
    device: Annotated[
        str, typer.Option("--device", envvar="GGL_AUDIT_DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
) -> None:
    """Train a conditional GAN on labelled images, as a prior for `run`."""
    from rich.console import Console
    from rich.progress import Progress

    from ggl_audit.cli.options import image_set
    from ggl_audit.environment import choose_device
    from ggl_audit.priors.making import make_prior
    from ggl_audit.priors.training import Schedule

    seen = image_set(data, "prior")
    unseen = None if held_out is None else image_set(held_out, "reference")
    command = ["ggl-audit", "prior", "train", output.name, "--data", Path(data).name]
    command += ["--held-out", Path(held_out).name] if held_out is not None else []
    command += ["--latent", str(latent), "--steps", str(steps), "--seed", str(seed)]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps)
        card = make_prior(
            output,
            seen,
            unseen,
            latent,
            Schedule(steps=steps, seed=seed),
            choose_device(device),
            shlex.join(command),
            licence,
            lambda: bar.advance(task),
        )
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
