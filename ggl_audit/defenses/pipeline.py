"""The declared defense as a whole: what clients send under it, and who else asks about it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, Step
from ggl_audit.defenses.capabilities import AddsNoise, ChangesGradient, rounds_remembered
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.checks import Checks
from ggl_audit.defenses.effect import WholeEffect
from ggl_audit.defenses.likelihood import Likelihood
from ggl_audit.defenses.randomness import Randomness
from ggl_audit.defenses.replica import Replica
from ggl_audit.defenses.sensitivity import Sensitivity
from ggl_audit.defenses.training import Training
from ggl_audit.inputs.model import ClientModel


class Pipeline(Chain):
    """Steps of a defense, applied one after the other; none is no defense.

    Steps on the data, on the model and on each sample act while a client computes its gradient;
    the others on what it has computed; those after an aggregation on the mean over the cohort.

    Attributes:
        training: what is done while a client computes its gradient.
        replica: what the attacker does about the steps.
        likelihood: how well candidates explain a capture.
        randomness: what of a release is random.
        sensitivity: what one unit can change, and the privacy that follows.
        checks: compares captures with the steps.
        effect: what else has to be known of all steps together.
    """

    def __init__(self, steps: Sequence[Step] = (), model: ClientModel | None = None) -> None:
        super().__init__(steps, model)
        # Not itself, so that a model is let go as soon as nobody needs it.
        chain = Chain(steps, model)
        self.training = Training(chain)
        self.replica = Replica(chain)
        self.likelihood = Likelihood(chain)
        self.randomness = Randomness(chain)
        self.sensitivity = Sensitivity(chain)
        self.checks = Checks(chain)
        self.effect = WholeEffect(chain)

    def bind(self, model: ClientModel) -> Pipeline:
        """The steps for one model.

        Raises:
            ValueError: a step does not fit the model.
        """
        return Pipeline([step.bind(model) for step in self.steps], model)

    def release(self, gradients: Sequence[Gradient], contexts: Sequence[Context]) -> Gradient:
        """What is seen of a cohort.

        Args:
            gradients: what each client has computed.
            contexts: of each client.
        """
        server = contexts[0]
        before, after = self.around()
        sent, histories = [], []
        clear = [self.clear.parted(gradient)[1] for gradient in gradients]
        for gradient, context in zip(gradients, contexts, strict=True):
            gradient, _ = self.clear.parted(gradient)
            for step in before:
                if not isinstance(step, ChangesGradient):
                    continue
                gradient = step.apply(gradient, context)
                if context.earlier and not rounds_remembered(step):
                    earlier = [step.apply(one, context) for one in context.earlier]
                    context = replace(context, earlier=earlier)
            sent.append(gradient)
            histories.append(context.earlier)
        seen = self.aggregation.finish(self.aggregation.share(sent, histories))
        for step in after:
            if isinstance(step, ChangesGradient):
                seen = step.apply(seen, server)
        return {**seen, **self.clear.mean(clear)}

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """What is seen of one gradient, as if all clients of the cohort had it."""
        count = self.aggregation.clients
        return self.release([gradient] * count, [context] * count)

    def noiseless(self) -> Pipeline:
        """The same without noise."""
        return Pipeline([s for s in self.steps if not isinstance(s, AddsNoise)], self.model)

    def without_noise(self, gradient: Gradient, context: Context) -> Gradient:
        """What the steps before the noise make of a gradient."""
        return self._before_noise.apply(gradient, context)

    @functools.cached_property
    def _before_noise(self) -> Pipeline:
        return Pipeline(self.equivalent[: self.randomness.first], self.model)
