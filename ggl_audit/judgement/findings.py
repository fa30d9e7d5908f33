"""Findings: what a reviewer has to act on, each with a stable id and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import (
    Rate,
    ReconstructionRate,
    empirical_mu,
    trials_needed,
)
from ggl_audit.evidence.guarantee import Guarantee
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import MOST_SAID, NoiseTest
from ggl_audit.evidence.standing import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    RECONSTRUCTED,
    reconstructed,
)
from ggl_audit.experiments.label import INFERENCE
from ggl_audit.judgement import rules
from ggl_audit.judgement.rules import Question, Rule, Severity
from ggl_audit.messages import Said


class Finding(BaseModel):
    """One thing that was found.

    Attributes:
        id: GGL001 to GGL009, stable over versions.
        severity: critical, high, medium or low.
        question: what it is an answer to: image, label, membership, capture, promise or strength.
        title: what it is.
        detail: the measured figures.
        remedy: what to do about it.
    """

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, Field(pattern=r"^GGL\d{3}$")]
    severity: Severity
    question: Question
    title: str
    detail: str
    remedy: str

    @classmethod
    def of(cls, rule: Rule, detail: str, severity: Severity | None = None) -> Finding:
        """A finding of a kind, with its figures; as grave as the kind's gravest if not told."""
        return cls(
            id=rule.id,
            severity=severity or rule.severity,
            question=rule.question,
            title=rule.title,
            detail=detail,
            remedy=rule.remedy,
        )


def find(
    floor: ReconstructionRate | None,
    ceiling: Rate | None,
    label: Rate | None,
    undefended: Rate | None,
    checks: Sequence[Check],
    likeness: Likeness | None,
    guarantee: Guarantee | None,
    promise: Rate | None,
    membership: Rate | None = None,
    noise: NoiseTest | None = None,
    recovered: bool = False,
    members: int = 1,
    exact: bool = False,
    in_the_clear: Sequence[str] = (),
    label_ceiling: Rate | None = None,
    label_classifier: str = "",
    public_labels: Sequence[Said] = (),
) -> list[Finding]:
    """Collects the findings, the gravest first.

    Args:
        floor: canaries reconstructed beyond the null control.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred from the last layer of their defended gradient.
        undefended: canaries reconstructed without the defense.
        checks: the capture against each declared step.
        likeness: of the capture to the canaries' gradients.
        guarantee: of the declared defense.
        promise: worst-case images identified in what the client's own code sends.
        membership: canaries identified in releases whose other images are unknown.
        noise: what the noise of the client's own code is like.
        recovered: the gradient was computed exactly from what was captured.
        members: images that a release is made of.
        exact: the image was read off the captured gradient.
        in_the_clear: running statistics that are sent and no declared step is over.
        label_ceiling: canaries whose label the best classifier told.
        label_classifier: which that is.
        public_labels: what is wrong with the labels of the public images.
    """
    findings = [
        *_capture(checks),
        *_likeness(likeness),
        *_noise(noise, guarantee),
        *_promise(ceiling, promise, guarantee, label_ceiling),
        *_claim(guarantee),
        *_uncovered(guarantee, in_the_clear),
        *_recovered(recovered),
        *_exact(exact),
        *_floor(floor),
        *_ceiling(ceiling, members),
        *_membership(membership),
        *_label(label, label_ceiling, label_classifier),
        *_public_labels(public_labels),
        *_attack(undefended),
    ]
    gravity = {"critical": 0, "high": 1, "medium": 2, "low": 3}
    # First what says that canaries do not speak for the capture.
    return sorted(
        findings, key=lambda one: (gravity[one.severity], one.question != "capture", one.id)
    )


def _capture(checks: Sequence[Check]) -> list[Finding]:
    return [
        Finding.of(rules.CONTRADICTS, f"{check.step}: {check.detail}.")
        for check in checks
        if check.outcome == "contradicts"
    ]


def _likeness(likeness: Likeness | None) -> list[Finding]:
    if likeness is None or likeness.outcome != "unlike":
        return []
    detail = f"Under the declaration {likeness.detail}. Likely cause: {likeness.cause}."
    return [Finding.of(rules.UNLIKE, detail)]


def _noise(noise: NoiseTest | None, guarantee: Guarantee | None) -> list[Finding]:
    if noise is None or not noise.violations:
        return []
    share = [one.detail for one in noise.violations if one.fault == "share"]
    own = [one.detail for one in noise.violations if one.fault != "share"]
    # More noise than declared is another declaration, and breaks no promise.
    breaks = any(one.fault not in ("share", "excess") for one in noise.violations)
    found = []
    if own:
        rule = rules.BROKEN_NOISE if breaks and guarantee is not None else rules.OTHER_NOISE
        said = "; ".join(own[:MOST_SAID])
        detail = f"In {noise.releases} releases of the client's own code on public images {said}."
        found.append(Finding.of(rule, detail))
    if share:
        detail = f"In {noise.releases} releases on public images {share[0]}."
        found.append(Finding.of(rules.OTHER_CLIENT, detail))
    return found


def promise_is_broken(
    ceiling: Rate | None,
    promise: Rate | None,
    guarantee: Guarantee | None,
    label_ceiling: Rate | None = None,
) -> bool:
    """Whether more is told apart than the guarantee allows, or a smaller epsilon is claimed."""
    return bool(_promise(ceiling, promise, guarantee, label_ceiling) or _claim(guarantee))


def _promise(
    ceiling: Rate | None,
    promise: Rate | None,
    guarantee: Guarantee | None,
    label_ceiling: Rate | None,
) -> list[Finding]:
    rates = [rate for rate in (promise, ceiling, label_ceiling) if rate is not None]
    if guarantee is None or not rates:
        return []
    rate = max(rates, key=empirical_mu)
    if empirical_mu(rate) <= guarantee.mu:
        return []
    how = "Worst-case images are identified" if rate is promise else "Canaries are identified"
    among = f"{round(1 / rate.chance)} candidates"
    if rate is label_ceiling:
        how, among = "The label is told", f"{round(1 / rate.chance)} classes"
    detail = (
        f"{how} {rate.successes} of {rate.trials} times among {among}, so mu is at least "
        f"{empirical_mu(rate):.2f}; the declared defense promises {guarantee.mu:.2f}."
    )
    return [Finding.of(rules.BROKEN_PROMISE, detail)]


def _claim(guarantee: Guarantee | None) -> list[Finding]:
    if guarantee is None or not guarantee.claims_too_much:
        return []
    detail = (
        f"Epsilon {guarantee.claimed_epsilon:g} is claimed; the declared clip and noise give "
        f"{guarantee.epsilon:.3g} at delta {guarantee.delta:g} over {guarantee.rounds} rounds."
    )
    return [Finding.of(rules.CLAIM, detail)]


def _uncovered(guarantee: Guarantee | None, in_the_clear: Sequence[str]) -> list[Finding]:
    if guarantee is None or not in_the_clear:
        return []
    more = f" and {len(in_the_clear) - 1} more" if len(in_the_clear) > 1 else ""
    detail = (
        f"{in_the_clear[0]}{more} went in the clear beside what is clipped and noised; "
        "running statistics are means and variances of the images' features."
    )
    return [Finding.of(rules.UNCOVERED, detail)]


def _recovered(recovered: bool) -> list[Finding]:
    if not recovered:
        return []
    detail = (
        "Adam's first moments were captured in the clear, and two in a row give the gradient "
        "between them: g = (m_t - beta1 m_(t-1)) / (1 - beta1). All else here is measured on that "
        "gradient, which nothing protects."
    )
    return [Finding.of(rules.MOMENTS, detail)]


def _exact(exact: bool) -> list[Finding]:
    if not exact:
        return []
    detail = (
        "The model begins with a linear layer, whose gradient is the error of each unit times the "
        "image: divided by the gradient of the bias it is the image itself, whose own gradient is "
        "the captured one to rounding."
    )
    return [Finding.of(rules.READ_OFF, detail)]


def _membership(membership: Rate | None) -> list[Finding]:
    if membership is None or membership.advantage_lower <= NO_LEAKAGE:
        return []
    detail = (
        f"Knowing none of the other images, matching identifies {membership.successes} of "
        f"{membership.trials} canaries among {round(1 / membership.chance)} images of their class "
        f"(95 % interval {membership.lower:.0%} to {membership.upper:.0%})."
    )
    return [Finding.of(rules.MEMBERSHIP, detail)]


def _floor(floor: ReconstructionRate | None) -> list[Finding]:
    taken = reconstructed(floor)
    if floor is None or taken is None:
        return []
    detail = (
        f"{floor.successes} of {floor.trials} reconstructions are nearer to their canary than to "
        f"{round(1 / floor.chance) - 1} other images of its class, where the null control's are "
        f"not (95 % interval {floor.lower:.0%} to {floor.upper:.0%}, chance {floor.chance:.0%})."
    )
    return [Finding.of(rules.RECONSTRUCTED, detail, "critical" if taken == "F" else "high")]


def _ceiling(ceiling: Rate | None, members: int) -> list[Finding]:
    if ceiling is None:
        return []
    by = "the gradient alone" if members == 1 else "whoever knows all other images of the release"
    if ceiling.advantage_lower > NO_LEAKAGE:
        detail = (
            f"{ceiling.successes} of {ceiling.trials} canaries are identified among "
            f"{round(1 / ceiling.chance)} images of their class by {by} (95 % interval "
            f"{ceiling.lower:.0%} to {ceiling.upper:.0%}, chance {ceiling.chance:.0%}); mu is at "
            f"least {empirical_mu(ceiling):.2f}."
        )
        return [Finding.of(rules.IDENTIFIABLE, detail)]
    if ceiling.advantage_lower <= 0 and ceiling.advantage_upper > LITTLE_LEAKAGE:
        needed = trials_needed(LITTLE_LEAKAGE, ceiling.chance)
    elif ceiling.advantage_lower <= 0 and ceiling.advantage_upper > NO_LEAKAGE:
        needed = trials_needed(NO_LEAKAGE, ceiling.chance)
    else:
        return []
    detail = (
        f"With {ceiling.trials} matching trials the advantage is only known to be below "
        f"{ceiling.advantage_upper:.2f}, although nothing above chance was seen. About {needed} "
        f"would show it: --set evidence.matching_trials={needed}."
    )
    return [Finding.of(rules.FEW_TRIALS, detail)]


def _label(label: Rate | None, ceiling: Rate | None, classifier: str) -> list[Finding]:
    found = []
    if label is not None and label.advantage_lower > PARTLY_RECONSTRUCTED:
        detail = (
            f"The label is read off the last layer's gradient for {label.successes} of "
            f"{label.trials} canaries (95 % interval {label.lower:.0%} to {label.upper:.0%}, "
            f"chance {label.chance:.0%})."
        )
        severity: Severity = "critical" if label.advantage_lower > RECONSTRUCTED else "high"
        found.append(Finding.of(rules.LABEL, detail, severity))
    elif ceiling is not None and ceiling.advantage_lower > NO_LEAKAGE:
        learned = f"A classifier learned from public images ({classifier})"
        who = "Label inference" if classifier == INFERENCE else learned
        detail = (
            f"{who} tells the label of "
            f"{ceiling.successes} of {ceiling.trials} canaries (95 % interval "
            f"{ceiling.lower:.0%} to {ceiling.upper:.0%}, chance {ceiling.chance:.0%})."
        )
        found.append(Finding.of(rules.LABEL_TOLD, detail))
    return found


def _public_labels(wrong: Sequence[Said]) -> list[Finding]:
    return [
        Finding.of(rules.PUBLIC_LABELS, f"{one.text[:1].upper()}{one.text[1:]}.") for one in wrong
    ]


def _attack(undefended: Rate | None) -> list[Finding]:
    if undefended is None or undefended.advantage_lower > PARTLY_RECONSTRUCTED:
        return []
    detail = (
        f"Even without a defense its pictures identify only {undefended.successes} of "
        f"{undefended.trials} canaries (95 % interval {undefended.lower:.0%} to "
        f"{undefended.upper:.0%}, chance {undefended.chance:.0%})."
    )
    return [Finding.of(rules.WEAK_ATTACK, detail)]
