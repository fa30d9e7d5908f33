"""The report: the one source that every format is rendered from (``schema_version`` 1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ggl_audit.evidence.bounds import Rate, ReconstructionRate
from ggl_audit.evidence.fidelity import Fidelity
from ggl_audit.evidence.guarantee import Guarantee
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.inputs.png_uri import PngUri
from ggl_audit.judgement.declared import InputFile
from ggl_audit.judgement.findings import Finding
from ggl_audit.judgement.grade import Verdict
from ggl_audit.judgement.measured import LossPlace


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tool(_Part):
    """Which program wrote the report."""

    name: Literal["ggl-audit"] = "ggl-audit"
    version: str


class Reconstruction(_Part):
    """One of the pictures that a search found together.

    Attributes:
        image: PNG as a data URI.
        label: that it was drawn for.
        matching_loss: distance of the gradient of all of them to the capture, relative, with the
            regularizer.
        curve: the best loss of the latent search so far, by candidates evaluated.
        truth: the private image that it is compared with, by its place among them: of several
            pictures the Hungarian method assigns each to one, by the declared distance. None where
            they are not held.
        metrics: against that image.
        rank: of that image among the candidates, by the distance of the nearest picture to each of
            them, whichever was assigned to it; 1 is identified.
        matching_rank: of that image among the candidates by matching distance, without any picture,
            all other images of the release being known.
        candidates: N.
    """

    image: PngUri
    label: int
    matching_loss: float
    curve: list[tuple[Annotated[int, Field(ge=1)], float]]
    truth: Annotated[int, Field(ge=0)] | None = None
    metrics: Fidelity | None = None
    rank: int | None = None
    matching_rank: int | None = None
    candidates: int | None = None


class Agreement(_Part):
    """How alike the pictures of independent searches are, as mean PSNR between pairs, in dB.

    Attributes:
        searches: of the captured gradient, and as many of the random one.
        psnr_db: of the captured gradient's pictures.
        null_psnr_db: of the random gradient's.
    """

    searches: int
    psnr_db: float
    null_psnr_db: float


class Captured(_Part):
    """The captured gradient, and what came out of it.

    Attributes:
        file: as the spec names it.
        appearance: what it looks like, in sentences, where that can be told.
        labels: as inferred or declared.
        label_method: how they were found.
        norm: l2 norm of the defended gradient.
        truths: the private images as PNG data URIs; empty where they are not held.
        attack: the strongest on the canaries, whose pictures the reconstructions are; where none
            were attacked, that with the best matching distance.
        by_attack: the pictures of each attack.
        reconstructions: one for each image of the release, in the order of the truths.
        nulls: what the same attack makes of a random gradient of the same norm, likewise.
        agreement: between independent searches.
        loss_place: the matching loss among those of canaries and of random gradients.
        likeness: whether it is like the canaries' gradients, so that their rates speak for it.
        not_measured: the reason for what is null or missing.
    """

    file: str
    appearance: list[str] = []
    labels: list[int]
    label_method: str
    norm: float
    truths: list[PngUri] = []
    attack: str = "ggl"
    by_attack: dict[str, list[PngUri]] = {}
    reconstructions: list[Reconstruction] = []
    nulls: list[Reconstruction] = []
    agreement: Agreement | None = None
    loss_place: LossPlace | None = None
    likeness: Likeness | None = None
    not_measured: dict[str, str] = {}


class Attack(_Part):
    """What one attack takes from canaries.

    Attributes:
        name: ggl, refined or pixels.
        source: what it does, and where it is from.
        floor: canaries that it identified and its null control did not, by the declared distance.
        null: canaries that its null control identified.
        not_measured: why it was not made; empty where it was.
    """

    name: str
    source: str
    floor: ReconstructionRate | None = None
    null: ReconstructionRate | None = None
    not_measured: str = ""


class Controls(_Part):
    """What is known to have no answer, and what is known to have one.

    Attributes:
        null: the attack on random gradients of the same norm.
        undefended: the attack on canaries without the defense.
        undefended_matching: candidate matching on canaries without the defense.
    """

    null: ReconstructionRate | None = None
    undefended: ReconstructionRate | None = None
    undefended_matching: Rate | None = None


class CheckedStep(_Part):
    """One step of the declared defense against the capture.

    Attributes:
        code: of the message, by which docs/inputs.md has it.
        step: what was checked.
        outcome: what came of it.
        detail: the measured figure beside the declared one.
    """

    code: str
    step: str
    outcome: Literal["agrees", "contradicts", "hidden"]
    detail: str


class EvidenceReport(_Part):
    """What the grade rests on; what was not measured is null, with the reason.

    Attributes:
        floor: canaries reconstructed beyond the null control by the strongest attack, by
            ``floor_distance``; its interval and p-value hold for all attacks together.
        attack: which attack that is.
        attacks: each of them.
        floor_distance: by which pictures pick candidates; declared before anything was measured.
        floor_by_distance: the floor by every distance that can be computed; only the declared one
            counts.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred from the last layer; of several images all of them.
        label_ceiling: canaries whose label the best classifier told, all other images of the
            release being known.
        label_classifier: which that is; empty where there is none.
        controls: null and undefended.
        membership: canaries identified in releases of several images, the others being unknown.
        promise: worst-case images identified in what the client's own code sends.
        noise: what the noise in releases of the client's own code is like.
        guarantee: of the declared defense, or None.
        empirical_mu: the least Gaussian-DP parameter that the rates of ceiling, label and promise
            allow, each with 97.5 % confidence.
        checks: the capture against each declared step.
        not_measured: the reason for each part that is null.
    """

    attack: str = "ggl"
    attacks: list[Attack] = []
    floor: ReconstructionRate | None = None
    floor_distance: str = "pixels"
    floor_by_distance: dict[str, ReconstructionRate] = {}
    ceiling: Rate | None = None
    label: Rate | None = None
    label_ceiling: Rate | None = None
    label_classifier: str = ""
    controls: Controls = Controls()
    membership: Rate | None = None
    promise: Rate | None = None
    noise: NoiseTest | None = None
    guarantee: Guarantee | None = None
    empirical_mu: float | None = None
    checks: list[CheckedStep] = []
    not_measured: dict[str, str] = {}


class Cost(_Part):
    """What the audit took."""

    evaluations: int = Field(description="gradients of candidates")
    seconds: float
    evaluations_per_second: float | None
    peak_memory_bytes: int | None


class Experiment(_Part):
    """What one experiment did.

    Attributes:
        name: as in ledgers.
        stage: what it does, in words.
        planned: trials.
        trials: that there are.
        evaluations: gradients of candidates.
        seconds: of work, which several processes may have shared.
        said: what came out, where no other part of the report has it.
        not_measured: why it was not made; empty where it was.
    """

    name: str
    stage: str
    planned: int = 0
    trials: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    said: list[str] = []
    not_measured: str = ""


class Report(_Part):
    """The result of one audit."""

    schema_version: Literal[1] = 1
    tool: Tool
    verdict: Verdict
    captured: Captured
    others: list[Captured] = Field(default=[], description="further captures of the round")
    evidence: EvidenceReport
    findings: list[Finding]
    assumptions: list[str]
    experiments: list[Experiment] = []
    cost: Cost
    inputs: list[InputFile]
    environment: dict[str, str]
    spec: dict[str, Any] = Field(description="what was declared, with the defaults of the rest")
    declaration: dict[str, Any] = Field(
        description="what was declared, from which the audit can be run again"
    )
