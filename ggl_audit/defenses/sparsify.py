"""Top-k sparsification."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient, each, flat
from ggl_audit.defenses.base import NoiseBound, Trace
from ggl_audit.defenses.masking import Masking
from ggl_audit.defenses.noise_law import Distribution, NoiseLaw
from ggl_audit.messages import Message, Said

ZERO_SHARE = Message(
    "contradiction/zero-share",
    "{share:.1%} of {name} is zero; {fraction:.1%} was declared",
    advice="Correct `fraction` and `scope`, or capture after the sparsification; error feedback "
    "has to be declared.",
)


class Sparsify(Masking):
    """Sets the values of smallest magnitude to zero.

    Usual settings: 90 to 99 % removed, for each tensor (Aji and Heafield, EMNLP 2017; Lin et al.,
    Deep Gradient Compression, ICLR 2018; Li et al., CVPR 2022, section 4.1) or over all of them.
    """

    name: ClassVar[str] = "sparsify"
    source: ClassVar[str] = "Lin et al., ICLR 2018"
    broken_by: ClassVar[str] = (
        "Generative Gradient Leakage with the observed mask, Li et al., CVPR 2022"
    )
    trace: ClassVar[Trace] = "zeros"
    preserves: ClassVar[frozenset[Trace]] = frozenset({"norm", "zeros", "values"})
    likelihood_after: ClassVar[frozenset[Distribution]] = frozenset({"gaussian", "laplace"})

    fraction: float = Field(gt=0, lt=1, description="share of the values that is removed")
    scope: Literal["layer", "global"] = Field(
        default="layer", description="for each tensor, or over the whole gradient"
    )

    def foreseen(self, gradient: Gradient) -> Gradient:
        """Its largest values."""
        return self._restricted(gradient, _largest)

    def contradiction(self, observed: Gradient, later_noise: NoiseBound) -> tuple[bool, Said]:
        """Finds fewer zeros than were declared."""
        parts = observed if self.scope == "layer" else {"the gradient": flat(observed)}
        lacking = {
            name: removed - zeros
            for name, tensor in parts.items()
            if (removed := self._removed(tensor)) > (zeros := int((tensor == 0).sum()))
        }
        if lacking:
            name = max(lacking, key=lambda n: lacking[n] / parts[n].numel())
            share = float(widened(parts[name] == 0).mean())
            return True, ZERO_SHARE(share=share, name=name, fraction=self.fraction)
        share = float(widened(flat(observed) == 0).mean())
        return False, ZERO_SHARE(share=share, name="the gradient", fraction=self.fraction)

    def log_likelihood(self, before: Gradient, noise: NoiseLaw, observed: Gradient) -> torch.Tensor:
        """Kept values by their density, removed ones by P(below the least that was kept)."""
        if self.scope == "global":
            return self._censored(flat(before), flat(observed), noise)
        parts = [self._censored(before[name], tensor, noise) for name, tensor in observed.items()]
        return torch.stack(parts).sum()

    @property
    def keeps_every_tensor(self) -> bool:
        """Not over the whole gradient, where a tensor of small values goes as a whole."""
        return self.scope == "layer"

    def _censored(self, mean: torch.Tensor, seen: torch.Tensor, noise: NoiseLaw) -> torch.Tensor:
        mean, seen = widened(mean), widened(seen)
        kept = seen != 0
        least = torch.where(kept, seen.abs(), torch.inf).min()
        removed = noise.log_probability(-least - mean, least - mean)
        density = noise.log_densities(seen - mean)
        return torch.where(kept, density, removed).sum()

    def _removed(self, tensor: torch.Tensor) -> int:
        # The small term undoes binary rounding: 0.9 of 10 is 9, not 8.
        return int(self.fraction * tensor.numel() + 1e-9)

    def _restricted(
        self, gradient: Gradient, choice: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> Gradient:
        """Sets all values to zero but those chosen, by index in a row of values and their count."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            values = tensor.flatten()
            chosen = choice(values, len(values) - self._removed(tensor))
            return torch.zeros_like(values).scatter(0, chosen, values[chosen]).view_as(tensor)

        if self.scope == "layer":
            return each(kept, gradient)
        sizes = [tensor.numel() for tensor in gradient.values()]
        parts = kept(flat(gradient)).split(sizes)
        return {
            name: part.view_as(tensor)
            for (name, tensor), part in zip(gradient.items(), parts, strict=True)
        }


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.abs().topk(count).indices
