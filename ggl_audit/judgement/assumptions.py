"""What a report takes for granted, in the words of the threat model."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ggl_audit.attacks.ggl import searched_by
from ggl_audit.attacks.suite import Suite
from ggl_audit.case.case import Case
from ggl_audit.client.local_training import described
from ggl_audit.defenses.capabilities import Encrypts
from ggl_audit.evidence.consistency import PRIVATE_IMAGE
from ggl_audit.evidence.last_layer import MODEL_AND_LOSS
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.square_layers import LAYOUT, square_layers
from ggl_audit.inputs.layouts import CHANNELS_LAST
from ggl_audit.inputs.model import in_other_mode

MOST_NAMES = 5
TWO, COLOURS = 2, 3
COARSE = 1e-4


class Assumptions(BaseModel):
    """What is assumed and not measured, a sentence each.

    Attributes:
        always: whatever comes out.
        if_like: only if the capture is like the canaries' gradients.
        unless_like: only if it is not, or that is not known.
    """

    model_config = ConfigDict(frozen=True)

    always: list[str]
    if_like: list[str]
    unless_like: list[str]

    def of(self, likeness: Likeness | None) -> list[str]:
        """Those that hold for a capture that is so like the canaries' gradients."""
        if likeness is not None and likeness.outcome == "like":
            return [*self.always, *self.if_like]
        said = [*self.always, *self.unless_like]
        if likeness is not None and likeness.outcome == "hidden":
            said.append(
                "That the capture belongs to the declared weights, mode, loss and normalization is "
                f"taken for granted: {likeness.detail}."
            )
        return said


def assumptions(case: Case, suite: Suite) -> Assumptions:
    """Lists what is assumed and not measured."""
    spec = case.spec
    evidence = spec.evidence
    said = [
        "The attacker is the server: it sees this gradient, knows the model, its loss, and the "
        "declared defense with its parameters, but not the client's randomness.",
        f"The capture is {_release(case)}, model in {spec.model.mode} mode{_apart(case)}, "
        f"{_loss(case)} times {spec.model.loss.scale:g}, images normalized with mean "
        f"{spec.model.input.mean} and std {spec.model.input.std}{_channels(case)}.",
        *_parts(case),
        *_training(case),
        *_cohort(case),
    ]
    if evidence.reference is None:
        said.append(
            f"No reference set was given: canaries and candidates are {case.reference.source}. "
            "They are within its reach, so the floor is too high for images that are not; and they "
            "may be more alike than real images are, so a low ceiling is no pass."
        )
    else:
        said.append(
            f"The private images are like those of {case.reference.source}; the rates are "
            f"measured on canaries from there, with candidates {_alike(case)}."
        )
        said.append(_seen(case))
    said += [f"{doubt.text[:1].upper()}{doubt.text[1:]}." for doubt in case.prior.doubts]
    if spec.capture.labels == "infer":
        said.append(_inferred(case))
        if case.model.classes <= TWO:
            said.append(
                "With two classes the other sign of a gradient looks like the other label; the "
                "capture is taken to have the declared sign."
            )
    else:
        known = "label" if spec.capture.targets is None else "target"
        said.append(f"The attacker knows the {known}{'s' if case.members > 1 else ''}.")
    if spec.model.weights is None:
        said.append(
            f"The model's weights are those that {spec.model.origin} has by itself; no weights "
            "file was given."
        )
    if spec.capture.stage == "raw" and case.defense.steps:
        said.append(f"The client applies {case.defense} as this tool does.")
    said += [
        f"The client applied {check.step}: {check.detail}, so the capture cannot show it."
        for check in case.audited.checks
        if check.outcome == "hidden"
    ]
    said += _guarantee(case)
    if spec.client is None:
        said.append("Canaries' gradients are defended by this tool, as declared.")
    else:
        said.append(
            f"Canaries' gradients are made by the client's own code ({spec.client.step}), in "
            f"batches of {spec.client.batch_size}, of which the attacker knows all but one image."
        )
    search = searched_by(case)
    said.append(
        f"The floor is that of {_attacks(suite.names)}, the search by {search.optimizer} with "
        f"{search.evaluations} evaluations on {case.prior.source}; others may do better. "
        f"The ceiling is about identification among {evidence.candidates} same-class images."
    )
    like = (
        "The capture is like the canaries' gradients in every tensor that tells; a slightly "
        f"different normalization{_scale(case)}{_colours(case)} may be too small to show."
    )
    return Assumptions(always=said, if_like=[like], unless_like=_layout(case))


def _attacks(names: Sequence[str]) -> str:
    return "one attack" if len(names) == 1 else f"the strongest of {len(names)} attacks"


def _release(case: Case) -> str:
    spec, clients = case.spec, case.defense.aggregation.clients
    images = f"{spec.capture.batch_size} images" if spec.capture.batch_size > 1 else "one image"
    if spec.capture.kind == "update":
        one = f"the update of a client's local training on {images}"
    else:
        reduction = f", their {spec.model.loss.reduction}" if spec.capture.batch_size > 1 else ""
        one = f"the gradient of {images} in one step{reduction}"
    return one if clients == 1 else f"{one}, averaged over {clients} clients"


def _loss(case: Case) -> str:
    loss = case.spec.model.loss
    more = {"label smoothing": loss.label_smoothing, "weights": loss.weight or loss.pos_weight}
    given = [f"{name} {value}" for name, value in more.items() if value]
    said = f"{loss} with {' and '.join(given)}" if given else str(loss)
    if case.model.whole:
        return f"{said} of all that it returns"
    place = case.model.output
    return said if place is None else f"{said} of {place!r} of what it returns"


def _apart(case: Case) -> str:
    """The layers that are in another mode than the model, whoever put them there."""
    mode = case.spec.model.mode
    names = in_other_mode(case.model.module, mode)
    return f" (but for {_listed(names)})" if names else ""


def _alike(case: Case) -> str:
    if case.reference.one_group:
        return "that are all given the canary's own target"
    return "of the canary's own class"


def _training(case: Case) -> list[str]:
    local = case.spec.capture.local
    if local is None:
        return []
    size = local.batch_size or case.spec.capture.batch_size
    said = (
        f"The attacker knows how a client trains: {local.epochs} epochs in batches of {size}, "
        f"{described(local)}"
    )
    if local.remembers and local.fresh:
        said += ", whose state is taken to start afresh in each round"
    if case.members == 1:
        return [f"{said}."]
    known = "the order of its images" if local.order == "fixed" else "not the order of its images"
    return [f"{said}; and {known}."]


def _cohort(case: Case) -> list[str]:
    said = []
    if case.members > 1:
        said.append(
            f"For the ceiling the attacker knows all {case.members - 1} other images of the "
            "release (the informed adversary), which bounds everybody who knows less; for the "
            "floor and for membership it knows none."
        )
    clients = case.defense.aggregation.clients
    if clients > 1:
        said.append(
            f"The aggregate is over {clients} honest clients; nothing in it shows how many they "
            "are."
        )
    said += [
        f"{step.key_holder} holds the key; whoever lacks it sees nothing that is measured here."
        for step in case.defense.steps
        if isinstance(step, Encrypts)
    ]
    rounds = case.defense.earlier_rounds
    if rounds:
        said.append(
            f"{case.defense} carries something over from {rounds} earlier rounds, here on "
            "reference images at the same weights; the attacker knows nothing of it."
        )
    return said


def _inferred(case: Case) -> str:
    if case.members == 1:
        return f"The captured image's label is {case.audited.labels[0]}, as inferred."
    labels = ", ".join(map(str, case.audited.labels))
    if case.audited.labels_in_doubt:
        reason = case.audited.labels_in_doubt[0]
        return f"The captured images' labels are inferred, in doubt: {labels}; {reason}."
    return f"The captured images' labels are {labels}, as inferred."


def _seen(case: Case) -> str:
    source, prior = case.reference.source, case.prior
    if prior.seen is None:
        return (
            f"Whether {prior.source} was trained on any of the reference images is not known; if "
            "it was, the floor is too high."
        )
    if case.left_out:
        return (
            f"{prior.source} was trained on {case.left_out} images of {source}; these are "
            "neither canaries nor candidates."
        )
    return f"None of the reference images is among those that {prior.source} was trained on."


def _guarantee(case: Case) -> list[str]:
    guarantee = case.guarantee
    if guarantee is None:
        return []
    rounds = "one release" if guarantee.rounds == 1 else f"{guarantee.rounds} rounds"
    said = f"The guarantee is for adding or removing one {guarantee.unit}, over {rounds}"
    if guarantee.sampling_rate < 1:
        said += (
            f", each {guarantee.unit} taking part with probability {guarantee.sampling_rate:g}, "
            "drawn independently in every round (Poisson sampling; shuffled batches are not "
            "covered)"
        )
    return [f"{said}. The measured rates are for one release that the image takes part in."]


def _parts(case: Case) -> list[str]:
    """What of the model is in the capture, and what else the file held."""
    captured, said = case.audited.fitted, []
    if captured.how != "name":
        said.append(f"The file's tensors were matched with the model's by {captured.how}.")
    fixed = [n for n, _ in case.model.module.named_parameters() if n in case.model.constants]
    silent = [name for name in fixed if name not in captured.unsent]
    if silent:
        said.append(
            f"Not trained, or trained and never sent: {_listed(silent)}. The declared steps "
            "are taken to act on what is sent alone."
        )
    if captured.unsent:
        said.append(
            f"Not in the file, and so taken for never sent: {_listed(captured.unsent)}. Declare "
            "capture.unsent if that is so."
        )
    said += beside(case)
    if captured.rounding > COARSE:
        said.append(f"The file's numbers are rounded to {captured.rounding:.1g} of their size.")
    return said


def beside(case: Case) -> list[str]:
    """What was sent beside the trained parameters, or may have been, and what became of it."""
    found, declared, said = case.audited.fitted.beside, case.spec.capture, []
    if found.statistics:
        names = _listed([*found.statistics])
        if case.defense.clear.is_over_everything:
            how = "under the declared steps like the parameters"
        elif case.defense.steps:
            how = "in the clear, as no declared step is over them"
        else:
            how = "as they are"
        said.append(
            f"The client's running statistics are sent too, {how}, and are observed with the "
            f"gradient: {names}."
        )
    said += [
        f"Sent too, and not measured: {kind}, {_listed(names)}."
        for kind, names in found.unmeasured.items()
    ]
    if found.idle:
        said.append(f"In the file as it was before: {_listed(found.idle)}.")
    if found.silent:
        said.append(f"Not in the file, and not declared as never sent: {_listed(found.silent)}.")
    unsent = sorted(case.model.unsent)
    if unsent:
        said.append(f"Never sent, as capture.unsent says: {_listed(unsent)}.")
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in declared.ignored)
    if found.ignored:
        said.append(
            f"Sent too, and left out as capture.ignored says: {_listed(found.ignored)} ({reasons})."
        )
    return said


def _layout(case: Case) -> list[str]:
    """Which matrices may be transposed, as far as anything tells."""
    square = square_layers(case.audited.fitted.gradient)
    told = {check.step for check in case.audited.checks if check.outcome != "hidden"}
    declared = case.spec.capture.layout == CHANNELS_LAST
    if not square or declared or told & {LAYOUT, PRIVATE_IMAGE}:
        return []
    return [
        f"Whether {_listed(square)} is (out, in) or transposed is ambiguous, as it is square and "
        "nothing else tells; PyTorch's layout is taken for granted."
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"


def _scale(case: Case) -> str:
    agrees = any(c.step == MODEL_AND_LOSS and c.outcome == "agrees" for c in case.audited.checks)
    return "" if agrees and case.members == 1 else ", or a loss scaled by a constant,"


def _channels(case: Case) -> str:
    declared = case.spec.model.input
    return f", channels in the order {declared.channels}" if declared.shape[0] == COLOURS else ""


def _colours(case: Case) -> str:
    return " or another order of the channels" if case.model.shape[0] == COLOURS else ""
