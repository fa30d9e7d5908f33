"""What the experiments of an audit have measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ggl_audit.basics.clock import Clock
from ggl_audit.evidence.bounds import Rate, ReconstructionRate
from ggl_audit.evidence.grade import strongest
from ggl_audit.evidence.likeness import Likeness
from ggl_audit.evidence.noise_tests import NoiseTest
from ggl_audit.experiments.attacks import GGL, Suite


@dataclass(frozen=True)
class Reconstructed:
    """The pictures that a search found.

    Attributes:
        images: (k, channels, height, width) in [0, 1], one for each image of the release.
        loss: the matching distance that was reached.
        curve: of the latent search, (evaluations, best loss so far) after each step.
    """

    images: torch.Tensor
    loss: float
    curve: list[tuple[int, float]]


@dataclass
class Measurements:
    """What has been measured so far; None is not measured.

    Attributes:
        clock: of the time limit.
        stage: the experiment that is running, None when all are done.
        evaluations: gradients of candidates so far.
        ceiling: canaries identified by candidate matching.
        label: canaries whose label was inferred.
        matching_control: canaries identified by candidate matching without the defense.
        membership: canaries identified in releases whose other images are unknown.
        promise: worst-case images identified in what the client's own code sends.
        noise: what the noise of the client's own code is like.
        suite: the attacks that are made.
        exact: whether the image of the capture was read off the gradient exactly.
        seconds_each: that a canary and its null control took.
        captured: what each attack made of the captured gradient.
        nearest: the attack whose picture of the capture has the best matching distance.
        captured_null: what each made of a random gradient of the same norm.
        repeated: the pictures of all searches of the capture, (searches, channels, height, width).
        repeated_losses: the losses of these searches.
        agreement_db: mean PSNR between the pictures of independent searches of the capture.
        null_agreement_db: the same for the random gradient.
        ranks: of each truth, by its distance to the nearest picture of each attack.
        matching_ranks: of each truth, by candidate matching, all other images being known.
        floors: canaries that each attack identified and its null control did not, by each distance.
        nulls: canaries that the null control of each identified, by the declared distance.
        canary_losses: the losses of the canaries' searches.
        null_losses: the losses of the null control's searches, the capture's included.
        likeness: of the capture to the canaries' gradients.
        undefended: canaries that the attack identified without the defense.
        others: what became of the further captures of the round.
    """

    clock: Clock = field(default_factory=Clock)
    stage: str | None = "preparation"
    evaluations: int = 0
    ceiling: Rate | None = None
    label: Rate | None = None
    matching_control: Rate | None = None
    membership: Rate | None = None
    promise: Rate | None = None
    noise: NoiseTest | None = None
    exact: bool = False
    seconds_each: float = 0.0
    suite: Suite = field(default_factory=Suite)
    captured: dict[str, Reconstructed] = field(default_factory=dict)
    nearest: str = GGL
    captured_null: dict[str, Reconstructed] = field(default_factory=dict)
    repeated: torch.Tensor | None = None
    repeated_losses: list[float] = field(default_factory=list)
    agreement_db: float | None = None
    null_agreement_db: float | None = None
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    matching_ranks: list[int | None] = field(default_factory=list)
    floors: dict[str, dict[str, ReconstructionRate]] = field(default_factory=dict)
    nulls: dict[str, ReconstructionRate] = field(default_factory=dict)
    canary_losses: list[float] = field(default_factory=list)
    null_losses: list[float] = field(default_factory=list)
    likeness: Likeness | None = None
    undefended: ReconstructionRate | None = None
    others: list[Measurements] = field(default_factory=list)

    def strongest(self, distance: str) -> str:
        """The attack that shows most by a distance; the nearest where none was measured."""
        floors = {name: floors[distance] for name, floors in self.floors.items()}
        return strongest(floors) or self.nearest
