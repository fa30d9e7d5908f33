"""What a report takes for granted, in the words of the threat model."""

from __future__ import annotations

from ggl_audit.setting import Setting


def assumptions(setting: Setting) -> list[str]:
    """Lists what was assumed and not measured, one sentence each."""
    spec, model = setting.spec, setting.model
    evidence = spec.evidence
    said = [
        "The attacker is the server: it sees this gradient, knows the model, its loss, and the "
        "declared defense with its parameters, but not the client's randomness.",
        f"The capture is the gradient of one image in one step, model in {spec.model.mode} mode, "
        f"cross-entropy times {spec.model.loss.scale:g}, images normalized with mean "
        f"{spec.model.input.mean} and std {spec.model.input.std}.",
        f"The private images are like those of {setting.reference.source}; the rates are measured "
        "on canaries from there, with candidates of the canary's own class.",
    ]
    if spec.prior.bundled is not None and spec.prior.bundled == evidence.reference.bundled:
        said.append("The prior has seen none of the reference images: the parts are disjoint.")
    else:
        said.append(
            f"Whether {setting.prior.source} was trained on any of the reference images is not "
            "known; if it was, the floor is too high."
        )
    if spec.capture.labels == "infer":
        said.append(f"The captured image's label is {setting.label}, as inferred.")
    else:
        said.append("The attacker knows the label.")
    if spec.model.weights is None:
        said.append(
            f"The model's weights are those that {spec.model.factory} makes by itself; no weights "
            "file was given."
        )
    if spec.capture.stage == "raw" and setting.defense.steps:
        said.append(f"The client applies {setting.defense} as this tool does.")
    said += [
        f"The client applied {check.step}: {check.detail}, so the capture cannot show it."
        for check in setting.checks
        if check.outcome == "hidden"
    ]
    if setting.defense.guarantee() is not None:
        said.append(
            "The guarantee is for one image and one release; over several rounds it weakens."
        )
    said.append(
        f"The floor is that of one attack, {spec.attack.optimizer} with "
        f"{spec.attack.evaluations} evaluations on {setting.prior.source}; others may do better. "
        f"The ceiling is about identification among {evidence.candidates} same-class images."
    )
    if model.head is None and spec.capture.labels != "infer":
        said.append("The model has no linear head: label recovery was not measured.")
    return said
