"""What the declared defense promises."""

from __future__ import annotations

from ggl_audit.defenses import Pipeline
from ggl_audit.errors import SpecError
from ggl_audit.evidence.guarantee import Guarantee, account
from ggl_audit.inputs.model import ClientModel
from ggl_audit.messages import Message
from ggl_audit.spec import Spec

NOT_PRIVATE = Message(
    "guarantee/not-private",
    "declared, but the defense ({defense}) is not differentially private for one {unit}",
    "That takes a clip of each {unit}'s share and Gaussian noise after it.",
    advice="Declare a clip of each unit's share and Gaussian noise after it, or leave out "
    "`guarantee`.",
)
COHORTS_MEAN = Message(
    "guarantee/cohorts-mean",
    "{reduction}, but a cohort's mean is what is seen",
    advice="Set `guarantee.reduction` to what the noise is added to.",
)
OTHER_REDUCTION = Message(
    "guarantee/other-reduction",
    "{reduction}, but model.loss.reduction is {declared}",
    advice="Set `guarantee.reduction` to what the noise is added to.",
)


def guarantee_of(spec: Spec, model: ClientModel, defense: Pipeline) -> Guarantee | None:
    """The guarantee that the declared defense gives, by the declared unit and rounds.

    Raises:
        SpecError: it gives none, or not the one that is declared.
    """
    declared = spec.guarantee
    if declared is None:
        return None
    mechanism = defense.sensitivity.guarantee(declared.unit)
    if mechanism is None:
        raise SpecError(("guarantee",), NOT_PRIVATE(defense=defense, unit=declared.unit))
    capture = spec.capture
    if defense.aggregation.clients > 1 and declared.reduction != "mean":
        raise SpecError(("guarantee", "reduction"), COHORTS_MEAN(reduction=declared.reduction))
    if capture.batch_size > 1 and declared.reduction != spec.model.loss.reduction:
        raise SpecError(
            ("guarantee", "reduction"),
            OTHER_REDUCTION(reduction=declared.reduction, declared=spec.model.loss.reduction),
        )
    # The mechanism's bound is on a share in the captured release; a step of the client's own code
    # may have more images.
    alone = spec.client is None or capture.batch_size > 1
    batch_size = 1 if alone or spec.client is None else spec.client.batch_size
    return account(mechanism, declared, batch_size, 1 / spec.evidence.candidates)
