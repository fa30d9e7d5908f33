"""What each experiment takes at its peak, for two budgets of `memory`.

`python benchmarks/memory.py` runs each experiment in a process of its own, on a model of 800,000
parameters (3 MiB a gradient), and prints how much the process grew meanwhile: the most that it had,
less what it had when everything was loaded. Needs Linux, which tells and resets that figure.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

EXPERIMENTS = ("ceiling", "search", "derivatives", "membership", "promise")
BUDGETS = (32, 256)

CODE = """
import torch
from torch import nn


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )


def step(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()
    sent = {name: tensor.grad for name, tensor in model.named_parameters()}
    norm = torch.stack([tensor.norm() for tensor in sent.values()]).norm()
    factor = (1 / norm).clamp(max=1)
    return {name: factor * tensor + torch.randn_like(tensor) for name, tensor in sent.items()}
"""


def of_process(name: str) -> float:
    """A figure of this process in MiB: VmRSS, or VmHWM, the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def growth(work: Callable[[], object]) -> float:
    """The MiB that this process has more of, at the most, while it works."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = of_process("VmRSS")
    work()
    return of_process("VmHWM") - before


def child(experiment: str, budget: int) -> None:
    """Prints how much one experiment takes."""
    import torch
    from safetensors.torch import save_file

    from ggl_audit.attacks.by_derivatives import derivatives_of
    from ggl_audit.attacks.ggl import search_latents
    from ggl_audit.audit import by_name, plan_experiments
    from ggl_audit.basics.gradient import each, stack
    from ggl_audit.case.preparation import prepare
    from ggl_audit.spec import Spec

    def nobody(_evaluations: int) -> None:
        pass

    batch = {"membership": 4}.get(experiment, 1)
    plain = [{"name": "clip", "bound": 1.0}, {"name": "noise", "std": 1.0}]
    promised = {
        "unit": "sample",
        "reduction": "sum",
        "rounds": 1,
        "sampling_rate": 1,
        "delta": 1e-5,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models.py").write_text(CODE)
        own: dict[str, object] = {}
        exec(CODE, own)  # noqa: S102
        module = own["wide"]()  # type: ignore[operator]
        images, labels = torch.rand(batch, 1, 16, 16), torch.arange(batch)
        save_file(own["step"](module, images, labels), folder / "g.safetensors")  # type: ignore[operator]
        declared = {
            "version": 1,
            "model": {"factory": "models.py:wide", "input": {"shape": [1, 16, 16]}},
            "capture": {
                "gradient": "g.safetensors",
                "batch_size": batch,
                "labels": labels.tolist(),
            },
            "defense": [{"name": "noise", "std": 1.0}] if experiment == "membership" else plain,
            "prior": {"bundled": "digits"},
            "attack": {"optimizer": "cma"},
            "evidence": {"reference": {"bundled": "digits"}},
            "memory": budget,
            "device": "cpu",
        }
        if experiment == "promise":
            declared |= {"client": {"step": "models.py:step"}, "guarantee": promised}
        case = prepare(Spec.model_validate(declared).placed(folder, lambda _: ""))

    experiments = by_name(plan_experiments(case))

    def run(name: str, trials: int) -> list[object]:
        return list(experiments[name].run(range(trials), nobody))

    work: dict[str, Callable[[], object]] = {
        "ceiling": lambda: run("matching", 25),
        "search": lambda: search_latents(
            case,
            case.defense,
            stack([case.audited.observed] * 2),
            case.audited.repeated_labels(2),
            [case.random("trial", number) for number in range(2)],
            nobody,
            130,
        ),
        "derivatives": lambda: derivatives_of(case, "cosine")(
            torch.rand(20, 1, 1, 16, 16),
            torch.zeros(20, 1, dtype=torch.long),
            each(lambda tensor: tensor.expand(20, *tensor.shape), case.audited.observed),
        ),
        "membership": lambda: run("membership", 2),
        "promise": lambda: run("promise", 5),
    }
    print(growth(work[experiment]))  # noqa: T201


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("EXPERIMENT", "MIB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child[0], int(arguments.child[1]))
        return
    print(f"{'MiB at the peak':18}" + "".join(f"{f'memory: {b}':>14}" for b in BUDGETS))  # noqa: T201
    taken = {
        pair: float(
            subprocess.check_output(  # noqa: S603
                [sys.executable, __file__, "--child", *map(str, pair)]
            )
        )
        for pair in itertools.product(EXPERIMENTS, BUDGETS)
    }
    for experiment in EXPERIMENTS:
        figures = "".join(f"{taken[experiment, budget]:14.0f}" for budget in BUDGETS)
        print(f"{experiment:18}{figures}")  # noqa: T201


if __name__ == "__main__":
    main()
