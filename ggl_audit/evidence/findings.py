"""Findings: what a reviewer has to act on, each with a stable id and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ggl_audit.defenses import Check
from ggl_audit.evidence.bounds import (
    Rate,
    ReconstructionRate,
    empirical_mu,
    trials_needed,
)
from ggl_audit.evidence.grade import (
    LITTLE_LEAKAGE,
    NO_LEAKAGE,
    PARTLY_RECONSTRUCTED,
    reconstructed,
)
from ggl_audit.evidence.guarantee import Guarantee
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import MOST_SAID, NoiseTest

Severity = Literal["critical", "high", "medium", "low"]


class Finding(BaseModel):
    """One thing that was found.

    Attributes:
        id: GGL001 to GGL008, stable over versions.
        severity: critical, high, medium or low.
        title: what it is.
        detail: the measured figures.
        remedy: what to do about it.
    """

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, Field(pattern=r"^GGL\d{3}$")]
    severity: Severity
    title: str
    detail: str
    remedy: str


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
) -> list[Finding]:
    """Collects the findings, the gravest first.

    Args:
        floor: canaries reconstructed beyond the null control.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred from their defended gradient.
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
    """
    findings = [
        *_capture(checks),
        *_likeness(likeness),
        *_noise(noise, guarantee),
        *_promise(ceiling, promise, guarantee),
        *_claim(guarantee),
        *_uncovered(guarantee, in_the_clear),
        *_recovered(recovered),
        *_exact(exact),
        *_floor(floor),
        *_ceiling(ceiling, members),
        *_membership(membership),
        *_label(label),
        *_attack(undefended),
    ]
    gravity = {"critical": 0, "high": 1, "medium": 2, "low": 3}
    return sorted(findings, key=lambda finding: (gravity[finding.severity], finding.id))


def _capture(checks: Sequence[Check]) -> list[Finding]:
    return [
        Finding(
            id="GGL005",
            severity="critical",
            title="The capture contradicts the declaration",
            detail=f"{check.step}: {check.detail}.",
            remedy="Find out which of the two is wrong: the client's implementation, or the "
            "declaration (defense, capture.stage, the model with its weights, mode, loss and "
            "normalization). Until then nothing here speaks of the client.",
        )
        for check in checks
        if check.outcome == "contradicts"
    ]


def _likeness(likeness: Likeness | None) -> list[Finding]:
    if likeness is None or likeness.outcome != "unlike":
        return []
    return [
        Finding(
            id="GGL005",
            severity="high",
            title="The capture is unlike the canaries' gradients",
            detail=f"Under the declaration {likeness.detail}. Likely cause: {likeness.cause}.",
            remedy="Look at the likely cause first, then at the model's weights and round, mode, "
            "loss and normalization, and at the names and order in the capture. Rates of canaries "
            "do not speak for a capture that is not of their kind.",
        )
    ]


def _noise(noise: NoiseTest | None, guarantee: Guarantee | None) -> list[Finding]:
    if noise is None or not noise.violations:
        return []
    share = [one.detail for one in noise.violations if one.fault == "share"]
    own = [one.detail for one in noise.violations if one.fault != "share"]
    # More noise than declared is another declaration, and breaks no promise.
    breaks = any(one.fault not in ("share", "excess") for one in noise.violations)
    found = []
    if own:
        found.append(
            Finding(
                id="GGL006" if breaks and guarantee is not None else "GGL005",
                severity="critical",
                title="The noise is not what was declared",
                detail=f"In {noise.releases} releases of the client's own code on public images "
                f"{'; '.join(own[:MOST_SAID])}.",
                remedy="Noise protects as declared only if it is drawn anew for every release and "
                "every value, independently, everywhere, and from the declared distribution: look "
                "at the seed of the generator, at what is reused or left out, and at the precision "
                "in which it is drawn.",
            )
        )
    if share:
        found.append(
            Finding(
                id="GGL005",
                severity="critical",
                title="The client's own code contradicts the declaration",
                detail=f"In {noise.releases} releases on public images {share[0]}.",
                remedy="Compare the clip, its bound and its unit, the loss' scale and the model's "
                "mode in the client's code with what is declared.",
            )
        )
    return found


def promise_is_broken(
    ceiling: Rate | None, promise: Rate | None, guarantee: Guarantee | None
) -> bool:
    """Whether more is identified than the guarantee allows, or a smaller epsilon is claimed."""
    return bool(_promise(ceiling, promise, guarantee) or _claim(guarantee))


def _promise(
    ceiling: Rate | None, promise: Rate | None, guarantee: Guarantee | None
) -> list[Finding]:
    rates = [rate for rate in (promise, ceiling) if rate is not None]
    if guarantee is None or not rates:
        return []
    rate = max(rates, key=empirical_mu)
    if empirical_mu(rate) <= guarantee.mu:
        return []
    how = "Worst-case images are" if rate is promise else "Canaries are"
    return [
        Finding(
            id="GGL006",
            severity="critical",
            title="The promise of differential privacy is contradicted",
            detail=f"{how} identified {rate.successes} of {rate.trials} times among "
            f"{round(1 / rate.chance)} candidates, so mu is at least {empirical_mu(rate):.2f}; the "
            f"declared defense promises {guarantee.mu:.2f}.",
            remedy="The defense does not keep its promise: look at whether noise is added at all, "
            "at the order of clip and noise, at the unit that is clipped (each sample, not the "
            "batch), and at the scale of the noise.",
        )
    ]


def _claim(guarantee: Guarantee | None) -> list[Finding]:
    if guarantee is None or not guarantee.claims_too_much:
        return []
    return [
        Finding(
            id="GGL006",
            severity="critical",
            title="The claimed epsilon is not what the declared noise gives",
            detail=f"Epsilon {guarantee.claimed_epsilon:g} is claimed; the declared clip and noise "
            f"give {guarantee.epsilon:.3g} at delta {guarantee.delta:g} over {guarantee.rounds} "
            "rounds.",
            remedy="More noise, fewer rounds or a smaller sampling rate; or an honest epsilon.",
        )
    ]


def _uncovered(guarantee: Guarantee | None, in_the_clear: Sequence[str]) -> list[Finding]:
    if guarantee is None or not in_the_clear:
        return []
    more = f" and {len(in_the_clear) - 1} more" if len(in_the_clear) > 1 else ""
    return [
        Finding(
            id="GGL006",
            severity="critical",
            title="The promise does not cover all that is sent",
            detail=f"{in_the_clear[0]}{more} went in the clear beside what is clipped and noised; "
            "running statistics are means and variances of the images' features.",
            remedy="Do not send running statistics (group norm keeps none), or put them under the "
            "clip and the noise and declare over: everything.",
        )
    ]


def _recovered(recovered: bool) -> list[Finding]:
    if not recovered:
        return []
    return [
        Finding(
            id="GGL004",
            severity="high",
            title="The gradient is recovered exactly",
            detail="Adam's first moments were captured in the clear, and two in a row give the "
            "gradient between them: g = (m_t - beta1 m_(t-1)) / (1 - beta1). All else here is "
            "measured on that gradient, which nothing protects.",
            remedy="Send no moments in the clear; under secure aggregation only their ratio is "
            "seen (SecAdam).",
        )
    ]


def _exact(exact: bool) -> list[Finding]:
    if not exact:
        return []
    return [
        Finding(
            id="GGL004",
            severity="critical",
            title="The private image is read off the gradient exactly",
            detail="The model begins with a linear layer, whose gradient is the error of each unit "
            "times the image: divided by the gradient of the bias it is the image itself, whose "
            "own gradient is the captured one to rounding.",
            remedy="Do not send this layer's bias, begin with a layer that shares its weights, or "
            "add noise after a clip.",
        )
    ]


def _membership(membership: Rate | None) -> list[Finding]:
    if membership is None or membership.advantage_lower <= NO_LEAKAGE:
        return []
    return [
        Finding(
            id="GGL002",
            severity="high",
            title="Membership in the release is identifiable",
            detail=f"Knowing none of the other images, matching identifies {membership.successes} "
            f"of {membership.trials} canaries among {round(1 / membership.chance)} images of their "
            f"class (95 % interval {membership.lower:.0%} to {membership.upper:.0%}).",
            remedy="Aggregation alone does not hide who is in it. Use a larger cohort with noise "
            "in proportion to a clip.",
        )
    ]


def _floor(floor: ReconstructionRate | None) -> list[Finding]:
    taken = reconstructed(floor)
    if floor is None or taken is None:
        return []
    return [
        Finding(
            id="GGL001",
            severity="critical" if taken == "F" else "high",
            title="Private images are reconstructed",
            detail=f"{floor.successes} of {floor.trials} reconstructions are nearer to their "
            f"canary than to {round(1 / floor.chance) - 1} other images of its class, where the "
            f"null control's are not (95 % interval {floor.lower:.0%} to {floor.upper:.0%}, "
            f"chance {floor.chance:.0%}).",
            remedy="Do not send this gradient. Clip each sample and add Gaussian noise in "
            "proportion to the clip (DP-SGD), or aggregate securely over many images first.",
        )
    ]


def _ceiling(ceiling: Rate | None, members: int) -> list[Finding]:
    if ceiling is None:
        return []
    by = "the gradient alone" if members == 1 else "whoever knows all other images of the release"
    if ceiling.advantage_lower > NO_LEAKAGE:
        return [
            Finding(
                id="GGL002",
                severity="high",
                title="Images are identifiable by matching",
                detail=f"{ceiling.successes} of {ceiling.trials} canaries are identified among "
                f"{round(1 / ceiling.chance)} images of their class by {by} (95 % "
                f"interval {ceiling.lower:.0%} to {ceiling.upper:.0%}, chance "
                f"{ceiling.chance:.0%}); mu is at least {empirical_mu(ceiling):.2f}.",
                remedy="Whoever holds a list of suspects can tell which image was used, whatever "
                "the reconstructions look like. Only more noise or more images to a gradient help.",
            )
        ]
    if ceiling.advantage_lower <= 0 and ceiling.advantage_upper > LITTLE_LEAKAGE:
        needed = trials_needed(LITTLE_LEAKAGE, ceiling.chance)
    elif ceiling.advantage_lower <= 0 and ceiling.advantage_upper > NO_LEAKAGE:
        needed = trials_needed(NO_LEAKAGE, ceiling.chance)
    else:
        return []
    return [
        Finding(
            id="GGL008",
            severity="low",
            title="Not enough trials",
            detail=f"With {ceiling.trials} matching trials the advantage is only known to be below "
            f"{ceiling.advantage_upper:.2f}, although nothing above chance was seen.",
            remedy=f"A better grade takes about {needed} trials, if there is nothing to find: "
            f"--set evidence.matching_trials={needed}.",
        )
    ]


def _label(label: Rate | None) -> list[Finding]:
    if label is None or label.advantage_lower <= NO_LEAKAGE:
        return []
    return [
        Finding(
            id="GGL003",
            severity="medium",
            title="The label is recovered",
            detail=f"The label is read off the last layer's gradient for {label.successes} of "
            f"{label.trials} canaries (95 % interval {label.lower:.0%} to {label.upper:.0%}, "
            f"chance {label.chance:.0%}){_more_often(label)}.",
            remedy="If the label is itself sensitive (a diagnosis, say), treat it as disclosed.",
        )
    ]


def _more_often(label: Rate) -> str:
    more = "; a classifier of whole gradients may tell it more often"
    return more if label.successes < label.trials else ""


def _attack(undefended: Rate | None) -> list[Finding]:
    if undefended is None or undefended.advantage_lower > PARTLY_RECONSTRUCTED:
        return []
    return [
        Finding(
            id="GGL007",
            severity="medium",
            title="The attack is too weak to judge reconstructions",
            detail=f"Even without a defense its pictures identify only {undefended.successes} of "
            f"{undefended.trials} canaries (95 % interval {undefended.lower:.0%} to "
            f"{undefended.upper:.0%}, chance {undefended.chance:.0%}).",
            remedy="A low floor says nothing here; only the ceiling counts. Give a prior of the "
            "data's own domain, more attack.evaluations, or more evidence.control_trials.",
        )
    ]
