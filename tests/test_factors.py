from __future__ import annotations

import pytest

from ggl_audit.basics.factors import Factors


@pytest.mark.parametrize(
    ("factors", "factor", "words"),
    [
        (Factors(batch_size=4), 0.25, "1/B with a batch of 4"),
        (Factors(batch_size=4), 4.0, "B with a batch of 4"),
        (Factors(clients=8), 0.125, "1/n with a cohort of 8"),
        (Factors(lr=0.01), 0.01, "lr with a learning rate of 0.01"),
        (Factors(lr=0.01), 100, "1/lr with a learning rate of 0.01"),
        (Factors(batch_size=4, lr=0.1), 0.025, "lr/B with a batch of 4 and a learning rate of 0.1"),
        (Factors(batch_size=4, clients=8), 1 / 32, "1/(B n)"),
        (Factors(), 65536, "2^16: a gradient scaler"),
        (Factors(), 0.25, "1/4, as in a mean over 4"),
        (Factors(batch_size=4, lr=0.1), 0.6, ""),
        (Factors(), 1.0, ""),
        (Factors(), 0.0, ""),
    ],
)
def test_a_factor_is_what_the_client_multiplies_by(
    factors: Factors, factor: float, words: str
) -> None:
    name = factors.name(factor * 1.001, 0.01)
    assert words in name if words else name == ""
