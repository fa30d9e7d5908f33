"""The label: how often classifiers tell a canary's class, and the last layer gives it away."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ggl_audit.attack.labels import why_not_inferred
from ggl_audit.case.labels import infer
from ggl_audit.experiments.value import Releases, Scores, ValueExperiment
from ggl_audit.messages import Said

INFERENCE = "inference"


class Label(ValueExperiment):
    """How often a canary's label is told by the best classifier, and read off the last layer."""

    name = "label"
    stage = "the label"

    @property
    def values(self) -> torch.Tensor:
        """The labels of the reference images."""
        return self.case.reference.labels

    def why_not(self) -> str:
        """Where it is no secret, or what images are to give is more than a class."""
        if "label" in self.case.spec.evidence.public:
            return "evidence.public names it"
        if self.case.model.targets is not None:
            return "what the images are to give is more than a class"
        return "there is one label only" if self.case.model.classes == 1 else ""

    def attacks(self) -> dict[str, Scores]:
        """The inference from the last layer, where labels can be inferred."""
        return {} if self._why_not_inferred else {INFERENCE: self._by_inference}

    @functools.cached_property
    def _why_not_inferred(self) -> Said | None:
        return why_not_inferred(self.case.model, self.case.members)

    def _by_inference(self, releases: Releases) -> torch.Tensor:
        """How many more images of each label were inferred than the known ones of the release."""
        labels, classes = releases.trials.members[1][:, 1:], self.case.model.classes
        inferred = F.one_hot(infer(self.case, releases.observed), classes).sum(1)
        left = inferred - F.one_hot(labels, classes).sum(1)
        return left[:, self._divided.values]
