from __future__ import annotations

import pytest
import torch

from ggl_audit.evidence.likeness import WHOLE, judge, judge_zeros

NAMES = ["first", "second", "bias"]


def agreements(count: int, first: float, second: float, bias: float, whole: float) -> torch.Tensor:
    """Rows that spread by 0.05 around the given cosines."""
    torch.manual_seed(count)
    spread = 0.05 * (torch.rand(count, 4) - 0.5)
    return torch.tensor([first, second, bias, whole]) + spread


CANARIES = agreements(20, 0.9, 0.8, 0.3, 0.85)
LOSSES = 1 - CANARIES[:, -1]
NULLS = agreements(21, 0.0, 0.0, 0.3, 0.0)


@pytest.mark.parametrize(
    ("captured", "outcome", "cause"),
    [
        ([0.9, 0.8, 0.3, 0.85], "like", None),
        ([0.9, 0.8, -0.9, 0.85], "like", None),
        ([0.5, 0.8, 0.3, 0.85], "undecided", None),
        ([0.2, 0.8, 0.3, 0.85], "unlike", "order or layout of the values in first"),
        ([0.9, 0.1, 0.3, 0.85], "unlike", "order or layout of the values in second"),
        ([0.1, 0.1, 0.3, 0.1], "unlike", "another model or round"),
    ],
)
def test_the_tensor_that_agrees_least_decides(
    captured: list[float], outcome: str, cause: str | None
) -> None:
    found = judge(torch.tensor(captured), CANARIES, LOSSES, NULLS, NAMES)
    assert found.outcome == outcome
    if cause is None:
        assert found.cause is None
    else:
        assert found.cause is not None
        assert cause in found.cause.text


def test_what_is_undecided_rules_nothing_out() -> None:
    found = judge(torch.tensor([0.5, 0.8, 0.3, 0.85]), CANARIES, LOSSES, NULLS, NAMES)
    assert not found.rules_out_larger
    like = judge(torch.tensor([0.9, 0.8, 0.3, 0.85]), CANARIES, LOSSES, NULLS, NAMES)
    assert like.rules_out_larger


def test_a_tensor_of_rounding_alone_is_not_judged() -> None:
    told = torch.tensor([False, True, True])
    capture = torch.tensor([0.1, 0.8, 0.3, 0.85])
    assert judge(capture, CANARIES, LOSSES, NULLS, NAMES).outcome == "unlike"
    assert judge(capture, CANARIES, LOSSES, NULLS, NAMES, told).outcome == "like"


def test_a_tensor_that_the_declared_loss_does_not_reach_is_named_with_any_model() -> None:
    canaries = torch.tensor([[0.7, 0.3, 0.0]]).repeat(8, 1)
    found = judge_zeros(torch.tensor([0.6, 0.39, 0.01]), canaries, NAMES)
    assert found is not None
    assert found.cause is not None
    assert "auxiliary head" in found.cause.text
    found = judge_zeros(torch.tensor([0.6, 0.39, 0.01]), canaries, NAMES, before_norm=NAMES)
    assert found is not None
    assert found.cause is not None
    assert "the mode" in found.cause.text
    # A kernel is no bias before batch norm, so that the mode would not explain it.
    found = judge_zeros(torch.tensor([0.6, 0.3, 0.1]), canaries, NAMES, before_norm=NAMES[:2])
    assert found is not None
    assert found.cause is not None
    assert "auxiliary head" in found.cause.text
    # What a file in half precision may hold for nothing.
    assert judge_zeros(torch.tensor([0.7, 0.3, 1e-6]), canaries, NAMES, rounding=1e-3) is None


def test_where_canaries_cannot_be_told_from_noise_nothing_is_said() -> None:
    found = judge(NULLS[0], NULLS[:10], LOSSES[:10], NULLS[10:], NAMES)
    assert found.outcome == "hidden"
    found = judge(CANARIES[0], CANARIES[:4], LOSSES[:4], NULLS, NAMES)
    assert found.outcome == "hidden"
    assert "fewer than 5" in found.detail


def test_a_capture_of_the_canaries_kind_is_rarely_unlike() -> None:
    """Exchangeable with the canaries, whatever their distribution."""
    unlike = 0
    for seed in range(300):
        torch.manual_seed(seed)
        rows = 1 - 0.6 * torch.rand(9, 4) ** 3
        losses = (1 - rows[1:]).sum(1)
        unlike += judge(rows[0], rows[1:], losses, NULLS, NAMES).outcome == "unlike"
    assert unlike <= 300 * 2 * 4 / 9 * 0.1


def test_a_canary_whose_search_failed_does_not_hide_a_tensor_in_another_order() -> None:
    failed = torch.cat([CANARIES, torch.tensor([[0.3, 0.2, 0.3, 0.3]])])
    reordered = torch.tensor([0.9, 0.2, 0.3, 0.8])
    losses = 1 - failed[:, -1]
    assert judge(reordered, failed, losses, NULLS, NAMES).outcome == "unlike"
    # Were it not known which of the searches failed, its agreement would be the bar.
    assert judge(reordered, failed, losses.flip(0), NULLS, NAMES).outcome == "like"


def test_two_failed_searches_do_not_hide_a_tensor_that_agrees_with_nothing() -> None:
    failed = torch.tensor([[0.4, 0.45, 0.3, 0.5], [0.45, 0.4, 0.3, 0.5]])
    canaries = torch.cat([CANARIES, failed])
    capture = torch.tensor([0.9, 0.02, 0.3, 0.8])
    found = judge(capture, canaries, 1 - canaries[:, -1], NULLS, NAMES)
    assert found.outcome == "unlike"
    assert not found.rules_out_larger


def test_canaries_that_spread_widely_say_nothing_of_a_weak_signal() -> None:
    """As behind noise and one bit, where little more than chance is left of the agreement."""
    weak = torch.tensor([0.06, 0.07, 0.09, 0.15, 0.18, 0.2, 0.25, 0.3])[:, None].repeat(1, 4)
    nulls = torch.linspace(-0.01, 0.02, 8)[:, None].repeat(1, 4)
    outlier = torch.full((4,), -0.01)
    assert judge(outlier, weak, 1 - weak[:, 0], nulls, NAMES).outcome == "hidden"


def test_a_tensor_that_is_empty_by_structure_tells_the_mode() -> None:
    canaries = torch.tensor([[0.7, 0.3, 1e-15]]).repeat(8, 1)
    assert judge_zeros(torch.tensor([0.6, 0.4, 1e-14]), canaries, NAMES) is None
    found = judge_zeros(torch.tensor([0.6, 0.39, 0.01]), canaries, NAMES)
    assert found is not None
    assert found.outcome == "unlike"
    assert "something in bias" in found.detail
    full = torch.tensor([[0.7, 0.29, 0.01]]).repeat(8, 1)
    found = judge_zeros(torch.tensor([0.7, 0.3, 1e-15]), full, NAMES)
    assert found is not None
    assert "nothing in bias" in found.detail
    assert judge_zeros(torch.tensor([0.7, 0.3, 1e-15]), full[:3], NAMES) is None


def test_the_whole_gradient_counts_as_a_tensor() -> None:
    found = judge(torch.tensor([0.9, 0.8, 0.3, 0.2]), CANARIES, LOSSES, NULLS, NAMES)
    assert found.outcome == "unlike"
    assert WHOLE in found.detail
