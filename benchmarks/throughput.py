"""How many candidates a second are compared with a gradient, and how many by a plain loop.

`python benchmarks/throughput.py` prints both beside each other and their ratio, for three models of
32x32 colour images, two distances and three defenses. The plain loop takes one candidate after the
other, as published implementations of gradient inversion without gradients do: a forward pass, the
gradient of all parameters, the attacker's replica of the defense, the distance. What can be
prepared once is prepared before. The two are measured in turns, and the medians are given.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from face_models import small_cnn
from torch import nn
from torchvision.models import resnet18

from ggl_audit.attack.matching import Distance, Matching
from ggl_audit.basics.device import settle, usual_memory
from ggl_audit.basics.environment import keep_freed_memory
from ggl_audit.basics.gradient import Gradient, stack
from ggl_audit.defenses import Context, Defense, Pipeline, Sign, Sparsify
from ggl_audit.inputs.model import ClientModel

CLASSES = 10
TURNS = 5


def lenet(classes: int) -> nn.Module:
    """Of Deep Leakage from Gradients (Zhu et al., NeurIPS 2019), 19,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(768, classes),
    )


@dataclass(frozen=True)
class Case:
    """A model, and how many candidates are tried for how many observed gradients at a time.

    Attributes:
        name: of the model.
        make: it, for so many classes.
        observations: gradients at a time.
        candidates: of each.
        size: pixels along an edge of a colour image.
    """

    name: str
    make: Callable[[int], nn.Module]
    observations: int
    candidates: int
    size: int = 32

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image."""
        return 3, self.size, self.size


def residual(classes: int) -> nn.Module:
    """ResNet-18 with random weights (He et al., CVPR 2016), 11 million parameters."""
    return resnet18(num_classes=classes)


CASES = (
    Case("LeNet", lenet, 16, 64),
    Case("3-layer CNN", small_cnn, 16, 64),
    Case("ResNet-18", residual, 4, 32),
)
DEFENSES: dict[str, list[Defense]] = {
    "none": [],
    "sparsify 0.9": [Sparsify(fraction=0.9)],
    "sign": [Sign()],
}
DISTANCES: tuple[Distance, ...] = ("l2", "cosine")


class PlainLoop:
    """Compares one candidate after the other with one observed gradient."""

    def __init__(
        self, module: nn.Module, defense: str, distance: Distance, observed: Sequence[torch.Tensor]
    ) -> None:
        self._module = module
        self._parameters = list(module.parameters())
        self._defense, self._distance = defense, distance
        self._observed = observed
        self._masks = [(tensor != 0).to(tensor.dtype) for tensor in observed]
        self._square = torch.stack([tensor.square().sum() for tensor in observed]).sum()

    def distance(self, image: torch.Tensor, label: torch.Tensor) -> float:
        """Of one candidate."""
        loss = F.cross_entropy(self._module(image[None]), label[None])
        replica: Sequence[torch.Tensor] = torch.autograd.grad(loss, self._parameters)
        if self._defense == "sparsify 0.9":
            replica = [tensor * mask for tensor, mask in zip(replica, self._masks, strict=True)]
        if self._defense == "sign":
            replica = [torch.sign(tensor) for tensor in replica]
        pairs = list(zip(replica, self._observed, strict=True))
        if self._distance == "l2":
            parts = [(own - seen).square().sum() for own, seen in pairs]
            return float(torch.stack(parts).sum() / self._square)
        inner = torch.stack([(own * seen).sum() for own, seen in pairs]).sum()
        square = torch.stack([own.square().sum() for own in replica]).sum()
        return float(1 - inner / (square * self._square).sqrt())


def rate(evaluate: Callable[[], int], seconds: float) -> float:
    """Candidates a second, over so many seconds."""
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        done += evaluate()
    return done / passed


def measure(
    case: Case,
    defense: str,
    distance: Distance,
    device: torch.device,
    seconds: float,
    turns: int = TURNS,
) -> tuple[float, float]:
    """Candidates a second of the plain loop and of the library."""
    settle(device)
    torch.manual_seed(0)
    module = case.make(CLASSES).eval().to(device)
    one = torch.ones(1, 1, 1, device=device)
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}
    buffers = dict(module.named_buffers())
    model = ClientModel(module, parameters, buffers, case.shape, 0 * one, one, 1.0, CLASSES, None)
    pipeline = Pipeline(DEFENSES[defense])
    shape = (case.observations, case.candidates)
    images = torch.rand(*shape, *case.shape, device=device)
    labels = torch.randint(CLASSES, shape, device=device)

    def release(image: torch.Tensor, label: torch.Tensor) -> Gradient:
        loss = F.cross_entropy(module(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        gradient = dict(zip(parameters, gradients, strict=True))
        return pipeline.apply(gradient, Context(torch.Generator(device).manual_seed(0)))

    truths = torch.rand(case.observations, *case.shape, device=device)
    observed = [release(truth, label[0]) for truth, label in zip(truths, labels, strict=True)]
    loop = PlainLoop(module, defense, distance, list(observed[0].values()))
    memory = usual_memory(device) * 2**20
    matching = Matching(model, pipeline, distance, memory)
    together = stack(observed)
    first = loop.distance(images[0, 0], labels[0, 0])
    own = float(matching.distances(images, labels, together)[0, 0])
    # What is far from 0 is a difference of sums, in units of the observed norm; and the signs of
    # values that are nothing but rounding fall as they fall.
    least = 0.05 if defense == "sign" else 1e-4
    assert abs(first - own) <= 1e-3 * abs(first) + least, (first, own)

    def evaluate_one() -> int:
        loop.distance(images[0, 0], labels[0, 0])
        return 1

    def evaluate_many() -> int:
        matching.distances(images, labels, together).sum().item()
        return labels.numel()

    pairs = [(rate(evaluate_one, seconds), rate(evaluate_many, seconds)) for _ in range(turns)]
    plain, ours = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return plain, ours


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--seconds", default=1.0, type=float, help="of each turn (default: 1)")
    arguments = parser.parse_args()
    keep_freed_memory()
    threads = f", {torch.get_num_threads()} threads" if arguments.device.type == "cpu" else ""
    write(f"Candidates a second on {arguments.device}{threads}; PyTorch {torch.__version__}")
    write(f"{'model':12}{'defense':14}{'distance':10}{'plain loop':>11}{'ours':>10}{'ratio':>8}")
    for case, defense, distance in itertools.product(CASES, DEFENSES, DISTANCES):
        plain, ours = measure(case, defense, distance, arguments.device, arguments.seconds)
        figures = f"{plain:11.1f}{ours:10.1f}{ours / plain:8.1f}"
        write(f"{case.name:12}{defense:14}{distance:10}{figures}")


def write(line: str) -> None:
    """Prints a line at once, as the whole table takes minutes."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
