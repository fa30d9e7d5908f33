"""Compares the optimizers at equal budgets: who comes how near to the image, in what time.

    python benchmarks/optimizers.py results.json -o optimizers.md --plot optimizers.svg

Every optimizer attacks the same releases, with the same evaluations or the same seconds. What is
measured goes to the file of results at once; an interrupted run goes on where it was, so that the
whole, which takes some hours, can be had in parts (`--task`, `--budget`, `--attack`, `--seeds`).
`--from` renders the results without measuring. Data are those of `defenses.py`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import defenses
import numpy as np
import torch
import typer
from numpy.typing import NDArray

import ggl_audit
from ggl_audit.attack.derivatives import Derivatives
from ggl_audit.attack.pixels import attack_pixels
from ggl_audit.attack.refine import refine
from ggl_audit.attacks.ggl import search_latents
from ggl_audit.basics.environment import describe
from ggl_audit.basics.gradient import Gradient
from ggl_audit.case.case import Case
from ggl_audit.case.preparation import prepare
from ggl_audit.evidence.bounds import measure_rate
from ggl_audit.evidence.fidelity import candidate_distances
from ggl_audit.evidence.identification import Trials, reconstruction_ranks
from ggl_audit.inputs.spec_file import parse_defense, read_spec
from ggl_audit.optimizers import DERIVATIVE_COST, start_optimizer
from ggl_audit.spec import SubspaceSpec

FACE_DATA = [
    path.relative_to(defenses.SHARED) for path in (defenses.FACES, defenses.FACE_GENERATOR)
]

NEVERGRAD = ("OldCMA", "DE", "NGOpt")
OPTIMIZERS = [
    "gauss_newton",
    "cma",
    *(f"pycma:{covariance}" for covariance in ("full", "diagonal", "vkd")),
    "bayesian",
    "turbo",
    "adam",
    "random",
    *(f"nevergrad:{name}" for name in NEVERGRAD),
]

REFINED, PIXELS = "gauss_newton, refined", "pixels, no prior"
ATTACKS = [REFINED, *OPTIMIZERS, PIXELS]

SEARCHED = 0.6
"""The share of the evaluations after which gauss_newton's result is refined."""

FEW = {"bayesian": 100, "turbo": 100}
"""The most evaluations of optimizers whose own work grows with their cube; in 12 directions."""

FEWEST = 100
"""Evaluations that every attack is given at least; one that is slow does not get to all of them."""

DEFENSES = {
    "none": "none",
    "sparsify 90 %": "sparsify:fraction=0.9",
    "sign": "sign",
    "noise 0.1": "noise:std=0.1",
}

BARS = {"none": 1.5, "sparsify 90 %": 1.5, "sign": 3.0}
"""The gap in dB, on faces at most evaluations, that the default attack is to stay below."""

Budget = int | str

SECONDS = "seconds"
RESAMPLED = 10_000


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        images: of each task.
        evaluations: the budgets of equal evaluations, the least first.
        starts: of the generator's best inversion.
        steps: of each start.
    """

    images: int = 10
    evaluations: tuple[int, ...] = (1000, 5000)
    starts: int = 4
    steps: int = 3000


QUICK = Scale(images=2, evaluations=(120, 240), starts=2, steps=50)


@dataclass(frozen=True)
class Cell:
    """One attack on the images of a task, each on its own.

    Attributes:
        task: digits or faces.
        defense: as in ``DEFENSES``.
        budget: evaluations for each image, or ``seconds``: as many as gauss_newton took for the
            least evaluations.
        attack: as in ``ATTACKS``.
        seed: of the attack, and of the defense's noise.
    """

    task: str
    defense: str
    budget: Budget
    attack: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        cell: what was measured.
        evaluations: spent for each image; a candidate with its derivative counts as several.
        seconds: of one core for each image.
        psnr: in dB, of each image.
        ranks: of each image among its candidates.
    """

    cell: Cell
    evaluations: float
    seconds: float
    psnr: list[float]
    ranks: list[int]


@dataclass
class Results:
    """All that was measured.

    Attributes:
        scale: how much.
        about: what a reader needs to repeat it.
        candidates: that an image is to be found among.
        best: PSNR in dB of the generator's best inversion of each image, by task.
        outcomes: of the cells.
    """

    scale: Scale
    about: dict[str, str]
    candidates: int = 0
    best: dict[str, list[float]] = field(default_factory=dict)
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)

    @property
    def budgets(self) -> list[Budget]:
        """Of equal evaluations, then of equal seconds."""
        return [*self.scale.evaluations, SECONDS]

    def of(self, cell: Cell) -> list[Outcome]:
        """The outcomes of a cell and of its like with other seeds."""
        like = {**asdict(cell), "seed": None}
        return [o for c, o in self.outcomes.items() if {**asdict(c), "seed": None} == like]


def read_results(path: Path) -> Results:
    """Reads what :func:`write_results` wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["scale"]["evaluations"] = tuple(stored["scale"]["evaluations"])
    outcomes = [Outcome(Cell(**one.pop("cell")), **one) for one in stored.pop("outcomes")]
    scale = Scale(**stored.pop("scale"))
    return Results(scale, **stored, outcomes={one.cell: one for one in outcomes})


def write_results(path: Path, results: Results) -> None:
    """Writes all results as JSON, so that an interrupt leaves the file whole."""
    plain = {**vars(results), "scale": asdict(results.scale)}
    plain["outcomes"] = [asdict(outcome) for outcome in results.outcomes.values()]
    part = path.with_suffix(".part")
    part.write_text(json.dumps(plain) + "\n", encoding="utf-8")
    part.replace(path)


class Meter:
    """Counts what an attack spends."""

    def __init__(self) -> None:
        self.evaluations = 0
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        """Since it was made; of this process alone, whatever else the machine does."""
        return time.process_time() - self._began

    def __call__(self, evaluations: int) -> None:
        """Takes note of evaluations."""
        self.evaluations += evaluations


def prepare_case(task: defenses.Task, defense: str, scratch: Path) -> Case:
    """A task behind a defense, as an audit prepares it."""
    changes = {
        "capture.gradient": str(scratch / "capture.safetensors"),
        "defense": parse_defense(DEFENSES[defense]),
        "device": "cpu",
        **task.budget,
    }
    spec = read_spec(task.base, changes.items())
    defenses.capture(spec, task.private[:1], task.labels[:1], 1)
    return prepare(spec)


def attack(
    case: Case,
    name: str,
    observed: Gradient,
    labels: torch.Tensor,
    evaluations: int,
    seed: int,
    meter: Meter,
) -> torch.Tensor:
    """Attacks t observed gradients; their pictures are (t, channels, height, width)."""
    model, defense, prior = case.model, case.defense, case.prior
    if name == PIXELS:
        steps, aligned = evaluations // DERIVATIVE_COST, Derivatives(model, defense, "cosine")
        randoms = [case.random(f"pixels {seed}", number) for number in range(len(labels))]
        return attack_pixels(
            model, aligned, labels[:, None], observed, steps, randoms, meter
        ).images[:, 0]
    searched = int(SEARCHED * evaluations) if name == REFINED else evaluations
    randoms = [case.random(f"seed {seed}", number) for number in range(len(labels))]
    own = observed, labels[:, None], randoms
    found = search_latents(case, defense, *own, meter, searched)
    if name != REFINED:
        return found.images[:, 0]
    steps = (evaluations - searched) // DERIVATIVE_COST
    nearer = Derivatives(model, defense, case.spec.attack.distance)
    assert found.latents is not None
    return refine(prior, nearer, found.latents, labels[:, None], observed, steps, meter).images[
        :, 0
    ]


def optimizing(case: Case, name: str) -> Case:
    """The case with an attack's optimizer, whose libraries are loaded."""
    optimizer = {REFINED: "gauss_newton", PIXELS: "random"}.get(name, name)
    subspace = SubspaceSpec() if name in FEW else None
    changes = {"optimizer": optimizer, "subspace": subspace}
    declared = case.spec.attack.model_copy(update=changes)
    start_optimizer(declared, case.prior.size)([0], 1000, case.model.device)
    return replace(case, spec=case.spec.model_copy(update={"attack": declared}))


def allowance(results: Results, cell: Cell) -> int:
    """The evaluations that a cell is given for each image.

    For equal seconds it is given what it can do in them by its own speed, as some optimizers plan
    ahead.

    Raises:
        typer.BadParameter: the cells of least evaluations, which tell the speed, are not there.
    """
    if cell.budget != SECONDS:
        return min(int(cell.budget), FEW.get(cell.attack, int(cell.budget)))
    least = replace(cell, budget=results.scale.evaluations[0])
    try:
        own, usual = (
            results.outcomes[replace(least, attack=a)] for a in (cell.attack, "gauss_newton")
        )
    except KeyError:
        raise typer.BadParameter(
            f"needs the results of {results.scale.evaluations[0]} evaluations first",
            param_hint="--budget seconds",
        ) from None
    possible = int(usual.seconds / own.seconds * own.evaluations)
    return max(possible, FEWEST)


def measure(results: Results, case: Case, trials: Trials, cell: Cell) -> Outcome:
    """Makes the attack of a cell on the images of all trials side by side."""
    count = len(trials)
    case = optimizing(case, cell.attack)
    contexts = case.contexts(f"release {cell.seed}", range(count))
    observed = case.client.send(*trials.members, contexts)
    evaluations, meter = allowance(results, cell), Meter()
    pictures = attack(case, cell.attack, observed, trials.labels, evaluations, cell.seed, meter)
    taken = meter.seconds
    distance = candidate_distances(case.model, None)["pixels"]
    lots = case.lots(f"ties {cell.seed}", range(count))
    ranks = reconstruction_ranks(pictures[:, None], trials, distance, lots)
    psnr = rounded(peak_signal_to_noise(pictures, trials.canaries))
    return Outcome(cell, meter.evaluations / count, round(taken / count, 5), psnr, ranks)


def rounded(values: torch.Tensor) -> list[float]:
    """As they are kept, so that the file of all results is small enough to be published."""
    return [round(value, 3) for value in values.tolist()]


def peak_signal_to_noise(pictures: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """In dB, of n pictures in [0, 1]."""
    errors = (pictures - truths).square().flatten(1).mean(1)
    return -10 * errors.clamp(min=1e-12).log10()


def best_inversion(case: Case, trials: Trials, scale: Scale) -> list[float]:
    """The PSNR of the best picture of each image that the generator can draw, as far as is known.

    By Adam on the squared error of the pixels, from the middle of the prior and random latents.
    """
    starts = scale.starts
    drawn = torch.randn(
        len(trials) * starts, case.prior.size, generator=torch.Generator().manual_seed(0)
    )
    drawn[::starts] = 0
    latents = drawn.requires_grad_()
    labels = trials.labels.repeat_interleave(starts)
    truths = trials.canaries.repeat_interleave(starts, dim=0)
    adam = torch.optim.Adam([latents], lr=0.05)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, scale.steps)
    for _ in range(scale.steps):
        adam.zero_grad()
        errors = (case.prior.decode(latents, labels) - truths).square().flatten(1).mean(1)
        errors.sum().backward()
        adam.step()
        falling.step()
    with torch.no_grad():
        found = peak_signal_to_noise(case.prior.decode(latents, labels), truths)
    return rounded(found.unflatten(0, (-1, starts)).amax(1))


def run(
    results: Results, path: Path, tasks: dict[str, defenses.Task], cells: Sequence[Cell]
) -> None:
    """Measures the cells that are not among the results yet, and writes each to the file."""
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[tuple[str, str], Case] = {}
        for cell in cells:
            if cell in results.outcomes:
                continue
            place = cell.task, cell.defense
            if place not in cases:
                cases[place] = prepare_case(tasks[cell.task], cell.defense, Path(folder))
            case = cases[place]
            trials = case.trials.first(results.scale.images)
            results.candidates = trials.candidates.shape[1]
            if cell.task not in results.best:
                results.best[cell.task] = best_inversion(case, trials, results.scale)
            outcome = measure(results, case, trials, cell)
            results.outcomes[cell] = outcome
            write_results(path, results)
            typer.echo(
                f"{cell.task}, {cell.defense}, {cell.budget}, {cell.attack}, seed {cell.seed}: "
                f"{np.mean(outcome.psnr):.1f} dB, {outcome.seconds:.1f} s"
            )


def planned(tasks: Sequence[str], scale: Scale, seeds: int) -> list[Cell]:
    """The whole grid; an optimizer that is given few evaluations has them in the least budget."""
    least, *more = scale.evaluations
    budgets: list[Budget] = [least, SECONDS, *more]
    return [
        Cell(task, defense, budget, name, seed)
        for budget in budgets
        for seed in range(seeds)
        for task in tasks
        for defense in DEFENSES
        for name in ATTACKS
        if name not in FEW or budget not in more
    ]


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean over images and its 95 % interval, by the bootstrap."""
    random = np.random.default_rng(0)
    drawn = values[random.integers(len(values), size=(RESAMPLED, len(values)))].mean(axis=1)
    lower, upper = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(lower), float(upper)


def over_images(outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
    """The mean PSNR of each image over the seeds."""
    means: NDArray[np.float64] = np.array([one.psnr for one in outcomes]).mean(axis=0)
    return means


def between(measured: tuple[float, float, float]) -> str:
    """A mean with its interval."""
    mean, lower, upper = measured
    return f"{mean:.1f} ({lower:.1f} to {upper:.1f})"


def identified(outcomes: Sequence[Outcome], candidates: int) -> str:
    """How many images most of the seeds identify: an image's seeds are not independent trials."""
    hits = np.array([[rank == 1 for rank in one.ranks] for one in outcomes]).mean(axis=0) > 0.5
    rate = measure_rate(int(hits.sum()), len(hits), 1 / candidates)
    return f"{rate.successes}/{rate.trials} ({100 * rate.lower:.0f} to {100 * rate.upper:.0f} %)"


HEADER = """\
| defense | attack | PSNR, dB | gap, dB | identified | evaluations | seconds | seeds |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def row(results: Results, cell: Cell) -> str:
    """One line of a table: a cell over all seeds that were measured."""
    outcomes = results.of(cell)
    psnr = over_images(outcomes)
    columns = [
        cell.defense,
        cell.attack,
        between(interval(psnr)),
        between(interval(np.array(results.best[cell.task]) - psnr)),
        identified(outcomes, results.candidates),
        f"{np.mean([one.evaluations for one in outcomes]):,.0f}",
        f"{np.mean([one.seconds for one in outcomes]):.2f}",
        str(len(outcomes)),
    ]
    return f"| {' | '.join(columns)} |"


def budget_title(results: Results, budget: Budget) -> str:
    """Names a budget for the reader."""
    least = results.scale.evaluations[0]
    if budget == SECONDS:
        return f"Equal seconds: those of gauss_newton's {least:,} evaluations"
    return f"{budget:,} evaluations"


def tables(results: Results) -> Iterator[str]:
    """The lines of all tables; what was not measured has no row and is named below."""
    for task, best in results.best.items():
        yield f"## {task.capitalize()}\n"
        yield (
            f"{len(best)} images, {results.candidates} candidates of the same class. The "
            f"generator's best inversion: {between(interval(np.array(best)))} dB.\n"
        )
        if task == "faces":
            yield from bars(results)
        for budget in results.budgets:
            grid = [
                Cell(task, defense, budget, name, 0) for defense in DEFENSES for name in ATTACKS
            ]
            there = [cell for cell in grid if results.of(cell)]
            if not there:
                yield f"Not measured: {budget_title(results, budget).lower()}.\n"
                continue
            yield f"### {task.capitalize()}, {budget_title(results, budget).lower()}\n\n{HEADER}"
            yield from (row(results, cell) for cell in there)
            yield missing(results, grid)
    about = ", ".join(f"{key} {value}" for key, value in results.about.items())
    yield f"Measured with {about}; one process of one thread."


def missing(results: Results, grid: Sequence[Cell]) -> str:
    """Says which cells of a table were not measured."""
    lacking = [cell for cell in grid if not results.of(cell)]
    names: dict[str, list[str]] = {cell.attack: [] for cell in lacking}
    for cell in lacking:
        names[cell.attack].append(cell.defense)
    said = [
        name if len(behind) == len(DEFENSES) else f"{name} behind {', '.join(behind)}"
        for name, behind in names.items()
    ]
    return f"\nNot measured: {'; '.join(said)}.\n" if said else ""


def bars(results: Results) -> Iterator[str]:
    """Whether the default attack keeps the bars."""
    most = results.scale.evaluations[-1]
    yield f"At {most:,} evaluations the attack is to come within a bar of it:\n"
    yield f"| defense | attack | gap, dB | bar, dB | kept | seeds |\n{'| --- ' * 6}|"
    for defense, bar in BARS.items():
        for name in ("gauss_newton", REFINED):
            outcomes = results.of(Cell("faces", defense, most, name, 0))
            if not outcomes:
                yield f"| {defense} | {name} | | {bar} | not measured | |"
                continue
            gap = interval(np.array(results.best["faces"]) - over_images(outcomes))
            kept = "yes" if gap[0] <= bar else "no"
            yield f"| {defense} | {name} | {between(gap)} | {bar} | {kept} | {len(outcomes)} |"
    yield ""


def plot(results: Results, path: Path) -> None:
    """Draws the PSNR of all attacks, with intervals, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "optimizers", "font.size": 8})
    tasks = list(results.best)
    figure = Figure(figsize=(11, 3.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(DEFENSES), sharex="row", sharey=True, squeeze=False)
    for axes, task in zip(grid, tasks, strict=True):
        for axis, defense in zip(axes, DEFENSES, strict=True):
            best = axis.axvline(np.mean(results.best[task]), color="grey", linestyle=":")
            best.set_label("the generator's best inversion")
            for number, budget in enumerate(results.budgets):
                cells = [Cell(task, defense, budget, name, 0) for name in ATTACKS]
                rows = [index for index, cell in enumerate(cells) if results.of(cell)]
                found = [interval(over_images(results.of(cells[index]))) for index in rows]
                mean, lower, upper = np.array(found).reshape(-1, 3).T
                axis.errorbar(
                    mean,
                    np.array(rows) + 0.25 * (number - 1),
                    xerr=(mean - lower, upper - mean),
                    fmt="osv"[number],
                    markersize=3,
                    linewidth=0.8,
                    label=budget_title(results, budget),
                )
            axis.set_title(f"{task}, {defense}")
            axis.set_yticks(range(len(ATTACKS)), ATTACKS)
            axis.set_ylim(len(ATTACKS) - 0.5, -0.5)
            axis.set_xlabel("PSNR, dB")
            axis.grid(axis="y", linewidth=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    figure.savefig(path, format="svg", metadata={"Date": None})


def about() -> dict[str, str]:
    """What measured."""
    on = describe(torch.device("cpu"))
    return {
        "ggl-audit": ggl_audit.__version__,
        "PyTorch": on["torch"],
        "on": f"{on['platform']}, {os.cpu_count()} CPU cores",
    }


def make_tasks(names: Sequence[str], shared: Path, scratch: Path) -> dict[str, defenses.Task]:
    """The tasks by name; the faces only where their data are."""
    defenses.FACES, defenses.FACE_GENERATOR = (shared / inside for inside in FACE_DATA)
    tasks = {}
    for name in names:
        folder = scratch / name
        folder.mkdir()
        if name == "digits":
            tasks[name] = defenses.digits_task(folder)
        elif defenses.FACES.is_file() and defenses.FACE_GENERATOR.is_file():
            tasks[name] = defenses.faces_task(folder)
        else:
            typer.echo("Faces are skipped: ../shared/data has not all of them; see --shared.")
    return tasks


def main(
    path: Annotated[
        Path, typer.Option("--results", help="A JSON file; what it holds is not measured again.")
    ] = Path("results.json"),
    task: Annotated[str, typer.Option(help="digits, faces or all.")] = "all",
    defense: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(DEFENSES)}. Repeatable.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Evaluations, or seconds. Repeatable.")
    ] = None,
    attacks: Annotated[
        list[str] | None, typer.Option("--attack", help="As the tables have it. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Attacks on each image.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A small budget: does it run?")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Results to render; nothing is measured.")
    ] = None,
    shared: Annotated[Path, typer.Option(help="Where the faces are.")] = defenses.SHARED,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A Markdown file.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="An SVG.")] = None,
) -> None:
    """Compares the optimizers at equal budgets."""
    names = ["digits", "faces"] if task == "all" else [task]
    if not {*names} <= {"digits", "faces"}:
        raise typer.BadParameter("expected digits, faces or all", param_hint="--task")
    if source is not None:
        results = read_results(source)
    else:
        torch.set_num_threads(1)
        scale = QUICK if quick else Scale()
        results = read_results(path) if path.is_file() else Results(scale, about())
        if results.scale != scale:
            raise typer.BadParameter(f"{path} holds results of another scale, {results.scale}")
        with tempfile.TemporaryDirectory() as folder:
            tasks = make_tasks(names, shared, Path(folder))
            cells = planned(list(tasks), scale, seeds)
            wanted = (
                (attacks, {cell.attack for cell in cells}, lambda cell: cell.attack),
                (defense, {*DEFENSES}, lambda cell: cell.defense),
                (budget, {str(cell.budget) for cell in cells}, lambda cell: str(cell.budget)),
            )
            for chosen, known, of in wanted:
                if not {*(chosen or [])} <= known:
                    raise typer.BadParameter(f"expected some of {', '.join(sorted(known))}")
                cells = [cell for cell in cells if not chosen or of(cell) in chosen]
            run(results, path, tasks, cells)
    written = "\n".join(tables(results))
    if output is None:
        typer.echo(written)
    else:
        output.write_text(written + "\n", encoding="utf-8")
    if picture is not None:
        plot(results, picture)


if __name__ == "__main__":
    typer.run(main)
