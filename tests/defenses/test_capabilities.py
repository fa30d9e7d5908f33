"""A step of one's own has each capability that it has the methods of, and nothing else counts."""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import ggl_audit.defenses
from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses import (
    Aggregation,
    Clip,
    Context,
    DataDefense,
    Defense,
    Distribution,
    Drawn,
    NoiseLaw,
    Pipeline,
    SecureAggregation,
    Sign,
    Step,
    shipped,
)
from ggl_audit.defenses.base import NoiseBound
from ggl_audit.defenses.capabilities import ByValues

FOLDER = Path(ggl_audit.defenses.__file__).parent
MODULES = [
    importlib.import_module(f"ggl_audit.defenses.{file.stem}")
    for file in sorted(FOLDER.glob("*.py"))
    if file.stem != "__init__"
]
MOST_METHODS = 11


def gradient(seed: int) -> Gradient:
    random = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(30, generator=random), "b": torch.randn(5, generator=random)}


def context(seed: int = 0, **own: Any) -> Context:
    return Context(torch.Generator().manual_seed(seed), **own)


class Halved(Defense):
    """Halves what it is given: the least that a step has to say."""

    name: ClassVar[str] = "halved"

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        return each(lambda tensor: tensor / 2, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return each(lambda tensor: tensor / 2, gradient)


def test_a_step_that_says_no_more_can_do_no_more() -> None:
    defense = Pipeline([Halved()])
    sent = defense.apply(gradient(0), context())
    assert [check.outcome for check in defense.checks.verify(sent)] == ["hidden"]
    assert defense.replica.value_wise() is None
    assert defense.replica.is_smooth
    assert defense.replica.guesses(sent) == [{}]
    assert defense.training.draw(context(), 1) == {}
    assert defense.sensitivity.guarantee() is None
    assert not defense.effect.only_scales()
    assert not defense.effect.keeps_images_apart()
    assert float(defense.likelihood.mismatch([gradient(0)], sent)) == 0


class OwnNoise(Halved):
    """Adds Gaussian noise, drawn in its own way."""

    name: ClassVar[str] = "own_noise"
    replica_kind: ClassVar[Literal["identity"]] = "identity"
    preserves: ClassVar[frozenset[str]] = frozenset({"norm"})
    std: float

    @property
    def law(self) -> NoiseLaw:
        return NoiseLaw(self.std)

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        def noisy(tensor: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn(4, *tensor.shape, generator=context.generator)
            return tensor + self.std * drawn.sum(0) / 2

        return each(noisy, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return gradient


def test_noise_of_one_s_own_counts_as_noise() -> None:
    defense = Pipeline([Clip(bound=1.0), OwnNoise(std=3), OwnNoise(std=4)])
    assert defense.randomness.total_noise() == NoiseLaw(5)
    assert defense.randomness.leaves_only_noise()
    assert defense.likelihood.is_known()
    assert defense.likelihood.value_wise() is not None
    mechanism = defense.sensitivity.guarantee()
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(1 / 5)
    assert str(defense.noiseless()) == str(Clip(bound=1.0))
    cohort = Pipeline([Clip(bound=1.0), OwnNoise(std=3), SecureAggregation(clients=9)])
    assert cohort.randomness.total_noise() == NoiseLaw(1)
    sent = cohort.release([each(torch.zeros_like, {"w": torch.ones(9000)})] * 9, [context()] * 9)
    assert float(sent["w"].std()) == pytest.approx(1, rel=0.1)


class Shifted(Halved):
    """Shifts by what only it knows; with everything that a step can have."""

    name: ClassVar[str] = "shifted"
    trace: ClassVar[str] = "values"
    preserves: ClassVar[frozenset[str]] = frozenset({"norm"})
    replica_kind: ClassVar[Literal["values"]] = "values"
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian"})

    earlier: int = 0

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        for one in context.earlier:
            gradient = {name: tensor + one[name] for name, tensor in gradient.items()}
        return each(lambda tensor: tensor * 2, gradient)

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return each(lambda tensor: tensor * 2, gradient)

    def by_values(self, readable: bool) -> ByValues | None:
        return ByValues(lambda seen: seen, lambda values, _: values.mul_(2)) if readable else None

    def smooth(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return each(torch.tanh, gradient)

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        return noise.log_density({n: t / 2 - before[n] for n, t in observed.items()})

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, str]:
        return bool(flat(observed).max() > 100), f"the largest value is {flat(observed).max():.3g}"

    def hint(self, observed: Gradient, factors: Factors) -> str:
        return f"; there are {factors.clients} clients"

    def norm_bound(self, before: float | None) -> float | None:
        return None if before is None else 2 * before

    def sensitivity(self, before: float | None, of_mean: bool) -> float | None:
        return None if before is None else 2 * before

    @property
    def earlier_rounds(self) -> int:
        return self.earlier

    @property
    def keeps_every_tensor(self) -> bool:
        return False


def test_a_step_of_one_s_own_has_what_it_has_the_methods_of() -> None:
    defense, sent = Pipeline([Shifted()]), each(lambda tensor: 2 * tensor, gradient(0))
    assert not defense.replica.is_smooth
    smooth = defense.replica.smooth([gradient(1)], sent)
    assert torch.equal(flat(smooth), flat(gradient(1)).tanh())
    way = defense.replica.value_wise()
    assert way is not None
    found = way.on_values(torch.ones(3), [torch.ones(3)])
    assert found.tolist() == [2, 2, 2]
    assert defense.effect.empties_tensors()
    assert [check.outcome for check in defense.checks.verify(sent)] == ["agrees"]
    (check,) = defense.checks.verify(each(lambda tensor: tensor + 1000, sent))
    assert check.outcome == "contradicts"
    assert check.detail.endswith("; there are 1 clients")


def test_the_likelihood_of_a_step_of_one_s_own_counts() -> None:
    defense = Pipeline([OwnNoise(std=0.1), Shifted()])
    assert defense.likelihood.is_known()
    assert not Pipeline([OwnNoise(std=0.1), Halved()]).likelihood.is_known()
    sent = defense.apply(gradient(0), context())
    right, wrong = (float(defense.likelihood.mismatch([gradient(i)], sent)) for i in (0, 1))
    expected = NoiseLaw(0.1).log_density({n: t / 2 - gradient(0)[n] for n, t in sent.items()})
    assert right == pytest.approx(-float(expected))
    assert right < wrong


def test_a_bound_of_a_step_of_one_s_own_counts_in_the_guarantee() -> None:
    once = Pipeline([Clip(bound=1.0), Shifted(), OwnNoise(std=4)]).sensitivity.guarantee()
    assert once is not None
    assert once.mu == pytest.approx(2 / 4)
    steps = [Clip(bound=1.0), SecureAggregation(clients=4), Shifted(), OwnNoise(std=4)]
    of_mean = Pipeline(steps).sensitivity.guarantee("client")
    assert of_mean is not None
    assert of_mean.mu == pytest.approx(2 / 4 / 4)


def test_earlier_rounds_of_a_step_of_one_s_own_are_remembered() -> None:
    defense = Pipeline([Shifted(earlier=2)])
    assert defense.earlier_rounds == 2
    assert not defense.acts_on_a_gradient()
    assert not defense.likelihood.is_known()
    rounds = [gradient(seed) for seed in range(3)]
    sent = defense.release(rounds[:1], [context(earlier=rounds[1:])])
    whole = torch.stack([flat(one) for one in rounds]).sum(0)
    torch.testing.assert_close(flat(sent), 2 * whole)


class Flipped(DataDefense):
    """Turns images around, or does not, by a coin."""

    name: ClassVar[str] = "flipped"

    def draw(self, context: Context, images: int) -> Drawn:
        return {"flipped": torch.randint(2, (images,), generator=context.generator)}

    @property
    def drawn_for_each_image(self) -> frozenset[str]:
        return frozenset({"flipped"})

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        return [{"flipped": torch.tensor([side])} for side in (0, 1)]

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turned = drawn["flipped"].view(-1, 1, 1, 1).bool()
        return torch.where(turned, images.flip(3), images), targets


def test_draws_of_a_step_of_one_s_own_are_guessed() -> None:
    defense = Pipeline([Flipped(), Sign()])
    assert defense.training.changes_images
    drawn = defense.training.draw(context(), 6)
    assert defense.training.drawn_for(drawn, torch.tensor([4, 2]))["flipped"].tolist() == [
        int(drawn["flipped"][4]),
        int(drawn["flipped"][2]),
    ]
    assert [int(one["flipped"]) for one in defense.replica.guesses(gradient(0))] == [0, 1]
    images = torch.rand(6, 1, 4, 4)
    sent, _ = defense.training.transform(images, torch.zeros(6, 2), drawn)
    for image, turned, side in zip(images, sent, drawn["flipped"], strict=True):
        assert torch.equal(turned, image.flip(2) if side else image)


class Largest(Aggregation):
    """Shows how large the mean is, and nothing else."""

    name: ClassVar[str] = "largest"

    def finish(self, mean: Gradient) -> Gradient:
        return each(lambda tensor: torch.full_like(tensor, float(tensor.abs().max())), mean)


def test_a_step_on_the_aggregate_of_one_s_own_joins_clients() -> None:
    defense, gradients = Pipeline([Largest(clients=3)]), [gradient(seed) for seed in range(3)]
    sent = defense.release(gradients, [context()] * 3)
    mean = torch.stack([one["w"] for one in gradients]).mean(0)
    torch.testing.assert_close(sent["w"], mean.abs().max().expand(30))
    assert not defense.replica.adds_up()
    assert torch.equal(defense.replica.replicate(gradients, sent)["w"], sent["w"])


class Doubled(Clip):
    """A clip with a replica that is none."""

    def replicate(self, gradient: Gradient, observed: Gradient | None) -> Gradient:
        return each(lambda tensor: tensor + tensor.mean(), gradient)


def test_an_inherited_kind_is_not_that_of_another_replica() -> None:
    assert Clip.replica_kind == "scaling"
    assert Doubled.replica_kind == "whole"
    assert Pipeline([Doubled(bound=1.0)]).replica.value_wise() is None


def test_a_defense_and_its_model_are_let_go_at_once() -> None:
    gc.disable()
    try:
        kept = weakref.ref(Pipeline([Clip(bound=1.0), OwnNoise(std=1), Sign()]))
    finally:
        gc.enable()
    assert kept() is None


# The room.


def classes() -> list[type]:
    return [
        thing
        for module in MODULES
        for thing in vars(module).values()
        if inspect.isclass(thing) and thing.__module__ == module.__name__
    ]


def methods(kind: type) -> Sequence[str]:
    """Its own, and those that it inherits from classes of the room that are no steps."""
    whole = {
        name
        for base in kind.__mro__
        if base is kind or (base.__module__.startswith("ggl_audit") and not issubclass(kind, Step))
        for name, thing in vars(base).items()
        if not name.startswith(("_", "model_"))
        and (inspect.isfunction(thing) or isinstance(thing, property | classmethod))
    }
    return sorted(whole)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_no_class_has_many_methods(kind: type) -> None:
    assert len(methods(kind)) <= MOST_METHODS, methods(kind)


def test_a_place_asks_for_little() -> None:
    for place in (DataDefense, ggl_audit.defenses.ModelDefense, Defense, Aggregation):
        assert len(place.__abstractmethods__) <= 2
        assert len(methods(place)) <= 5


def test_nobody_asks_which_step_it_is() -> None:
    """But the recipes, that say which steps they are, nothing knows a step by its class."""
    concrete = {kind.__name__ for kind in shipped().values()}
    asked = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("is"):
                names = [name for given in node.args[1:] for name in ast.walk(given)]
                asked |= {name.id for name in names if isinstance(name, ast.Name)}
            if isinstance(node, ast.Compare):
                assert ".name ==" not in ast.unparse(node), (file, ast.unparse(node))
    assert {"HasLikelihood", "AddsNoise"} <= asked
    assert not asked & concrete
