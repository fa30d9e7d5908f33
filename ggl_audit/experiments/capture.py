"""The attacks on the captured gradients, and on a random gradient beside each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from pydantic import BaseModel, ConfigDict

from ggl_audit.attacks.attack import Advance, Attempt, Curve
from ggl_audit.attacks.ggl import GenerativeGradientLeakage
from ggl_audit.basics.gradient import norm, shares, stack
from ggl_audit.case.capture import Capture
from ggl_audit.case.case import Case
from ggl_audit.evidence.assignment import assign
from ggl_audit.evidence.controls import median_norm, null_gradient
from ggl_audit.evidence.fidelity import Fidelity, compare, mean_psnr, nearest
from ggl_audit.evidence.identification import Trials, captured_trial, match, reconstruction_ranks
from ggl_audit.experiments.experiment import Experiment, Plan, Result
from ggl_audit.inputs.png_uri import PngUri, png_uri

SEARCHES_COMPARED = 4

CAPTURED = "captured search"
"""What the searches of a capture draw their random numbers for."""

LONGEST_CURVE = 200


class Picture(BaseModel):
    """One picture of an attack on a captured gradient.

    Attributes:
        image: PNG as a data URI.
        truth: the private image that it is compared with; None where they are not held.
        metrics: against that image.
    """

    model_config = ConfigDict(frozen=True)

    image: PngUri
    truth: int | None = None
    metrics: Fidelity | None = None


class Attacked(Result):
    """What came of the attacks on one captured gradient.

    The first search of each attack is the one that counts; the others show whether it can be
    repeated.

    Attributes:
        pictures: of each attack, one for each image of the release.
        null_pictures: what each made of a random gradient of the same norm.
        loss: the matching distance that each reached.
        null_loss: the same for the random gradient.
        curve: of the latent search, the best loss so far by evaluations.
        null_curve: the same for the random gradient.
        nearest: the attack whose picture has the best distance, by one that is the same for all.
        exact: whether the image was read off the gradient, exactly.
        agreement_db: mean PSNR between the pictures of independent searches.
        null_agreement_db: the same for the random gradient.
        losses: of the independent searches.
        agreements: of the picture of each search with the capture: (searches, k), the cosine for
            each of k - 1 tensors and for the whole.
        tensors: the names of these tensors.
        shares: of each tensor in the squared norm of the capture.
        norm: of the capture.
        ranks: of each private image among candidates, by the pictures of each attack; None where it
            or they are lacking.
        matching_ranks: the same by matching, without any picture, all others being known.
    """

    pictures: dict[str, list[Picture]]
    null_pictures: dict[str, list[Picture]]
    loss: dict[str, float]
    null_loss: dict[str, float]
    curve: Curve
    null_curve: Curve
    nearest: str
    exact: bool
    agreement_db: float
    null_agreement_db: float
    losses: list[float]
    agreements: list[list[float]]
    tensors: list[str]
    shares: list[float]
    norm: float
    ranks: dict[str, list[int | None]]
    matching_ranks: list[int | None]


class CaptureAttack(Experiment[Attacked]):
    """Each captured gradient of the round is a trial; the first is the one that is audited."""

    name = "capture"
    stage = "the attack on the capture"
    result = Attacked

    def plan(self) -> Plan:
        """A trial for each capture: several searches of it, and as many of a random gradient."""
        captures = len(self.case.captures)
        searches = 2 * SEARCHES_COMPARED * captures
        return Plan(
            trials=captures,
            searched=searches * self.suite.searched(),
            descended=searches * self.suite.descended(),
            each_counts=True,
        )

    def run(self, trials: range, advance: Advance) -> Iterator[Attacked]:
        """Attacks captures."""
        for trial in trials:
            yield self._attack(self.case.captures[trial], trial, advance)

    def _attack(self, capture: Capture, trial: int, advance: Advance) -> Attacked:
        case = self.case
        (context,) = case.contexts("captured null", [trial])
        null = null_gradient(capture.observed, case.defense, context, median_norm(case.usual))
        observed = stack([capture.observed] * SEARCHES_COMPARED + [null] * SEARCHES_COMPARED)
        labels = capture.repeated_labels(2 * SEARCHES_COMPARED)
        purposes = (CAPTURED, "captured null search")
        randoms = [case.random(own, n) for own in purposes for n in range(SEARCHES_COMPARED)]
        attempts = self.suite.run(observed, labels, randoms, advance)
        searched = attempts[GenerativeGradientLeakage.name]
        first, null_first, repeated = 0, SEARCHES_COMPARED, slice(SEARCHES_COMPARED)
        same = stack([capture.observed] * SEARCHES_COMPARED)
        agreements = case.matching().agreement(searched.images[repeated], labels[repeated], same)
        exact = (one.is_exact(capture, attempts[one.name]) for one in self.suite.attacks)
        shown = functools.partial(_pictures, case, capture)
        return Attacked(
            pictures={name: shown(one.images[first]) for name, one in attempts.items()},
            null_pictures={name: shown(one.images[null_first]) for name, one in attempts.items()},
            loss={name: float(one.losses[first]) for name, one in attempts.items()},
            null_loss={name: float(one.losses[null_first]) for name, one in attempts.items()},
            curve=_thinned(searched.curves[first]),
            null_curve=_thinned(searched.curves[null_first]),
            nearest=_nearest(case, capture, attempts),
            exact=any(exact),
            agreement_db=_agreement_db(searched.images[repeated]),
            null_agreement_db=_agreement_db(searched.images[SEARCHES_COMPARED:]),
            losses=searched.losses[repeated].tolist(),
            agreements=agreements.tolist(),
            tensors=list(capture.observed),
            shares=shares(stack([capture.observed]))[0].tolist(),
            norm=float(norm(capture.observed)),
            ranks=_ranks(case, capture, attempts),
            matching_ranks=_matching_ranks(case, capture),
        )


def captured_trials(case: Case, capture: Capture) -> list[Trials | None]:
    """Each truth among candidates of its class; None where that or they are lacking."""
    if capture.truth_labels is None:
        return [None] * len(capture.truths)
    wanted, batch_size = case.spec.evidence.candidates, case.model.batch_size
    return [
        captured_trial(
            capture.truths,
            capture.truth_labels,
            place,
            batch_size,
            case.reference,
            wanted,
            case.random("captured candidates", place),
        )
        for place in range(len(capture.truths))
    ]


def _ranks(
    case: Case, capture: Capture, attempts: Mapping[str, Attempt]
) -> dict[str, list[int | None]]:
    """The rank of each private image, by the nearest of an attack's pictures."""
    if capture.prior_saw_truth:
        return {}
    distance = case.distances[case.spec.evidence.distance]
    return {
        name: [
            None
            if one is None
            else reconstruction_ranks(
                attempt.images[:1], one, distance, case.lots(f"captured {name} ties", [place])
            )[0]
            for place, one in enumerate(captured_trials(case, capture))
        ]
        for name, attempt in attempts.items()
    }


def _matching_ranks(case: Case, capture: Capture) -> list[int | None]:
    """The rank of each private image, by matching."""
    matching, observed = case.matching(), stack([capture.observed])
    # The attacker tries a candidate as its client's first image.
    return [
        None
        if one is None or not case.clients.adds_up
        else match(matching, one, observed, case.lots("captured ties", [place]))[0]
        for place, one in enumerate(captured_trials(case, capture))
    ]


def _pictures(case: Case, capture: Capture, images: torch.Tensor) -> list[Picture]:
    """Shows k images, (k, channels, height, width), beside the truths where these are held."""
    if len(capture.truths) == 0:
        return [Picture(image=png_uri(image)) for image in images]
    truths = assign(images, capture.truths, case.distances[case.spec.evidence.distance])
    return [
        Picture(
            image=png_uri(image),
            truth=truth,
            metrics=compare(image, capture.truths[truth], case.model, case.lpips),
        )
        for image, truth in zip(images, truths, strict=True)
    ]


def _nearest(case: Case, capture: Capture, attempts: Mapping[str, Attempt]) -> str:
    """The attack with the best first picture, by a distance that is the same for all."""
    names = list(attempts)
    matching = case.matching(distance=case.spec.attack.distance)
    images = torch.stack([attempts[name].images[0] for name in names])
    labels = capture.repeated_labels(len(names))[None]
    losses = matching.distances(images[None], labels, stack([capture.observed]))[0]
    return names[int(losses.nan_to_num(nan=torch.inf).argmin())]


def _agreement_db(images: torch.Tensor) -> float:
    """The mean PSNR between searches; of sets by each picture's best partner, as order is idle."""
    pairs = torch.combinations(torch.arange(len(images))).tolist()
    found = []
    for first, second in pairs:
        ours, theirs = images[first], images[second]
        partners = nearest(theirs.expand(len(ours), *theirs.shape), ours)
        found.append(mean_psnr(partners, ours))
    return sum(found) / len(found)


def _thinned(curve: Curve) -> Curve:
    """At most so many points of it, the last among them."""
    every = -(-len(curve) // LONGEST_CURVE)
    shown = curve[::every]
    return shown if shown[-1] == curve[-1] else [*shown, curve[-1]]
