"""The kinds of findings, as data: docs/findings.md is made of them by docs/make.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "high", "medium", "low"]

Question = Literal["image", "label", "membership", "capture", "promise", "strength"]

ASKED: dict[Question, str] = {
    "image": "Which image was it, and what does it look like?",
    "label": "Which class is it of?",
    "membership": "Is this image in the release?",
    "capture": "Is the capture what was declared?",
    "promise": "Does the defense keep what it promises?",
    "strength": "Was enough measured to tell?",
}


@dataclass(frozen=True)
class Rule:
    """A kind of finding. Kinds that are acted on alike share an id.

    Attributes:
        id: GGL001 to GGL009, stable over versions.
        title: what it is; no two kinds have the same.
        severity: of the gravest case.
        question: what the finding is an answer to.
        meaning: when it is found, and what follows from it.
        remedy: what to do about it.
    """

    id: str
    title: str
    severity: Severity
    question: Question
    meaning: str
    remedy: str

    @property
    def anchor(self) -> str:
        """The place of this kind in docs/findings.md, as GitHub derives it from the title."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


RECONSTRUCTED = Rule(
    id="GGL001",
    title="Private images are reconstructed",
    severity="critical",
    question="image",
    meaning="The pictures that an attack drew are nearer to their own private image than to all "
    "others of its class, more often than by chance and than for a gradient of no image. It is "
    "critical with grade F, high with D.",
    remedy="Do not send this gradient. Clip each sample and add Gaussian noise in proportion to "
    "the clip (DP-SGD), or aggregate securely over many images first.",
)

IDENTIFIABLE = Rule(
    id="GGL002",
    title="Images are identifiable by matching",
    severity="high",
    question="image",
    meaning="Whoever holds a list of suspects computes the gradient of each and compares it with "
    "the one that was sent. No generator is needed, so a poor picture is no protection.",
    remedy="Whoever holds a list of suspects can tell which image was used, whatever the "
    "reconstructions look like. Only more noise or more images to a gradient help.",
)

MEMBERSHIP = Rule(
    id="GGL002",
    title="Membership in the release is identifiable",
    severity="high",
    question="membership",
    meaning="Of a release of several images, one is told from others of its class although the "
    "attacker knows none of the rest.",
    remedy="Aggregation alone does not hide who is in it. Use a larger cohort with noise in "
    "proportion to a clip.",
)

LABEL = Rule(
    id="GGL003",
    title="The label is read off the last layer",
    severity="critical",
    question="label",
    meaning="The gradient of the last layer gives the class away, without any public image. It is "
    "critical with grade F, high with D.",
    remedy="Treat the label as disclosed. Where it is a secret (a diagnosis, say), clip each "
    "sample and add noise in proportion to the clip; where it is none, say so in evidence.public.",
)

LABEL_TOLD = Rule(
    id="GGL003",
    title="The label is told by a classifier",
    severity="high",
    question="label",
    meaning="Whoever has public images of each class computes their gradients, and compares what "
    "was sent with those of each class. That tells the class of images that it never saw.",
    remedy="Where the label is a secret, it takes more noise than hides which image of a class it "
    "was; where it is none, say so in evidence.public.",
)

MOMENTS = Rule(
    id="GGL004",
    title="The gradient is recovered exactly",
    severity="high",
    question="image",
    meaning="What was sent looks like something else, but the gradient follows from it by "
    "arithmetic.",
    remedy="Send no moments in the clear; under secure aggregation only their ratio is seen "
    "(SecAdam).",
)

READ_OFF = Rule(
    id="GGL004",
    title="The private image is read off the gradient exactly",
    severity="critical",
    question="image",
    meaning="The image follows from the gradient by a division; nothing is searched for.",
    remedy="Do not send this layer's bias, begin with a layer that shares its weights, or add "
    "noise after a clip.",
)

CONTRADICTS = Rule(
    id="GGL005",
    title="The capture contradicts the declaration",
    severity="critical",
    question="capture",
    meaning="The capture cannot come from the declared defense, model and loss. The audit is "
    "inconclusive.",
    remedy="Find out which of the two is wrong: the client's implementation, or the declaration "
    "(defense, capture.stage, the model with its weights, mode, loss and normalization). Until "
    "then nothing here speaks of the client.",
)

UNLIKE = Rule(
    id="GGL005",
    title="The capture is unlike the canaries' gradients",
    severity="high",
    question="capture",
    meaning="No image found by the search explains the capture as well as the canaries' gradients "
    "are explained. The audit is inconclusive.",
    remedy="Look at the likely cause first, then at the model's weights and round, mode, loss and "
    "normalization, and at the names and order in the capture. Rates of canaries do not speak for "
    "a capture that is not of their kind.",
)

OTHER_NOISE = Rule(
    id="GGL005",
    title="The noise is not what was declared",
    severity="critical",
    question="capture",
    meaning="What the client's own code adds to public images' gradients is not the declared "
    "noise, and no guarantee rests on it; or it is more than was declared.",
    remedy="Noise protects as declared only if it is drawn anew for every release and every value, "
    "independently, everywhere, and from the declared distribution: look at the seed of the "
    "generator, at what is reused or left out, and at the precision in which it is drawn.",
)

OTHER_CLIENT = Rule(
    id="GGL005",
    title="The client's own code contradicts the declaration",
    severity="critical",
    question="capture",
    meaning="What the client's own code sends of a public image is not the declared share of it, "
    "whatever the noise.",
    remedy="Compare the clip, its bound and its unit, the loss' scale and the model's mode in the "
    "client's code with what is declared.",
)

BROKEN_NOISE = Rule(
    id="GGL006",
    title="The promise rests on noise that is not as declared",
    severity="critical",
    question="promise",
    meaning="Differential privacy is declared, and what the client's own code adds to public "
    "images' gradients is not the noise that it takes.",
    remedy=OTHER_NOISE.remedy,
)

BROKEN_PROMISE = Rule(
    id="GGL006",
    title="The promise of differential privacy is contradicted",
    severity="critical",
    question="promise",
    meaning="Images are told apart more often than the declared mechanism allows anybody to.",
    remedy="The defense does not keep its promise: look at whether noise is added at all, at the "
    "order of clip and noise, at the unit that is clipped (each sample, not the batch), and at the "
    "scale of the noise.",
)

CLAIM = Rule(
    id="GGL006",
    title="The claimed epsilon is not what the declared noise gives",
    severity="critical",
    question="promise",
    meaning="The accountant's epsilon of the declared clip, noise, rounds and sampling is larger "
    "than the claimed one.",
    remedy="More noise, fewer rounds or a smaller sampling rate; or an honest epsilon.",
)

UNCOVERED = Rule(
    id="GGL006",
    title="The promise does not cover all that is sent",
    severity="critical",
    question="promise",
    meaning="Running statistics, which are means and variances of the images' features, are sent "
    "beside what is clipped and noised.",
    remedy="Do not send running statistics (group norm keeps none), or put them under the clip and "
    "the noise and declare over: everything.",
)

WEAK_ATTACK = Rule(
    id="GGL007",
    title="The attack is too weak to judge reconstructions",
    severity="medium",
    question="strength",
    meaning="Without any defense the search hardly finds the canaries, so that it finds none with "
    "one is no sign of protection.",
    remedy="A low floor says nothing here; only the ceiling counts. Give a prior of the data's own "
    "domain, more attack.evaluations, or more evidence.control_trials.",
)

FEW_TRIALS = Rule(
    id="GGL008",
    title="Not enough trials",
    severity="low",
    question="strength",
    meaning="Nothing above chance was seen, but so few trials leave room for more than the better "
    "grade allows.",
    remedy="A better grade takes more evidence.matching_trials, if there is nothing to find.",
)

PUBLIC_LABELS = Rule(
    id="GGL009",
    title="The labels of the public images are in doubt",
    severity="high",
    question="strength",
    meaning="Canaries are public images under their labels. Labels that are shuffled, or that "
    "number the classes otherwise than the model does, make canaries that no client has. Where "
    "nothing sets the classes apart there is no A or B.",
    remedy="Look at the order of images and labels in evidence.reference, and at the order of the "
    "classes that the model was trained with.",
)

RULES = (
    RECONSTRUCTED,
    IDENTIFIABLE,
    MEMBERSHIP,
    LABEL,
    LABEL_TOLD,
    MOMENTS,
    READ_OFF,
    CONTRADICTS,
    UNLIKE,
    OTHER_NOISE,
    OTHER_CLIENT,
    BROKEN_NOISE,
    BROKEN_PROMISE,
    CLAIM,
    UNCOVERED,
    WEAK_ATTACK,
    FEW_TRIALS,
    PUBLIC_LABELS,
)
