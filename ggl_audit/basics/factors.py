"""What a factor between a measured and a declared size is likely to be."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

LEAST_SCALER, MOST_SCALER = 8, 24
"""Powers of two that a gradient scaler multiplies a loss by; it begins with the 16th."""

LARGEST_MEAN = 64
"""Images or steps of a mean that nothing declares; more have too many neighbours."""


@dataclass(frozen=True)
class Factors:
    """What the declared client multiplies and divides by.

    Attributes:
        batch_size: B, images of one client.
        clients: n, whose mean is seen.
        lr: of local training; None where there is none.
    """

    batch_size: int = 1
    clients: int = 1
    lr: float | None = None

    def name(self, factor: float, tolerance: float) -> str:
        """Says what a factor is: B, n, lr, an inverse or a product of these; or a scaler.

        Args:
            factor: measured over declared.
            tolerance: relative, of the factor.

        Returns:
            Words that follow the factor, with a leading comma; empty where it is none of these.
        """
        declared = {"B": float(self.batch_size), "n": float(self.clients), "lr": self.lr or 1.0}
        known = {symbol: value for symbol, value in declared.items() if value != 1}
        products = [
            dict(zip(known, powers, strict=True))
            for powers in itertools.product((0, 1, -1), repeat=len(known))
            if any(powers)
        ]
        for powers in sorted(products, key=lambda one: sum(map(abs, one.values()))):
            value = math.prod(known[symbol] ** power for symbol, power in powers.items())
            if abs(factor / value - 1) <= tolerance:
                used = [symbol for symbol, power in powers.items() if power]
                return f", that is {_product(powers)} with {_listed(used, known)}"
        power = round(math.log2(factor)) if factor > 0 else 0
        if LEAST_SCALER <= power <= MOST_SCALER and abs(factor / 2**power - 1) <= tolerance:
            return f", that is 2^{power}: a gradient scaler (mixed precision) was not taken out"
        mean = round(1 / factor) if 0 < factor < 1 else 0
        if 2 <= mean <= LARGEST_MEAN and max(abs(factor * mean - 1), tolerance) <= 0.25 / mean:
            return f", that is 1/{mean}, as in a mean over {mean}"
        return ""


def _product(powers: dict[str, int]) -> str:
    above = [symbol for symbol, power in powers.items() if power > 0]
    below = [symbol for symbol, power in powers.items() if power < 0]
    divisor = f"({' '.join(below)})" if len(below) > 1 else "".join(below)
    return (" ".join(above) or "1") + (f"/{divisor}" if divisor else "")


def _listed(used: list[str], known: dict[str, float]) -> str:
    named = {"B": "a batch of", "n": "a cohort of", "lr": "a learning rate of"}
    return " and ".join(f"{named[symbol]} {known[symbol]:g}" for symbol in used)
