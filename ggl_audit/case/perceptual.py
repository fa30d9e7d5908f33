"""The perceptual metric of an audit."""

from __future__ import annotations

import torch

from ggl_audit.basics.files import sha256
from ggl_audit.errors import SpecError
from ggl_audit.evidence.fidelity import Perceptual, load_lpips
from ggl_audit.inputs.hub_cache import find_backbone
from ggl_audit.messages import Said
from ggl_audit.spec import LpipsSpec, Spec


def load_perceptual(
    spec: Spec, device: torch.device, *, shown: bool
) -> tuple[Perceptual | str, list[tuple[str, str]]]:
    """LPIPS, where it is declared or there is a picture to compare, and the file that it took.

    Raises:
        AuditError: the weights that were declared cannot be had, or not be used.
    """
    evidence = spec.evidence
    declared = evidence.lpips or LpipsSpec()
    if evidence.lpips is None and evidence.distance != "lpips" and not shown:
        return "there is nothing to compare", []
    if declared.weights is not None:
        return load_lpips(declared.net, spec.resolve(declared.weights), device), []
    found = find_backbone(declared.net, download=declared.download)
    if isinstance(found, Said):
        if evidence.distance == "lpips":
            raise SpecError(("evidence", "distance"), found.after("lpips, but "))
        return found.text, []
    return load_lpips(declared.net, found, device), [(found.name, sha256([found]))]
