from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from ggl_audit.defenses import (
    Clip,
    Context,
    Defense,
    Noise,
    Pipeline,
    Quantize,
    Sign,
    Sparsify,
    build_pipeline,
)
from ggl_audit.errors import SpecError
from ggl_audit.gradient import Gradient, flat, norm
from ggl_audit.spec import DefenseSpec

ALL = [
    Noise(std=0.1),
    Clip(bound=1.0),
    Clip(bound=0.5, scope="layer"),
    Sparsify(fraction=0.9),
    Sparsify(fraction=0.37, scope="global"),
    Sign(),
    Quantize(bits=1),
    Quantize(bits=4),
]


def context(seed: int = 0) -> Context:
    return Context(torch.Generator().manual_seed(seed))


def random_gradient(seed: int, scale: float = 1.0) -> Gradient:
    """Values of many magnitudes, with structural zeros as rectified networks have."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 11), "a.bias": (7,), "b.weight": (5, 7), "one": (1,)}
    gradient = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random) ** 3
        values[torch.rand(shape, generator=random) < 0.2] = 0
        gradient[name] = scale * values
    gradient["one"] = torch.full((1,), float(scale))
    return gradient


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_a_correct_capture_is_never_accused(defense: Defense) -> None:
    for seed in range(1000):
        gradient = random_gradient(seed, scale=10 ** (seed % 7 - 4))
        sent = Pipeline([defense]).apply(gradient, context(seed))
        accused, detail = defense.contradiction(sent, lambda *_: 0.0)
        assert not accused, (seed, detail)


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_the_input_is_left_alone_and_the_shape_kept(defense: Defense) -> None:
    gradient = random_gradient(3)
    before = {name: tensor.clone() for name, tensor in gradient.items()}
    sent = defense.apply(gradient, context())
    assert all(torch.equal(gradient[name], before[name]) for name in gradient)
    assert {n: t.shape for n, t in sent.items()} == {n: t.shape for n, t in gradient.items()}


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_the_replica_brings_the_true_gradient_nearer(defense: Defense) -> None:
    gradient = random_gradient(5, scale=3)
    observed = defense.apply(gradient, context())
    with_replica = flat(defense.replicate(gradient, observed)) - flat(observed)
    without = flat(gradient) - flat(observed)
    if isinstance(defense, Noise):
        assert torch.equal(with_replica, without)
    else:
        assert with_replica.norm() < 0.01 * without.norm()


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_a_batch_of_replicas_is_a_loop_of_replicas(defense: Defense) -> None:
    observed = defense.apply(random_gradient(1), context())
    candidates = [random_gradient(seed) for seed in range(2, 7)]
    stacked = {name: torch.stack([c[name] for c in candidates]) for name in observed}
    for seen in (observed, None):
        batch = vmap(lambda g, o=seen: defense.replicate(g, o))(stacked)
        for i, candidate in enumerate(candidates):
            for name, tensor in defense.replicate(candidate, seen).items():
                torch.testing.assert_close(batch[name][i], tensor)


@pytest.mark.parametrize(
    ("declared", "planted", "figure"),
    [
        (Clip(bound=1.0), Clip(bound=1.01), "1.01"),
        (Clip(bound=1.0, scope="layer"), Clip(bound=1.5, scope="layer"), "1.5"),
        (Sparsify(fraction=0.9), Sparsify(fraction=0.8), "90.0% was declared"),
        (Sparsify(fraction=0.9, scope="global"), Sparsify(fraction=0.85, scope="global"), "90.0%"),
        (Sign(), Quantize(bits=4), "magnitudes from"),
        (Quantize(bits=3), Quantize(bits=4), "3 bits allow 8"),
        (Noise(std=0.1), Noise(std=0.01), "within"),
        (Noise(std=0.1), Clip(bound=1.0), "within"),
    ],
    ids=str,
)
def test_a_planted_error_is_found_with_its_figure(
    declared: Defense, planted: Defense, figure: str
) -> None:
    gradient = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 0.01}
    gradient["w"][:2] = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    accused, detail = declared.contradiction(planted.apply(gradient, context()), lambda *_: 0.0)
    assert accused
    assert figure in detail


@given(
    fraction=st.floats(0.01, 0.99),
    size=st.integers(1, 60),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=200)
def test_sparsification_keeps_the_largest(
    fraction: float, size: int, scope: str, seed: int
) -> None:
    gradient = {"w": torch.randn(size, generator=torch.Generator().manual_seed(seed))}
    sent = Sparsify(fraction=fraction, scope=scope).apply(gradient, context())["w"]
    kept = sent != 0
    assert int((~kept).sum()) == math.floor(fraction * size + 1e-9)
    assert torch.equal(sent[kept], gradient["w"][kept])
    if kept.any() and not kept.all():
        assert float(gradient["w"][kept].abs().min()) > float(gradient["w"][~kept].abs().max())


@given(bits=st.integers(1, 16), seed=st.integers(0, 10_000))
@settings(max_examples=100)
def test_quantization_is_within_half_a_step(bits: int, seed: int) -> None:
    gradient = random_gradient(seed)
    sent = Quantize(bits=bits).apply(gradient, context())
    values = flat(gradient)
    span = float(values.max() - values.min())
    rounding = 1e-6 * span  # single precision
    assert float((flat(sent) - values).abs().max()) <= span / (2**bits - 1) / 2 + rounding
    assert len(flat(sent).unique()) <= 2**bits


def test_a_clip_scales_above_the_bound_and_leaves_alone_below() -> None:
    gradient = random_gradient(0)
    large = Clip(bound=0.5).apply(gradient, context())
    assert float(norm(large)) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(flat(large), flat(gradient) * 0.5 / float(norm(gradient)))
    assert torch.equal(flat(Clip(bound=1e6).apply(gradient, context())), flat(gradient))
    layers = Clip(bound=0.1, scope="layer").apply(gradient, context())
    assert all(float(t.norm()) <= 0.1 + 1e-6 for t in layers.values())


def test_noise_has_the_declared_deviation_and_is_the_clients_own() -> None:
    zero = {"w": torch.zeros(100_000)}
    one, same, other = (Noise(std=0.2).apply(zero, context(s))["w"] for s in (1, 1, 2))
    assert float(one.std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_order_of_the_pipeline_is_the_declared_one() -> None:
    gradient = random_gradient(0)
    clip, sparsify = Clip(bound=0.5), Sparsify(fraction=0.9)
    one = Pipeline([sparsify, clip]).apply(gradient, context())
    by_hand = clip.apply(sparsify.apply(gradient, context()), context())
    other = Pipeline([clip, sparsify]).apply(gradient, context())
    assert torch.equal(flat(one), flat(by_hand))
    assert float(norm(one)) == pytest.approx(0.5, rel=1e-5)
    assert float(norm(other)) < 0.5


def test_a_mask_is_read_off_the_capture_only_where_it_can_be_seen() -> None:
    gradient, other = random_gradient(0), random_gradient(1)
    visible = Pipeline([Sparsify(fraction=0.9), Clip(bound=0.5)])
    observed = visible.apply(gradient, context())
    replica = visible.replicate(other, observed)
    assert all(torch.equal(replica[n] != 0, (observed[n] != 0) & (other[n] != 0)) for n in other)
    hidden = Pipeline([Sparsify(fraction=0.9), Noise(std=0.1)])
    observed = hidden.apply(gradient, context())
    own = Sparsify(fraction=0.9).apply(other, context())
    assert torch.equal(flat(hidden.replicate(other, observed)), flat(own))


def test_what_later_steps_hide_is_said_and_not_judged() -> None:
    pipeline = Pipeline([Sparsify(fraction=0.9), Noise(std=0.1)])
    observed = Noise(std=0.1).apply(random_gradient(0), context())
    checks = pipeline.verify(observed)
    assert [check.outcome for check in checks] == ["hidden", "agrees"]
    assert "noise" in checks[0].detail


def test_a_clip_under_noise_is_checked_as_far_as_the_noise_allows() -> None:
    pipeline = Pipeline([Clip(bound=1.0), Noise(std=1.0)])
    for seed in range(1000):
        sent = pipeline.apply(random_gradient(seed, scale=100), context(seed))
        assert [check.outcome for check in pipeline.verify(sent)] == ["agrees", "agrees"]
    unclipped = Noise(std=1.0).apply(random_gradient(0, scale=100), context())
    assert pipeline.verify(unclipped)[0].outcome == "contradicts"


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([], True),
        ([Sign()], True),
        ([Clip(bound=1), Noise(std=1)], True),
        ([Noise(std=1), Noise(std=1)], True),
        ([Noise(std=1), Clip(bound=1)], False),
        ([Noise(std=1), Sign()], False),
    ],
)
def test_steps_after_noise_are_noticed(steps: list[Defense], last: bool) -> None:
    assert Pipeline(steps).noise_is_last() == last


def test_noise_adds_in_squares() -> None:
    assert Pipeline([Noise(std=3), Noise(std=4)]).total_noise() == Noise(std=5)
    assert Pipeline([Noise(std=3), Sign(), Noise(std=4)]).total_noise() is None
    assert Pipeline([Sign()]).total_noise() is None


def test_the_step_of_the_sign_is_read_off_the_capture() -> None:
    gradient = random_gradient(0)
    observed = {name: 0.01 * torch.sign(tensor) for name, tensor in gradient.items()}
    torch.testing.assert_close(flat(Sign().replicate(gradient, observed)), flat(observed))


def test_ties_do_not_change_how_many_values_are_kept() -> None:
    sent = Sparsify(fraction=0.9).apply({"w": torch.ones(100)}, context())["w"]
    assert int((sent != 0).sum()) == 10


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], None),
        ([Noise(std=1.0)], None),
        ([Clip(bound=2.0)], None),
        ([Clip(bound=2.0), Noise(std=1.0)], 2.0),
        ([Noise(std=1.0), Clip(bound=2.0)], None),
        ([Clip(bound=2.0, scope="layer"), Noise(std=1.0)], None),
        ([Clip(bound=2.0), Sparsify(fraction=0.5), Noise(std=4.0), Sign()], 0.5),
        ([Clip(bound=2.0), Sign(), Noise(std=1.0)], None),
        ([Clip(bound=2.0), Quantize(bits=4), Noise(std=1.0)], None),
    ],
)
def test_only_a_bounded_norm_with_noise_after_it_is_private(
    steps: list[Defense], expected: float | None
) -> None:
    mechanism = Pipeline(steps).guarantee()
    assert (None if mechanism is None else mechanism.mu) == expected


@pytest.mark.parametrize(
    ("step", "key", "words"),
    [
        ({"name": "sparsifi"}, ("defense", 0, "name"), "Did you mean 'sparsify'"),
        ({"name": "noise"}, ("defense", 0, "std"), "missing"),
        ({"name": "noise", "std": -1}, ("defense", 0, "std"), "greater than 0"),
        (
            {"name": "clip", "bound": 1, "norm": 2},
            ("defense", 0, "norm"),
            "Known are: bound, scope",
        ),
        ({"name": "quantize", "bits": 99}, ("defense", 0, "bits"), "16"),
        ({"name": "sparsify", "fraction": 0.5, "scope": "all"}, ("defense", 0, "scope"), "layer"),
    ],
)
def test_a_wrong_declaration_is_named(
    step: dict[str, object], key: tuple[object, ...], words: str
) -> None:
    with pytest.raises(SpecError, match=words) as error:
        build_pipeline([DefenseSpec.model_validate(step)])
    assert error.value.key == key


def test_noise_left_out_of_one_layer_is_found_and_named() -> None:
    random = torch.Generator().manual_seed(0)
    quiet = {"a": torch.randn(200, 100, generator=random), "b": torch.zeros(300)}
    sent = Noise(std=1.0).apply({"a": quiet["a"], "b": quiet["b"]}, context())
    sent["b"] = quiet["b"] + 0.01
    accused, detail = Noise(std=1.0).contradiction(sent, lambda *_: 0.0)
    assert accused
    assert "values of b are within 0.01" in detail


def test_all_the_noise_after_the_clip_counts_for_the_guarantee() -> None:
    mechanism = Pipeline([Clip(bound=1), Noise(std=3), Noise(std=4)]).guarantee()
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(0.2)
    apart = Pipeline([Clip(bound=1), Noise(std=3), Sign(), Noise(std=4)]).guarantee()
    assert apart is not None
    assert apart.mu == pytest.approx(1 / 3)
    assert Pipeline([Clip(bound=1), Noise(std=3, distribution="laplace")]).guarantee() is None
