"""Which images a prior is trained on, and which it may not see so that it can be measured."""

from __future__ import annotations

from dataclasses import replace

from ggl_audit.errors import AuditError
from ggl_audit.inputs.images import ImageSet, fingerprints
from ggl_audit.priors.classes import place_in_class

EVERY = 10


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
        raise AuditError(f"the images of {unseen.source} and {seen.source} differ in size")
    if unseen.classes > seen.classes:
        raise AuditError(f"{unseen.source} has classes that {seen.source} does not have")
    rest = unseen.without(frozenset(fingerprints(seen.images)))
    if not len(rest):
        raise AuditError(
            f"all images of {unseen.source} are also in {seen.source}, so they are not held out",
            "Leave out --held-out, and a tenth of the data is.",
        )
    if len(rest) == len(unseen):
        return unseen
    both = len(unseen) - len(rest)
    return replace(rest, source=f"{unseen.source} but for {both} that are trained on")
