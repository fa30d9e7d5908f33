"""The declared defense as a whole: its steps, in the client's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from ggl_audit.basics.factors import Factors
from ggl_audit.basics.gradient import Gradient, added, each, norm
from ggl_audit.defenses.aggregation import Aggregation, SecureAggregation
from ggl_audit.defenses.base import Check, Context, Defense, Drawn, ReplicaKind, Trace
from ggl_audit.defenses.clip import Clip, is_per_sample
from ggl_audit.defenses.encryption import Encryption
from ggl_audit.defenses.noise import Noise
from ggl_audit.defenses.sensitivity import GaussianMechanism, Unit, gaussian_mechanism
from ggl_audit.defenses.value_wise import ValueWise
from ggl_audit.inputs.model import ClientModel

Replica = Literal["replicate", "exact_replica", "smooth"]
"""Which of a step's methods stands for it."""

ALONE = SecureAggregation(clients=1)
"""A cohort of one, where none is declared."""

CLEAR_ROUNDING = 1e-10
"""Of what is sent without noise, as another machine computes it: squared and relative."""


class Pipeline:
    """Steps of a defense, applied one after the other; none is no defense.

    Steps on the data, on the model and on each sample act while a client computes its gradient;
    the others on what it has computed; those after an aggregation on the mean over the cohort.
    """

    def __init__(self, steps: Sequence[Defense] = (), model: ClientModel | None = None) -> None:
        self.steps = tuple(steps)
        self._model = model
        self._one_image = model is None or model.batch_size == 1
        self._trains = model is not None and model.local is not None
        self._beside = () if model is None or model.statistics is None else model.statistics.names
        # Gaussian noise of each client is Gaussian noise on their mean.
        self._steps = _noise_after_mean(self.steps)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Adds to the client's model what the steps need.

        Raises:
            ValueError: the model has no place for it.
        """
        for step in self.steps:
            module = step.wrap(module)
        return module

    def bind(self, model: ClientModel) -> Pipeline:
        """The steps for one model.

        Raises:
            ValueError: a step does not fit the model.
        """
        return Pipeline([step.bind(model) for step in self.steps], model)

    @property
    def is_over_everything(self) -> bool:
        """Whether the steps act on running statistics as on the gradient."""
        return any(isinstance(step, Clip) and step.over == "everything" for step in self.steps)

    @property
    def in_the_clear(self) -> tuple[str, ...]:
        """What is sent beside the gradient and no step acts on: running statistics, by name."""
        return () if self.is_over_everything else self._beside

    @property
    def clear_rounding(self) -> float:
        """What may be off in what is sent in the clear, squared and relative."""
        statistics = None if self._model is None else self._model.statistics
        return max(CLEAR_ROUNDING, 0.0 if statistics is None else statistics.rounding)

    def parted(self, gradient: Gradient) -> tuple[Gradient, Gradient]:
        """What the steps act on, and what is sent in the clear."""
        clear = {name: gradient[name] for name in self.in_the_clear if name in gradient}
        return {n: tensor for n, tensor in gradient.items() if n not in clear}, clear

    @property
    def aggregation(self) -> Aggregation:
        """The step that joins the cohort."""
        return next((s for s in self.steps if isinstance(s, Aggregation)), ALONE)

    @property
    def factors(self) -> Factors:
        """What the declared client multiplies and divides by."""
        if self._model is None:
            return Factors(clients=self.aggregation.clients)
        local = self._model.local
        lr = None if local is None else local.lr_of(0)
        return Factors(self._model.batch_size, self.aggregation.clients, lr)

    @property
    def per_sample(self) -> bool:
        """Whether a step acts on each sample's gradient."""
        return any(is_per_sample(step) for step in self.steps)

    @property
    def changes_images(self) -> bool:
        """Whether a step acts on the data."""
        return any(step.changes_images for step in self.steps)

    @property
    def earlier_rounds(self) -> int:
        """How many gradients of earlier rounds a client has to remember."""
        return max((step.earlier_rounds for step in self.steps), default=0)

    def draw(self, context: Context, images: int) -> Drawn:
        """What a client draws before it computes the gradient of so many images."""
        drawn: Drawn = {}
        for step in self.steps:
            drawn |= step.draw(context, images)
        return drawn

    def drawn_for(self, drawn: Drawn, images: torch.Tensor) -> Drawn:
        """The draws for some images of a batch.

        Args:
            drawn: for all of them.
            images: (n,), indices.
        """
        rows = {name for step in self.steps for name in step.drawn_for_each_image}
        return {
            name: tensor[images] if name in rows and len(tensor) > 1 else tensor
            for name, tensor in drawn.items()
        }

    def guesses(self, observed: Gradient) -> list[Drawn]:
        """What the attacker takes the draws for; every combination of the steps' guesses."""
        observed, _ = self.parted(observed)
        each_step = [
            step.guesses(observed if self._is_readable(index) else None)
            for index, step in enumerate(self._steps)
        ]
        guesses = []
        for combination in itertools.product(*each_step):
            together: Drawn = {}
            for guess in combination:
                together |= guess
            guesses.append(together)
        return guesses

    def blind_guess(self) -> Drawn:
        """What somebody without a capture takes the draws for."""
        guess: Drawn = {}
        for step in self.steps:
            guess |= step.guesses(None)[0]
        return guess

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the steps on the data's side make of a batch."""
        for step in self.steps:
            images, targets = step.transform(images, targets, drawn)
        return images, targets

    def penalty(self, module: nn.Module) -> torch.Tensor | float:
        """What the steps on the model's side add to the loss, right after a forward pass."""
        return sum((step.penalty(module) for step in self.steps), 0.0)

    def clip_samples(self, gradient: Gradient) -> Gradient:
        """What the steps on each sample make of one sample's gradient."""
        for step in self.steps:
            if is_per_sample(step):
                gradient = step.replicate(gradient, None)
        return gradient

    def release(self, gradients: Sequence[Gradient], contexts: Sequence[Context]) -> Gradient:
        """What is seen of a cohort.

        Args:
            gradients: what each client has computed.
            contexts: of each client.
        """
        server = contexts[0]
        join = self.aggregation
        before, after = self._around()
        sent, histories = [], []
        clear = [self.parted(gradient)[1] for gradient in gradients]
        for gradient, context in zip(gradients, contexts, strict=True):
            gradient, _ = self.parted(gradient)
            for step in before:
                gradient = step.apply(gradient, context)
                if context.earlier and not step.earlier_rounds:
                    earlier = [step.apply(one, context) for one in context.earlier]
                    context = replace(context, earlier=earlier)
            sent.append(gradient)
            histories.append(context.earlier)
        seen = join.finish(join.share(sent, histories))
        for step in after:
            seen = step.apply(seen, server)
        return {**seen, **self._mean(clear)}

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """What is seen of one gradient, as if all clients of the cohort had it."""
        count = self.aggregation.clients
        return self.release([gradient] * count, [context] * count)

    def replicate(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> Gradient:
        """What the attacker compares with the capture.

        Args:
            gradients: candidates for what clients have computed.
            observed: the capture.
            known: the share of all other clients (:meth:`share`).
        """
        return self._replicate(gradients, observed, known, len(self._steps), "replicate")

    def smooth(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> Gradient:
        """The same, for attacks that follow derivatives: without plateaus."""
        return self._replicate(gradients, observed, known, len(self._steps), "smooth")

    @property
    def is_smooth(self) -> bool:
        """Whether the replica has no plateaus."""
        return all(type(step).smooth is Defense.smooth for step in self.steps)

    def share(self, gradients: Sequence[Gradient], observed: Gradient) -> Gradient:
        """What clients whose gradients the attacker knows add to the aggregate."""
        join = self._join()
        parts = [self.parted(gradient) for gradient in gradients]
        observed, _ = self.parted(observed)
        sent = [self._through(part, observed, 0, join, "exact_replica") for part, _ in parts]
        return {**self.aggregation.share(sent), **self._mean([clear for _, clear in parts])}

    def mismatch(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> torch.Tensor:
        """How badly candidates' gradients explain the capture: the statistic of the ceiling.

        With noise it falls with the likelihood of the capture, wherever :meth:`has_likelihood`, so
        that with equal prior odds no other statistic identifies more often (Neyman and Pearson).
        Without noise it is the squared l2 distance between replica and capture, relative to the
        capture: zero for the true image, whose support and signs agree.

        Args:
            gradients: of candidates, undefended, one for each client that is not known.
            observed: the capture.
            known: the share of all other clients (:meth:`share`).

        Returns:
            A scalar, to be compared between candidates for the same capture only.
        """
        compared = self._compared_by_l2()
        if self.in_the_clear and (compared is None or self.total_noise() is not None):
            return self._mismatch_beside_noise(gradients, observed, known)
        if compared is not None:
            replica = self._replicate(gradients, observed, known, compared, "exact_replica")
            return relative_l2(replica, observed)
        last = self._steps[-1]
        if last.stochastic:
            before = self._replicate(
                gradients, observed, known, len(self._steps) - 1, "exact_replica"
            )
            return -last.log_likelihood_alone(before, observed)
        first, noise = self._noise()
        assert noise is not None
        before = self._replicate(gradients, observed, known, first, "exact_replica")
        if not isinstance(last, Noise | Encryption):
            return -last.log_likelihood(before, noise, observed)
        return -noise.log_density({name: observed[name] - before[name] for name in observed})

    def _mismatch_beside_noise(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None
    ) -> torch.Tensor:
        """The same where some is sent in the clear, which is exact but for rounding.

        Both are negative logarithms of a likelihood, and so can be added.
        """
        noise = self.total_noise()
        parts = [self.parted(gradient) for gradient in gradients]
        observed, shown = self.parted(observed)
        others, other_clear = (None, {}) if known is None else self.parted(known)
        covered = Pipeline(self.steps).mismatch([part for part, _ in parts], observed, others)
        if noise is not None and self._compared_by_l2() is not None:
            covered = covered * norm(observed).square() / (2 * noise.std**2)
        clear = self._mean([clear for _, clear in parts])
        clear = {name: tensor + other_clear.get(name, 0.0) for name, tensor in clear.items()}
        return covered + relative_l2(clear, shown) / (2 * self.clear_rounding)

    def value_wise(self, likelihood: bool) -> ValueWise | None:
        """The replica by single values, or None where values depend on each other in another way.

        Args:
            likelihood: the one that :meth:`mismatch` compares by l2, and not :meth:`replicate`'s.
        """
        count = self._compared_by_l2() if likelihood else len(self._steps)
        if count is None or self.aggregation.clients > 1 or not self.acts_on_a_gradient():
            return None
        compared = [
            (step, self._replica_kind(index, exact=likelihood))
            for index, step in enumerate(self._steps[:count])
        ]
        kinds = [kind for _, kind in compared if kind != "identity"]
        steps = [step for step, kind in compared if kind == "values"]
        scalings = [step for step, kind in compared if kind == "scaling"]
        ordered = kinds == ["values"] * len(steps) + ["scaling"] * len(scalings)
        return ValueWise(steps, scalings) if ordered else None

    def has_likelihood(self) -> bool:
        """Whether the likelihood of a capture is known, or none is needed as nothing is random."""
        if self.earlier_rounds or self._hides_draws():
            return False
        stochastic = [step for step in self._steps if step.stochastic]
        first, noise = self._noise()
        if stochastic:
            alone = type(stochastic[0]).log_likelihood_alone is not Defense.log_likelihood_alone
            return first == len(self._steps) and stochastic == [self._steps[-1]] and alone
        if first == len(self._steps):
            return True
        after = [step for step in self._steps[first:] if not isinstance(step, Noise | Encryption)]
        if noise is None or len(after) > 1:
            return False
        if not after:
            return True
        return after[0] is self._steps[-1] and noise.distribution in after[0].likelihood_after

    def noiseless(self) -> Pipeline:
        """The same without noise."""
        steps = [step for step in self.steps if not isinstance(step, Noise)]
        return Pipeline(steps, self._model)

    def without_noise(self, gradient: Gradient, context: Context) -> Gradient:
        """What the steps before the noise make of a gradient."""
        first, _ = self._noise()
        return Pipeline(self._steps[:first], self._model).apply(gradient, context)

    def verify(self, observed: Gradient) -> list[Check]:
        """Compares a capture with each step, as far as later steps leave its trace visible."""
        observed, _ = self.parted(observed)
        checks = []
        for index, step in enumerate(self._steps):
            later = self._steps[index + 1 :]

            def bound(size: int, confidence: float, later: Sequence[Defense] = later) -> float:
                return noise_norm(later, size, confidence)

            if is_per_sample(step) and self._trains:
                checks.append(Check(str(step), "hidden", "the local steps hide its trace"))
            elif step.trace == "none" or type(step).contradiction is Defense.contradiction:
                checks.append(Check(str(step), "hidden", "it leaves nothing that could be checked"))
            elif self._is_visible(index):
                contradicts, detail = step.contradiction(observed, bound)
                detail += step.hint(observed, self.factors) if contradicts else ""
                checks.append(Check(str(step), "contradicts" if contradicts else "agrees", detail))
            else:
                hiding = next(s for s in later if not s.leaves(step.trace))
                checks.append(Check(str(step), "hidden", f"{hiding} after it hides its trace"))
        return checks

    def guarantee(self, unit: Unit | None = None) -> GaussianMechanism | None:
        """The differential privacy that the steps give to one unit, or None.

        Args:
            unit: a sample or a client; None for the better of the two, as a bound for one image.
        """
        return gaussian_mechanism(self._steps, self.total_noise(), self._model, unit)

    def acts_on_a_gradient(self) -> bool:
        """Whether it can be applied to a gradient that has been computed without it."""
        return all(step.acts_on_a_gradient for step in self.steps) and not self.per_sample

    def ciphertext_of(self) -> str | None:
        """Who holds the key, where the capture is declared to be a ciphertext."""
        outsiders = (s for s in self.steps if isinstance(s, Encryption) and s.view == "outsider")
        return next((step.key_holder for step in outsiders), None)

    def is_random(self) -> bool:
        """Whether anything is random that the capture does not tell."""
        drawn = any(isinstance(step, Noise) or step.stochastic for step in self.steps)
        return drawn or bool(self.earlier_rounds) or self._hides_draws()

    def empties_tensors(self) -> bool:
        """Whether a step may leave nothing of a tensor for one image and something for another."""
        return not all(step.keeps_every_tensor for step in self.steps)

    def only_scales(self) -> bool:
        """Whether nothing is done but to scale the whole gradient down."""
        return all(isinstance(step, Clip) and step.scope == "global" for step in self.steps)

    def acts_on_the_whole(self) -> bool:
        """Whether a step depends on all tensors together, as on the norm of the whole."""
        return any(getattr(step, "scope", None) == "global" for step in self.steps)

    def leaves_only_noise(self) -> bool:
        """Whether the replica of the right images leaves the declared noise, or nothing."""
        if self.earlier_rounds or self._hides_draws() or any(s.stochastic for s in self.steps):
            return False
        return self.ends_in_noise()

    def ends_in_noise(self) -> bool:
        """Whether nothing is done after the noise, where there is any."""
        first, _ = self._noise()
        return all(isinstance(step, Noise | Encryption) for step in self._steps[first:])

    def adds_up(self) -> bool:
        """Whether a release is a sum of shares of single images, up to noise."""
        before, after = self._around()
        harmless = (Noise, Encryption)
        if self.earlier_rounds or not isinstance(self.aggregation, SecureAggregation):
            return False
        if any(step.stochastic for step in self.steps) or self.changes_images:
            return False
        own = self._one_image or all(isinstance(step, harmless) for step in before)
        return own and all(isinstance(step, harmless) for step in after)

    def share_of_one(self, gradient: Gradient) -> Gradient:
        """What one image adds to a sum over all, before noise; only if it :meth:`adds_up`."""
        before, _ = self._around()
        gradient, clear = self.parted(gradient)
        for step in before:
            gradient = step.replicate(gradient, None)
        return {**gradient, **clear}

    def total_noise(self) -> Noise | None:
        """The noise of all steps together; None where there is none, or it is of several kinds."""
        return self._noise()[1]

    def _noise(self) -> tuple[int, Noise | None]:
        """Where the first noise is, and all of it as one, if without a gap and of one kind."""
        steps = self._steps
        noises = [step for step in steps if isinstance(step, Noise)]
        first = next((i for i, s in enumerate(steps) if isinstance(s, Noise)), len(steps))
        together = steps[first : first + len(noises)] == tuple(noises)
        if len(noises) == 1:
            return first, noises[0]
        if together and noises and all(noise.distribution == "gaussian" for noise in noises):
            return first, Noise(std=math.hypot(*(noise.std for noise in noises)))
        return first, None

    def _replicate(
        self,
        gradients: Sequence[Gradient],
        observed: Gradient,
        known: Gradient | None,
        count: int,
        how: Replica,
    ) -> Gradient:
        join = self._join()
        aggregation = self.aggregation
        before = min(join, count)
        parts = [self.parted(gradient) for gradient in gradients]
        observed, _ = self.parted(observed)
        sent = [self._through(part, observed, 0, before, how) for part, _ in parts]
        mean, clear = aggregation.share(sent), self._mean([clear for _, clear in parts])
        if known is not None:
            mean = {name: mean[name] + known[name] for name in mean}
            clear = {name: clear[name] + known[name] for name in clear}
        replica = self._through(aggregation.finish(mean), observed, join + 1, count, how)
        return {**replica, **clear}

    def _mean(self, parts: Sequence[Gradient]) -> Gradient:
        """The share of clients in the cohort's mean of what is sent in the clear."""
        clients = self.aggregation.clients
        return each(lambda tensor: tensor / clients, added(parts))

    def _through(
        self, gradient: Gradient, observed: Gradient, start: int, stop: int, how: Replica
    ) -> Gradient:
        for index in range(start, stop):
            step = self._steps[index]
            seen = observed if self._is_readable(index) else None
            if not is_per_sample(step):
                gradient = getattr(step, how)(gradient, seen)
        return gradient

    def _around(self) -> tuple[list[Defense], list[Defense]]:
        """The steps of each client and those on the aggregate, as declared."""
        own = [step for step in self.steps if not is_per_sample(step)]
        join = next((i for i, s in enumerate(own) if isinstance(s, Aggregation)), len(own))
        return own[:join], own[join + 1 :]

    def _join(self) -> int:
        steps = self._steps
        return next((i for i, s in enumerate(steps) if isinstance(s, Aggregation)), len(steps))

    def _compared_by_l2(self) -> int | None:
        """How many steps are replicated before :meth:`mismatch` is a relative l2; None if never."""
        if not self._steps or not self.has_likelihood():
            return len(self._steps)
        first, noise = self._noise()
        last = self._steps[-1]
        if last.stochastic:
            return None
        if noise is None:
            return len(self._steps)
        gaussian = isinstance(last, Noise | Encryption) and noise.distribution == "gaussian"
        return first if gaussian else None

    def _replica_kind(self, index: int, exact: bool) -> ReplicaKind:
        step = self._steps[index]
        kind = type(step)
        own = exact and kind.exact_replica is not Defense.exact_replica
        if own or _definer(kind, "replicate") is not _definer(kind, "replica_kind"):
            return "whole"
        return step.replica_kind(self._is_readable(index))

    def _is_visible(self, index: int) -> bool:
        return self._survives(self._steps[index].trace, index)

    def _is_readable(self, index: int) -> bool:
        return self._survives(self._steps[index].reads, index)

    def _survives(self, trace: Trace, index: int) -> bool:
        return trace != "none" and all(later.leaves(trace) for later in self._steps[index + 1 :])

    def _hides_draws(self) -> bool:
        """Whether something was drawn that the capture would tell but for later steps."""
        return any(
            step.random_if_hidden and not self._is_readable(index)
            for index, step in enumerate(self._steps)
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "none"


def _definer(kind: type[Defense], method: str) -> type:
    return next(base for base in kind.__mro__ if method in vars(base))


def _noise_after_mean(steps: Sequence[Defense]) -> tuple[Defense, ...]:
    moved = list(steps)
    for place, join in enumerate(steps):
        if not isinstance(join, SecureAggregation):
            continue
        before = place
        while before and isinstance(noise := moved[before - 1], Noise):
            if noise.distribution != "gaussian":
                break
            mean = Noise(std=noise.std / math.sqrt(join.clients))
            moved[before - 1 : before + 1] = [join, mean]
            before -= 1
    return tuple(moved)


def relative_l2(replica: Gradient, observed: Gradient) -> torch.Tensor:
    """Squared l2 distance over the squared norm of the observed gradient, a scalar."""
    difference = {name: replica[name] - observed[name] for name in observed}
    return norm(difference).square() / norm(observed).square().clamp(min=1e-30)


def noise_norm(steps: Sequence[Defense], size: int, confidence: float) -> float:
    """A bound on the norm of the noise that steps add to ``size`` values, kept with confidence."""
    noises = [step for step in steps if isinstance(step, Noise)]
    if not noises:
        return 0.0
    missed = (1 - confidence) / len(noises)
    return sum(noise.norm_bound_of(size, 1 - missed) for noise in noises)
