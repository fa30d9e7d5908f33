"""The files that an audit reads, and those of them that it runs."""

from __future__ import annotations

from pathlib import Path

from ggl_audit.basics.files import sha256
from ggl_audit.inputs.images import ImageSet
from ggl_audit.inputs.neighbours import imports_of
from ggl_audit.priors.card import CARD_NAME, SEEN_NAME, WEIGHTS_NAME
from ggl_audit.priors.loading import prior_folder
from ggl_audit.spec import Spec


def input_files(spec: Spec, reference: ImageSet) -> list[tuple[str, str]]:
    """The files that a spec names and an audit reads, with their SHA-256."""
    named = [
        spec.capture.gradient,
        *spec.capture.others,
        spec.capture.before,
        spec.capture.after,
        spec.capture.previous,
        spec.capture.targets,
        spec.model.exported,
        spec.model.weights,
        spec.prior.weights,
        spec.prior.exported,
        spec.prior.embedding,
        *spec.evidence.truth,
        spec.evidence.lpips.weights if spec.evidence.lpips else None,
        *own_code(spec),
    ]
    hashed = [(str(path), sha256([spec.resolve(path)])) for path in named if path is not None]
    folder = prior_folder(spec.prior, spec.folder)
    if folder is not None:
        shown = spec.prior.trained or Path("gan_weights") / folder.name
        names = [n for n in (WEIGHTS_NAME, CARD_NAME, SEEN_NAME) if (folder / n).is_file()]
        hashed += [(str(shown / n), sha256([folder / n])) for n in names]
    public = spec.evidence.reference
    source = None if public is None else public.npz or public.folder
    return hashed if source is None else [*hashed, (str(source), sha256(reference.files))]


def own_code(spec: Spec) -> list[Path]:
    """The user's own files that an audit runs: those that the spec names, and what they import."""
    factories = [
        spec.model.factory,
        spec.model.loss.factory,
        spec.prior.factory,
        spec.prior.latent_mapping,
        spec.client.step if spec.client else None,
        *(step.factory for step in spec.defense),
    ]
    sources = [(factory or "").rpartition(":")[0] for factory in factories]
    named = [Path(source) for source in sources if source.endswith(".py")]
    beside = [
        path.parent / one.relative_to(spec.resolve(path).absolute().parent)
        for path in named
        for one in imports_of(spec.resolve(path).absolute())
    ]
    return list(dict.fromkeys([*named, *beside]))
