"""Error feedback: what a compression left out of earlier gradients is added to the next one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from ggl_audit.basics.gradient import Gradient, each
from ggl_audit.defenses.base import Context, Defense, Trace


class ErrorFeedback(Defense):
    """A compression that can carry what it leaves out over to the next rounds.

    1-bit SGD (Seide et al., Interspeech 2014); Stich et al., NeurIPS 2018, algorithm 1;
    Karimireddy et al., ICML 2019, algorithm 2. The attacker does not know what is carried over, so
    the replicas are those of the compression alone.
    """

    error_feedback: int = Field(
        default=0, ge=0, description="earlier rounds whose left-out part is added; 0 adds none"
    )

    @abstractmethod
    def compressed(self, gradient: Gradient, context: Context) -> Gradient:
        """What is sent of one gradient, with nothing added to it."""

    def apply(self, gradient: Gradient, context: Context) -> Gradient:
        """Compresses the gradient and what was left out of the earlier ones.

        Raises:
            ValueError: the context has fewer earlier gradients than ``error_feedback``.
        """
        lacking = self.error_feedback - len(context.earlier)
        if lacking > 0:
            raise ValueError(
                f"{self} needs {self.error_feedback} gradients of earlier rounds; "
                f"{len(context.earlier)} are known"
            )
        if not self.error_feedback:
            return self.compressed(gradient, context)
        left = left_out(
            lambda sum_: self.compressed(sum_, context), context.earlier[-self.error_feedback :]
        )
        return self.compressed({n: tensor + left[n] for n, tensor in gradient.items()}, context)

    @property
    def earlier_rounds(self) -> int:
        """As many as ``error_feedback`` says."""
        return self.error_feedback

    def leaves(self, trace: Trace) -> bool:
        """None, if something of earlier rounds is added, which the earlier steps did not shape."""
        return not self.error_feedback and super().leaves(trace)

    def norm_bound(self, before: float | None) -> float | None:
        """A compression raises no norm; what is added from earlier rounds has no known bound."""
        return None if self.error_feedback else before

    def __str__(self) -> str:
        parameters = [f"{name}={value}" for name, value in self if name != "error_feedback"]
        if self.error_feedback:
            parameters.append(f"error_feedback={self.error_feedback}")
        return f"{self.name}({', '.join(parameters)})"


def left_out(compress: Callable[[Gradient], Gradient], gradients: Sequence[Gradient]) -> Gradient:
    """What is left to send after one or more gradients, the oldest first, that were compressed.

    Each is sent together with what was left of those before it.
    """
    left = each(torch.zeros_like, gradients[0])
    for gradient in gradients:
        whole = {name: tensor + left[name] for name, tensor in gradient.items()}
        sent = compress(whole)
        left = {name: tensor - sent[name] for name, tensor in whole.items()}
    return left
