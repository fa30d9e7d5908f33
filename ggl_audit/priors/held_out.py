"""Which images a prior is trained on, and which it may not see so that it can be measured."""

from __future__ import annotations

from dataclasses import replace

from ggl_audit.errors import AuditError
from ggl_audit.inputs.images import ImageSet, fingerprints
from ggl_audit.messages import Message
from ggl_audit.priors.classes import place_in_class

EVERY = 10

OTHER_HELD_OUT = (
    "Give `--held-out` other images of the same kind, or leave it out: a tenth of the data is "
    "then held out."
)
HELD_OUT_DIFFERS_IN_SIZE = Message(
    "training/held-out-differs-in-size",
    "the images of {held_out} and {data} differ in size",
    advice=OTHER_HELD_OUT,
)
HELD_OUT_HAS_OTHER_CLASSES = Message(
    "training/held-out-has-other-classes",
    "{held_out} has classes that {data} does not have",
    advice=OTHER_HELD_OUT,
)
NOT_HELD_OUT = Message(
    "training/not-held-out",
    "all images of {held_out} are also in {data}, so they are not held out",
    "Leave out --held-out, and a tenth of the data is.",
    advice=OTHER_HELD_OUT,
)


def hold_out(data: ImageSet) -> tuple[ImageSet, ImageSet | None]:
    """Takes every tenth image of each class out of a set.

    Args:
        data: in any order; the places within each class decide.

    Returns:
        What is left to train on, without copies of what was taken out, and what was taken out;
        None where no class has ten images.
    """
    chosen = place_in_class(data.labels) % EVERY == EVERY - 1
    if not bool(chosen.any()):
        return data, None
    source = f"every tenth image of {data.source}"
    unseen = ImageSet(data.images[chosen], data.labels[chosen], source, data.files)
    rest = ImageSet(data.images[~chosen], data.labels[~chosen], data.source, data.files)
    return rest.without(frozenset(fingerprints(unseen.images))), unseen


def apart(unseen: ImageSet, seen: ImageSet) -> ImageSet:
    """Leaves out the images that a prior is trained on after all.

    Args:
        unseen: images to measure a prior on.
        seen: what it is trained on.

    Raises:
        AuditError: the images have another size or other classes, or all are trained on.
    """
    if unseen.images.shape[1:] != seen.images.shape[1:]:
        raise AuditError(HELD_OUT_DIFFERS_IN_SIZE(held_out=unseen.source, data=seen.source))
    if unseen.classes > seen.classes:
        raise AuditError(HELD_OUT_HAS_OTHER_CLASSES(held_out=unseen.source, data=seen.source))
    rest = unseen.without(frozenset(fingerprints(seen.images)))
    if not len(rest):
        raise AuditError(NOT_HELD_OUT(held_out=unseen.source, data=seen.source))
    if len(rest) == len(unseen):
        return unseen
    both = len(unseen) - len(rest)
    return replace(rest, source=f"{unseen.source} but for {both} that are trained on")
