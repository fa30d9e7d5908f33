"""What a client can do to a gradient before it leaves, one defense a file."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from ggl_audit.defenses.base import FALSE_ACCUSATION, Check, Context, Defense
from ggl_audit.defenses.clip import Clip
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.pipeline import GaussianMechanism, Pipeline, noise_norm, relative_l2
from ggl_audit.defenses.quantize import Quantize
from ggl_audit.defenses.sign import Sign
from ggl_audit.defenses.sparsify import Sparsify
from ggl_audit.errors import SpecError, nearest
from ggl_audit.spec import DefenseSpec
from ggl_audit.validation import first_problem

REGISTRY: dict[str, type[Defense]] = {
    defense.name: defense for defense in (Clip, Noise, Quantize, Sign, Sparsify)
}

__all__ = [
    "FALSE_ACCUSATION",
    "REGISTRY",
    "Check",
    "Clip",
    "Context",
    "Defense",
    "GaussianMechanism",
    "Noise",
    "Pipeline",
    "Quantize",
    "Sign",
    "Sparsify",
    "build_pipeline",
    "noise_norm",
    "relative_l2",
]


def build_pipeline(declared: Sequence[DefenseSpec]) -> Pipeline:
    """Builds the declared steps.

    Raises:
        SpecError: a name is unknown, or a parameter is unknown, missing or out of range.
    """
    steps = []
    for index, step in enumerate(declared):
        kind = REGISTRY.get(step.name)
        if kind is None:
            raise SpecError(
                ("defense", index, "name"),
                f"there is no defense {step.name!r}",
                nearest(step.name, REGISTRY),
            )
        try:
            steps.append(kind.model_validate(step.model_extra or {}))
        except ValidationError as error:
            raise _wrong_parameter(index, kind, error) from None
    return Pipeline(steps)


def _wrong_parameter(index: int, kind: type[Defense], error: ValidationError) -> SpecError:
    key, problem, remedy = first_problem(error, lambda _: kind.model_fields)
    takes = f"{kind.name} takes {', '.join(kind.model_fields) or 'no parameters'}."
    return SpecError(("defense", index, *key), problem, remedy or takes)
