"""How well candidates explain a capture: the statistic of the ceiling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ggl_audit.basics.gradient import Gradient, norm
from ggl_audit.defenses.capabilities import HasLikelihood, HasOwnLikelihood, is_harmless
from ggl_audit.defenses.chain import Chain
from ggl_audit.defenses.randomness import Randomness
from ggl_audit.defenses.replica import Replica, exact
from ggl_audit.defenses.value_wise import ValueWise, value_wise


class Likelihood:
    """The likelihood of a capture under a defense, where it is known; elsewhere the next best."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._randomness = Randomness(chain)
        self._replica = Replica(chain)
        # Found once, as candidates are compared often.
        self._known = self._is_known()
        self._compared = self._compared_by_l2()
        # Of what the steps act on, where something is sent in the clear beside it.
        self._covered = Likelihood(Chain(chain.steps)) if chain.clear.names else None

    def is_known(self) -> bool:
        """Whether it is, or none is needed as nothing is random."""
        return self._known

    def mismatch(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None = None
    ) -> torch.Tensor:
        """How badly candidates' gradients explain the capture.

        With noise it falls with the likelihood of the capture, wherever that :meth:`is_known`, so
        that with equal prior odds no other statistic identifies more often (Neyman and Pearson).
        Without noise it is the squared l2 distance between replica and capture, relative to the
        capture: zero for the true image, whose support and signs agree.

        Args:
            gradients: of candidates, undefended, one for each client that is not known.
            observed: the capture.
            known: the share of all other clients (:meth:`Replica.share`).

        Returns:
            A scalar, to be compared between candidates for the same capture only.
        """
        compared, noise = self._compared, self._randomness.total_noise()
        if self._chain.clear.names and (compared is None or noise is not None):
            return self._mismatch_beside_noise(gradients, observed, known)
        if compared is not None:
            return relative_l2(self._of_first(compared, gradients, observed, known), observed)
        steps = self._chain.equivalent
        last = steps[-1]
        if last.stochastic:
            assert isinstance(last, HasOwnLikelihood)
            before = self._of_first(len(steps) - 1, gradients, observed, known)
            return -last.log_likelihood_alone(before, observed)
        assert noise is not None
        before = self._of_first(self._randomness.first, gradients, observed, known)
        if is_harmless(last):
            return -noise.log_density({name: observed[name] - before[name] for name in observed})
        assert isinstance(last, HasLikelihood)
        return -last.log_likelihood(before, noise, observed)

    def weight(self, observed: Gradient) -> torch.Tensor | None:
        """What a mismatch is multiplied by to be a negative log-likelihood, up to a constant.

        Args:
            observed: the capture.

        Returns:
            A scalar; None where nothing is random, or its distribution is not known, so that a
            mismatch is a distance and no likelihood.
        """
        noise = self._randomness.total_noise()
        if not self._known:
            return None
        if self._compared is None or (self._chain.clear.names and noise is not None):
            return torch.ones(())
        return None if noise is None else norm(observed).square() / (2 * noise.std**2)

    def value_wise(self) -> ValueWise | None:
        """The replica that is compared by l2, by single values; None where there is none."""
        count = self._compared
        return None if count is None else value_wise(self._chain, count, exact=True)

    def _is_known(self) -> bool:
        if self._chain.earlier_rounds or self._randomness.hides_draws():
            return False
        steps, first = self._chain.equivalent, self._randomness.first
        stochastic = [step for step in steps if step.stochastic]
        if stochastic:
            alone = isinstance(stochastic[0], HasOwnLikelihood)
            return first == len(steps) and stochastic == [steps[-1]] and alone
        if first == len(steps):
            return True
        noise = self._randomness.total_noise()
        after = [step for step in steps[first:] if not is_harmless(step)]
        if noise is None or len(after) > 1:
            return False
        if not after:
            return True
        last = after[0]
        knows = isinstance(last, HasLikelihood) and noise.distribution in last.likelihood_after
        return knows and last is steps[-1]

    def _compared_by_l2(self) -> int | None:
        """How many steps are replicated before it is a relative l2; None if never."""
        steps = self._chain.equivalent
        if not steps or not self._known:
            return len(steps)
        if steps[-1].stochastic:
            return None
        noise = self._randomness.total_noise()
        if noise is None:
            return len(steps)
        gaussian = is_harmless(steps[-1]) and noise.distribution == "gaussian"
        return self._randomness.first if gaussian else None

    def _of_first(
        self,
        count: int,
        gradients: Sequence[Gradient],
        observed: Gradient,
        known: Gradient | None,
    ) -> Gradient:
        return self._replica.of_first(count, exact, gradients, observed, known)

    def _mismatch_beside_noise(
        self, gradients: Sequence[Gradient], observed: Gradient, known: Gradient | None
    ) -> torch.Tensor:
        """The same where some is sent in the clear, which is exact but for rounding.

        Both are negative logarithms of a likelihood, and so can be added.
        """
        clear, noise = self._chain.clear, self._randomness.total_noise()
        parts = [clear.parted(gradient) for gradient in gradients]
        observed, shown = clear.parted(observed)
        others, shown_of_others = (None, {}) if known is None else clear.parted(known)
        assert self._covered is not None
        covered = self._covered.mismatch([part for part, _ in parts], observed, others)
        if noise is not None and self._compared is not None:
            covered = covered * norm(observed).square() / (2 * noise.std**2)
        mean = clear.mean([own for _, own in parts])
        mean = {name: tensor + shown_of_others.get(name, 0.0) for name, tensor in mean.items()}
        return covered + relative_l2(mean, shown) / (2 * clear.rounding)


def relative_l2(replica: Gradient, observed: Gradient) -> torch.Tensor:
    """Squared l2 distance over the squared norm of the observed gradient, a scalar."""
    difference = {name: replica[name] - observed[name] for name in observed}
    return norm(difference).square() / norm(observed).square().clamp(min=1e-30)
