"""The steps that a spec declares, built; and the schema of what can be declared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ggl_audit.basics.validation import first_problem
from ggl_audit.defenses.base import Declared, Place, Step
from ggl_audit.defenses.pipeline import Pipeline
from ggl_audit.defenses.registry import known
from ggl_audit.errors import SpecError, nearest, raised
from ggl_audit.inputs.factories import FAILS, find_callable
from ggl_audit.messages import Message
from ggl_audit.spec import DefenseSpec

UNKNOWN_DEFENSE = Message(
    "defense/unknown-defense",
    "there is no defense {name!r}",
    "{nearest}",
    advice="Choose one of `ggl-audit list defenses`, or name your own by `factory`.",
)
WRITE_THE_CLASS = (
    "Write the class as in [the README](../README.md#what-a-client-can-do-and-what-is-captured): "
    "a `Defense` with a `name`, whose `apply` and `replicate` return tensors by the same names "
    "and shapes."
)
NO_DEFENSE = Message(
    "defense/no-defense",
    "{factory} returned a {kind}; expected a ggl_audit.defenses.Defense",
    advice=WRITE_THE_CLASS,
)
DEFENSE_WITHOUT_NAME = Message(
    "defense/without-name",
    "{factory} has no name",
    'Give it: name: ClassVar[str] = "own".',
    advice=WRITE_THE_CLASS,
)
CLIENTS_ORDER = (
    "Declare the steps in the client's order: images and model, each sample, the client's "
    "gradient, the aggregation, the mean."
)
OUT_OF_ORDER = Message(
    "defense/out-of-order",
    "{later} cannot come after {earlier}",
    "First what changes images and model, then what is done to each sample's gradient, then to "
    "the client's, then the aggregation, then to the mean.",
    advice=CLIENTS_ORDER,
)
AGGREGATES_TWICE = Message(
    "defense/aggregates-twice",
    "aggregates twice; declare the whole cohort in one step",
    advice=CLIENTS_ORDER,
)


def build_pipeline(
    declared: Sequence[DefenseSpec], folder: Path = Path(), samples: int = 1
) -> Pipeline:
    """Builds the declared steps.

    Args:
        declared: names or factories, with their parameters.
        folder: where factories are looked up.
        samples: of a client, over which its loss is averaged; 1 for a sum.

    Raises:
        AuditError: a name is unknown, a parameter is unknown, missing or out of range, a factory
            fails, the steps are in an order that no client can have, or what another package adds
            is broken.
    """
    kinds, steps = known(), list[Step]()
    for index, step in enumerate(declared):
        parameters = step.model_extra or {}
        if step.factory is not None:
            steps.append(_own(index, step.factory, parameters, folder))
            continue
        assert step.name is not None
        kind = kinds.get(step.name)
        if kind is None:
            raise SpecError(
                ("defense", index, "name"),
                UNKNOWN_DEFENSE(name=step.name, nearest=nearest(step.name, kinds)),
            )
        try:
            steps += kind.model_validate(parameters).as_steps(samples)
        except ValidationError as error:
            raise _wrong_parameter(index, kind, error) from None
    _check_order(steps)
    return Pipeline(steps)


def with_known_defenses(schema: dict[str, Any]) -> dict[str, Any]:
    """The spec's JSON Schema with what a step of the defense can be.

    That is each known defense with its parameters, or a factory with any.

    Args:
        schema: of the spec, as its class gives it.

    Raises:
        AuditError: what another package adds is broken.
    """
    definitions = dict(schema["$defs"])
    own = definitions["DefenseSpec"]
    nothing = {"type": "null"}
    choices = []
    for name, kind in sorted(known().items()):
        parameters = kind.model_json_schema()
        definitions = {**parameters.get("$defs", {}), **definitions}
        choices.append(
            {
                "title": name,
                "description": (kind.__doc__ or "").partition("\n")[0],
                "type": "object",
                "properties": {
                    **parameters.get("properties", {}),
                    "name": {"const": name},
                    "factory": nothing,
                },
                "required": ["name", *parameters.get("required", [])],
                "additionalProperties": False,
            }
        )
    factory = {**own["properties"]["factory"], "type": "string"}
    choices.append(
        {
            "title": "factory",
            "type": "object",
            "properties": {
                "name": nothing,
                "factory": {k: v for k, v in factory.items() if k not in ("anyOf", "default")},
            },
            "required": ["factory"],
        }
    )
    definitions["DefenseSpec"] = {
        "title": own["title"],
        "description": own["description"],
        "anyOf": choices,
    }
    return {**schema, "$defs": definitions}


def _own(index: int, factory: str, parameters: dict[str, Any], folder: Path) -> Step:
    key = ("defense", index, "factory")
    try:
        step = find_callable(factory, folder, key)(**parameters)
    except SpecError:
        raise
    except ValidationError as error:
        place, said = first_problem(error, lambda _: [])
        raise SpecError(("defense", index, *place), said) from None
    except (Exception, SystemExit) as error:
        # Whatever the user's own code raises is a fault in the input, told without a traceback.
        raise SpecError(key, FAILS(callable=factory, error=raised(error), how="")) from error
    if not isinstance(step, Step):
        raise SpecError(key, NO_DEFENSE(factory=factory, kind=type(step).__name__))
    if not isinstance(getattr(step, "name", None), str):
        raise SpecError(key, DEFENSE_WITHOUT_NAME(factory=factory))
    return step


def _check_order(steps: Sequence[Step]) -> None:
    places = [step.place for step in steps]
    for index, (first, second) in enumerate(itertools.pairwise(places)):
        on_mean = first is Place.AGGREGATE and second is Place.GRADIENT
        if first > second and not on_mean:
            raise SpecError(
                ("defense",), OUT_OF_ORDER(later=steps[index + 1], earlier=steps[index])
            )
    if places.count(Place.AGGREGATE) > 1:
        raise SpecError(("defense",), AGGREGATES_TWICE())


def _wrong_parameter(index: int, kind: type[Declared], error: ValidationError) -> SpecError:
    key, said = first_problem(error, lambda _: kind.model_fields)
    takes = f"{kind.name} takes {', '.join(kind.model_fields) or 'no parameters'}."
    return SpecError(("defense", index, *key), said if said.remedy else said.advising(takes))
