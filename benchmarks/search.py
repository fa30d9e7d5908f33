"""What a search costs beside its evaluations, and how soon it is as good as a plain loop.

`python benchmarks/search.py` prints three things:

- the share of the search's time that the optimizer and the bookkeeping take, in the sample audit
  `digits_sparsified`, and the memory of the process over 25,000 evaluations of each gradient;
- for undefended faces (public data that are not part of the repository, `--shared`): the seconds
  and the PSNR of a plain loop with 25,000 evaluations of each image, one candidate after the other
  as published implementations do, by pycma's CMA-ES; and the seconds that this tool's attack takes
  for as good a picture.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import optimizers
import torch
import typer
from throughput import PlainLoop

from ggl_audit import audit
from ggl_audit.attack import search
from ggl_audit.attack.objective import LatentObjective
from ggl_audit.attacks import ggl
from ggl_audit.attacks.ggl import search_latents
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.inputs.spec_file import read_spec
from ggl_audit.optimizers import Evaluation, start_optimizer
from ggl_audit.spec import AttackSpec, Spec

SAMPLE = Path(__file__).parent.parent / "sample_specs" / "digits_sparsified.yaml"
FACES = 4
LOOP_EVALUATIONS = 25_000
BUDGETS = (125, 250, 500, 1000, 2000, 4000)
GRADIENTS = 8


class Stopwatch:
    """Adds up the seconds of calls of a function that it stands for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.seconds = 0.0
        self._function = function

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        """Binds it as a method."""
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        began = time.perf_counter()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


class Silent:
    """A progress that nobody sees."""

    def start(self, evaluations: int) -> None:
        """Nothing."""

    def stage(self, name: str) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nobody is told."""

    def advance(self, evaluations: int) -> None:
        """Nothing."""


def bookkeeping(spec: Spec) -> tuple[float, float]:
    """The seconds of an audit's searches, and the part of them that evaluates nothing."""
    evaluated, searched = Stopwatch(LatentObjective.evaluate), Stopwatch(search.search)
    with (
        patch.object(LatentObjective, "evaluate", evaluated),
        patch.object(ggl, "search", searched),
    ):
        audit.run_audit(spec, Silent())
    return searched.seconds, searched.seconds - evaluated.seconds


def memory(spec: Spec) -> list[tuple[int, float]]:
    """The MiB of the process after thousands of evaluations of each of some gradients."""
    case = prepare(spec)
    canaries = case.trials.first(GRADIENTS)
    observed = case.client.send(*canaries.members, case.contexts("release", range(GRADIENTS)))
    found, done = [], 0

    def note(evaluations: int) -> None:
        nonlocal done
        before, done = done, done + evaluations
        if before // (5000 * GRADIENTS) < done // (5000 * GRADIENTS):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append((done // GRADIENTS, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))

    randoms = [case.random("memory", number) for number in range(GRADIENTS)]
    labels = canaries.members[1]
    search_latents(case, case.defense, observed, labels, randoms, note, LOOP_EVALUATIONS)
    return found


def plain_loop(case: Case, image: torch.Tensor, label: torch.Tensor, seed: int) -> float:
    """Searches for one image, a candidate at a time; its picture's PSNR in dB."""
    observed = case.client.send(
        image[None, None], label[None, None], case.contexts("release", [seed])
    )
    module = case.model.module.requires_grad_(True)
    names = [name for name, _ in module.named_parameters()]
    loop = PlainLoop(module, "none", "l2", [observed[name][0] for name in names])
    start = start_optimizer(AttackSpec(optimizer="pycma:full"), case.prior.size)
    optimizer = start([seed], LOOP_EVALUATIONS, torch.device("cpu"))
    least, best, done = float("inf"), image, 0
    while done < LOOP_EVALUATIONS:
        candidates = optimizer.ask()[0]
        losses = []
        for latent in candidates:
            with torch.no_grad():
                picture = case.prior.decode(latent[None].float(), label[None])[0]
            losses.append(loop.distance(case.model.normalize(picture[None])[0], label))
            if losses[-1] < least:
                least, best = losses[-1], picture
        done += len(losses)
        optimizer.tell(Evaluation(torch.tensor([losses])))
    return float(optimizers.peak_signal_to_noise(best[None], image[None])[0])


def as_good(
    case: Case,
    images: torch.Tensor,
    labels: torch.Tensor,
    attack: str,
    goal: float,
    seconds: float,
) -> None:
    """Prints what an attack reaches with growing budgets, until it is as good as a loop."""
    case = optimizers.optimizing(case, attack)
    contexts = case.contexts("release", range(len(labels)))
    observed = case.client.send(images[:, None], labels[:, None], contexts)
    for budget in BUDGETS:
        began = time.perf_counter()
        found = optimizers.attack(case, attack, observed, labels, budget, 0, optimizers.Meter())
        own = time.perf_counter() - began
        quality = float(optimizers.peak_signal_to_noise(found, images).mean())
        typer.echo(
            f"{attack}, {budget:,} evaluations: {quality:.1f} dB, {own:.2f} s, "
            f"1/{seconds / own:.0f} of the loop's"
        )
        if quality >= goal:
            return


def main(
    shared: Annotated[Path, typer.Option(help="Where the faces are.")] = optimizers.defenses.SHARED,
) -> None:
    """Measures what a search costs."""
    spec = read_spec(SAMPLE)
    searched, idle = bookkeeping(spec)
    share = f"{idle:.1f} of the searches' {searched:.1f} s, {idle / searched:.0%}"
    typer.echo(f"optimizer and bookkeeping: {share}")
    sizes = ", ".join(f"{mebibytes:.0f} at {done:,}" for done, mebibytes in memory(spec))
    typer.echo(f"MiB of the process, by evaluations of each gradient: {sizes}")
    with tempfile.TemporaryDirectory() as scratch:
        tasks = optimizers.make_tasks(["faces"], shared, Path(scratch))
        for task in tasks.values():
            case = optimizers.prepare_case(task, "none", Path(scratch))
            canaries = case.trials.first(FACES)
            images, labels = canaries.canaries, canaries.labels
            began = time.perf_counter()
            pairs = zip(images, labels, strict=True)
            plain = [plain_loop(case, *pair, seed) for seed, pair in enumerate(pairs)]
            seconds, goal = time.perf_counter() - began, sum(plain) / len(plain)
            typer.echo(
                f"plain loop, {LOOP_EVALUATIONS:,} evaluations: {goal:.1f} dB, {seconds:.1f} s"
            )
            for attack in ("gauss_newton", "gauss_newton, refined"):
                as_good(case, images, labels, attack, goal, seconds)


if __name__ == "__main__":
    typer.run(main)
