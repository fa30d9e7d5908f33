"""What a client can do to a gradient before it leaves, one defense a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ggl_audit.basics.validation import first_problem
from ggl_audit.defenses.aggregation import Aggregation, SecureAggregation
from ggl_audit.defenses.ats import Ats
from ggl_audit.defenses.base import FALSE_ACCUSATION, BeforeGradient, Check, Context, Defense, Drawn
from ggl_audit.defenses.clip import Clip, is_per_sample
from ggl_audit.defenses.encryption import Encryption
from ggl_audit.defenses.federated_dropout import FederatedDropout
from ggl_audit.defenses.float_format import FloatFormat
from ggl_audit.defenses.mixup import Mixup
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.pipeline import Pipeline, noise_norm, relative_l2
from ggl_audit.defenses.precode import Precode
from ggl_audit.defenses.qsgd import Qsgd
from ggl_audit.defenses.quantize import Quantize
from ggl_audit.defenses.random_k import RandomK
from ggl_audit.defenses.recipes import DPSGD, DPFedAvg, Recipe
from ggl_audit.defenses.sec_adam import SecAdam
from ggl_audit.defenses.sensitivity import GaussianMechanism
from ggl_audit.defenses.sign import Sign
from ggl_audit.defenses.soteria import Soteria
from ggl_audit.defenses.sparsify import Sparsify
from ggl_audit.defenses.terngrad import TernGrad
from ggl_audit.defenses.threshold import Threshold
from ggl_audit.errors import SpecError, nearest
from ggl_audit.inputs.factories import find_callable
from ggl_audit.spec import DefenseSpec

REGISTRY: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        Ats,
        Clip,
        Encryption,
        FederatedDropout,
        FloatFormat,
        Mixup,
        Noise,
        Precode,
        Qsgd,
        Quantize,
        RandomK,
        SecAdam,
        SecureAggregation,
        Sign,
        Soteria,
        Sparsify,
        TernGrad,
        Threshold,
    )
}

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (DPSGD, DPFedAvg)}

BEFORE_GRADIENT, SAMPLE, GRADIENT, AGGREGATION = range(4)

__all__ = [
    "DPSGD",
    "FALSE_ACCUSATION",
    "RECIPES",
    "REGISTRY",
    "Aggregation",
    "Ats",
    "BeforeGradient",
    "Check",
    "Clip",
    "Context",
    "DPFedAvg",
    "Defense",
    "Drawn",
    "Encryption",
    "FederatedDropout",
    "FloatFormat",
    "GaussianMechanism",
    "Mixup",
    "Noise",
    "Pipeline",
    "Precode",
    "Qsgd",
    "Quantize",
    "RandomK",
    "Recipe",
    "SecAdam",
    "SecureAggregation",
    "Sign",
    "Soteria",
    "Sparsify",
    "TernGrad",
    "Threshold",
    "build_pipeline",
    "is_own",
    "noise_norm",
    "relative_l2",
]


def build_pipeline(
    declared: Sequence[DefenseSpec], folder: Path = Path(), samples: int = 1
) -> Pipeline:
    """Builds the declared steps.

    Args:
        declared: names or factories, with their parameters.
        folder: where factories are looked up.
        samples: of a client, over which its loss is averaged; 1 for a sum.

    Raises:
        SpecError: a name is unknown, a parameter is unknown, missing or out of range, a factory
            fails, or the steps are in an order that no client can have.
    """
    steps: list[Defense] = []
    for index, step in enumerate(declared):
        parameters = step.model_extra or {}
        if step.factory is not None:
            steps.append(_own(index, step.factory, parameters, folder))
            continue
        assert step.name is not None
        kind = REGISTRY.get(step.name) or RECIPES.get(step.name)
        if kind is None:
            raise SpecError(
                ("defense", index, "name"),
                f"there is no defense {step.name!r}",
                nearest(step.name, [*REGISTRY, *RECIPES]),
            )
        try:
            built = kind.model_validate(parameters)
        except ValidationError as error:
            raise _wrong_parameter(index, kind, error) from None
        steps += built.steps(samples) if isinstance(built, Recipe) else [built]
    _check_order(steps)
    return Pipeline(steps)


def is_own(step: Defense) -> bool:
    """Whether it is a user's own."""
    return type(step) not in REGISTRY.values()


def _own(index: int, factory: str, parameters: dict[str, Any], folder: Path) -> Defense:
    key = ("defense", index, "factory")
    try:
        step = find_callable(factory, folder, key)(**parameters)
    except SpecError:
        raise
    except ValidationError as error:
        place, problem, remedy = first_problem(error, lambda _: [])
        raise SpecError(("defense", index, *place), problem, remedy) from None
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a fault in the input, told without a traceback.
        raise SpecError(key, f"{factory} failed with {type(error).__name__}: {error}") from error
    if not isinstance(step, Defense):
        raise SpecError(
            key,
            f"{factory} returned a {type(step).__name__}; expected a ggl_audit.defenses.Defense",
        )
    if not isinstance(getattr(step, "name", None), str):
        raise SpecError(key, f"{factory} has no name", 'Give it: name: ClassVar[str] = "own".')
    return step


def _check_order(steps: Sequence[Defense]) -> None:
    places = [_place(step) for step in steps]
    for index, (first, second) in enumerate(itertools.pairwise(places)):
        if first > second and not (first == AGGREGATION and second == GRADIENT):
            raise SpecError(
                ("defense",),
                f"{steps[index + 1]} cannot come after {steps[index]}",
                "First what changes images and model, then what is done to each sample's "
                "gradient, then to the client's, then the aggregation, then to the mean.",
            )
    if places.count(AGGREGATION) > 1:
        raise SpecError(("defense",), "aggregates twice; declare the whole cohort in one step")


def _place(step: Defense) -> int:
    if isinstance(step, BeforeGradient):
        return BEFORE_GRADIENT
    if is_per_sample(step):
        return SAMPLE
    return AGGREGATION if isinstance(step, Aggregation) else GRADIENT


def _wrong_parameter(
    index: int, kind: type[Defense] | type[Recipe], error: ValidationError
) -> SpecError:
    key, problem, remedy = first_problem(error, lambda _: kind.model_fields)
    takes = f"{kind.name} takes {', '.join(kind.model_fields) or 'no parameters'}."
    return SpecError(("defense", index, *key), problem, remedy or takes)
