from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from ggl_audit.basics.gradient import Gradient, flat, norm
from ggl_audit.defenses import (
    Clip,
    Context,
    Defense,
    FloatFormat,
    Noise,
    NoiseLaw,
    Pipeline,
    Qsgd,
    Quantize,
    RandomK,
    Sign,
    Sparsify,
    TernGrad,
    Threshold,
    build_pipeline,
    relative_l2,
)
from ggl_audit.defenses.capabilities import rounds_remembered
from ggl_audit.defenses.float_format import FORMATS
from ggl_audit.errors import SpecError
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
    Sparsify(fraction=0.9, error_feedback=2),
    RandomK(fraction=0.9),
    RandomK(fraction=0.37, scope="global"),
    RandomK(fraction=0.9, error_feedback=1),
    Threshold(least=0.01),
    Threshold(least=0.3, error_feedback=2),
    Sign(scale="mean"),
    Sign(scale="layer_mean"),
    Sign(scale="mean", error_feedback=1),
    Sign(scale="layer_mean", error_feedback=2),
    Quantize(bits=1, scope="layer"),
    Quantize(bits=4, scope="layer"),
    Qsgd(levels=1),
    Qsgd(levels=5, scope="global"),
    Qsgd(levels=127),
    Qsgd(levels=1, norm="max", scope="global"),
    Qsgd(levels=127, norm="max"),
    TernGrad(),
    TernGrad(clip=2.5),
    *(FloatFormat(format=f) for f in FORMATS),
    *(FloatFormat(format=f, scale="tensor") for f in FORMATS),
]
DETERMINISTIC = [
    d for d in ALL if not (d.stochastic or rounds_remembered(d) or isinstance(d, Noise))
]
STOCHASTIC = [d for d in ALL if d.stochastic]


def context(seed: int = 0, earlier: int = 0) -> Context:
    rounds = [random_gradient(seed + round_) for round_ in range(1, earlier + 1)]
    return Context(torch.Generator().manual_seed(seed), earlier=rounds)


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
        sent = defense.apply(gradient, context(seed, rounds_remembered(defense)))
        accused, said = defense.contradiction(sent, lambda *_: 0.0)
        assert not accused, (seed, said)


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_the_input_is_left_alone_and_the_shape_kept(defense: Defense) -> None:
    gradient = random_gradient(3)
    before = {name: tensor.clone() for name, tensor in gradient.items()}
    sent = defense.apply(gradient, context(earlier=rounds_remembered(defense)))
    assert all(torch.equal(gradient[name], before[name]) for name in gradient)
    assert {n: t.shape for n, t in sent.items()} == {n: t.shape for n, t in gradient.items()}


@pytest.mark.parametrize("defense", [Noise(std=0.1), *DETERMINISTIC], ids=str)
def test_the_replica_brings_the_true_gradient_nearer(defense: Defense) -> None:
    gradient = random_gradient(5, scale=3)
    observed = defense.apply(gradient, context())
    with_replica = flat(defense.replicate(gradient, observed)) - flat(observed)
    without = flat(gradient) - flat(observed)
    if isinstance(defense, Noise):
        assert torch.equal(with_replica, without)
    else:
        assert with_replica.norm() <= 0.01 * without.norm()


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_a_batch_of_replicas_is_a_loop_of_replicas(defense: Defense) -> None:
    observed = defense.apply(random_gradient(1), context(earlier=rounds_remembered(defense)))
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
        (Sparsify(fraction=0.9), RandomK(fraction=0.8), "90.0% was declared"),
        (RandomK(fraction=0.9), RandomK(fraction=0.8), "80.0% of w is zero"),
        (RandomK(fraction=0.9, scope="global"), Sparsify(fraction=0.85), "90.0%"),
        (Threshold(least=0.01), Threshold(least=0.009), "the threshold is 0.01"),
        (Threshold(least=0.01), Sparsify(fraction=0.5), "the smallest magnitude but zero"),
        (Sign(scale="layer_mean"), Quantize(bits=4), "the values of w"),
        (Quantize(bits=3, scope="layer"), Quantize(bits=4, scope="layer"), "3 bits allow 8"),
        (Qsgd(levels=4), Qsgd(levels=40, norm="max"), "4 were declared"),
        (Qsgd(levels=3, norm="max"), Qsgd(levels=4, norm="max"), "w has 4 magnitudes but zero"),
        (Qsgd(levels=4, norm="max"), Qsgd(levels=3, norm="max"), "multiples of one"),
        (Qsgd(levels=8), Quantize(bits=2), "multiples of one"),
        (TernGrad(), Qsgd(levels=2, norm="max"), "w has 2 magnitudes"),
        (FloatFormat(format="bfloat16"), FloatFormat(format="float16"), "not of bfloat16"),
        (FloatFormat(format="float16"), Clip(bound=1.0), "values of w are not of float16"),
        (
            FloatFormat(format="float8_e4m3", scale="tensor"),
            FloatFormat(format="float8_e4m3"),
            "not of float8_e4m3",
        ),
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
    accused, said = declared.contradiction(planted.apply(gradient, context()), lambda *_: 0.0)
    assert accused
    assert figure in said.text


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
    replica = visible.replica.replicate([other], observed)
    assert all(torch.equal(replica[n] != 0, (observed[n] != 0) & (other[n] != 0)) for n in other)
    hidden = Pipeline([Sparsify(fraction=0.9), Noise(std=0.1)])
    observed = hidden.apply(gradient, context())
    own = Sparsify(fraction=0.9).apply(other, context())
    assert torch.equal(flat(hidden.replica.replicate([other], observed)), flat(own))


def test_what_later_steps_hide_is_said_and_not_judged() -> None:
    pipeline = Pipeline([Sparsify(fraction=0.9), Noise(std=0.1)])
    observed = Noise(std=0.1).apply(random_gradient(0), context())
    checks = pipeline.checks.verify(observed)
    assert [check.outcome for check in checks] == ["hidden", "agrees"]
    assert "noise" in checks[0].detail


def test_a_clip_under_noise_is_checked_as_far_as_the_noise_allows() -> None:
    pipeline = Pipeline([Clip(bound=1.0), Noise(std=1.0)])
    for seed in range(1000):
        sent = pipeline.apply(random_gradient(seed, scale=100), context(seed))
        assert [check.outcome for check in pipeline.checks.verify(sent)] == ["agrees", "agrees"]
    unclipped = Noise(std=1.0).apply(random_gradient(0, scale=100), context())
    assert pipeline.checks.verify(unclipped)[0].outcome == "contradicts"


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
    assert Pipeline(steps).randomness.leaves_only_noise() == last


def test_noise_adds_in_squares() -> None:
    assert Pipeline([Noise(std=3), Noise(std=4)]).randomness.total_noise() == NoiseLaw(5)
    assert Pipeline([Noise(std=3), Sign(), Noise(std=4)]).randomness.total_noise() is None
    assert Pipeline([Sign()]).randomness.total_noise() is None


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
    mechanism = Pipeline(steps).sensitivity.guarantee()
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
            "Known are: bound, over, scope",
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
    accused, said = Noise(std=1.0).contradiction(sent, lambda *_: 0.0)
    assert accused
    assert "values of b are within 0.01" in said.text


def test_all_the_noise_after_the_clip_counts_for_the_guarantee() -> None:
    mechanism = Pipeline([Clip(bound=1), Noise(std=3), Noise(std=4)]).sensitivity.guarantee()
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(0.2)
    apart = Pipeline([Clip(bound=1), Noise(std=3), Sign(), Noise(std=4)]).sensitivity.guarantee()
    assert apart is not None
    assert apart.mu == pytest.approx(1 / 3)
    assert (
        Pipeline([Clip(bound=1), Noise(std=3, distribution="laplace")]).sensitivity.guarantee()
        is None
    )


def test_a_scale_for_each_tensor_is_not_one_for_all() -> None:
    sent = Sign(scale="layer_mean").apply(random_gradient(0), context())
    accused, said = Sign(scale="mean").contradiction(sent, lambda *_: 0.0)
    assert accused
    assert "the gradient" in said.text
    assert not Sign(scale="layer_mean").contradiction(sent, lambda *_: 0.0)[0]
    double = {**sent, "a.bias": sent["a.bias"] * torch.linspace(1, 1.1, 7)}
    accused, said = Sign(scale="layer_mean").contradiction(double, lambda *_: 0.0)
    assert accused
    assert "a.bias" in said.text


@pytest.mark.parametrize("defense", ALL, ids=str)
def test_a_gradient_of_zeros_is_sent_and_replicated_as_finite_numbers(defense: Defense) -> None:
    if isinstance(defense, Noise) or rounds_remembered(defense):
        pytest.skip("sends something else than zeros")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in random_gradient(0).items()}
    sent = defense.apply(zeros, context())
    assert bool((flat(sent) == 0).all())
    assert not defense.contradiction(sent, lambda *_: 0.0)[0]
    assert bool(flat(defense.replicate(random_gradient(0), sent)).isfinite().all())
    assert bool(flat(defense.replicate(zeros, sent)).isfinite().all())


@pytest.mark.parametrize(
    "defense", [d for d in DETERMINISTIC if not isinstance(d, RandomK)], ids=str
)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25)
def test_what_is_sent_would_be_sent_again(defense: Defense, seed: int) -> None:
    once = defense.apply(random_gradient(seed), context())
    twice = defense.apply(once, context())
    if isinstance(defense, Sign) and defense.scale != "none":
        twice = {name: once[name].abs().max() * tensor.sign() for name, tensor in twice.items()}
    torch.testing.assert_close(flat(twice), flat(once), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_random_mask_does_not_depend_on_the_values(scope: str) -> None:
    defense = RandomK(fraction=0.9, scope=scope)
    ramp = {"a": torch.arange(1.0, 101.0), "b": torch.arange(101.0, 201.0)}
    kept = torch.stack([flat(defense.apply(ramp, context(seed))) != 0 for seed in range(400)])
    assert bool((kept.sum(1) == 20).all())
    assert bool((kept.double().mean(0) - 0.1).abs().max() < 0.08)  # five standard deviations
    sent = flat(defense.apply(ramp, context()))
    assert torch.equal(sent[sent != 0], flat(ramp)[sent != 0])


def test_a_threshold_keeps_what_reaches_it() -> None:
    sent = Threshold(least=0.5).apply({"w": torch.tensor([0.4999, 0.5, -0.5, -0.1, 3])}, context())
    assert sent["w"].tolist() == [0, 0.5, -0.5, 0, 3]


@pytest.mark.parametrize(
    "defense",
    [
        Sparsify(fraction=0.8, error_feedback=3),
        Threshold(least=0.7, error_feedback=3),
        Sign(scale="mean", error_feedback=3),
    ],
    ids=str,
)
def test_error_feedback_loses_nothing_over_the_rounds(defense: Defense) -> None:
    """All that was sent and what is left is all that there was (Stich et al. 2018, section 2)."""
    plain = defense.model_copy(update={"error_feedback": 0})
    rounds = [random_gradient(seed) for seed in range(5)]
    left = {name: torch.zeros_like(tensor) for name, tensor in rounds[0].items()}
    for gradient in rounds[1:4]:
        whole = {name: tensor + left[name] for name, tensor in gradient.items()}
        sent = plain.apply(whole, context())
        left = {name: tensor - sent[name] for name, tensor in whole.items()}
    expected = plain.apply({n: t + left[n] for n, t in rounds[4].items()}, context())
    found = defense.apply(rounds[4], Context(torch.Generator(), earlier=rounds[:4]))
    assert torch.equal(flat(found), flat(expected))
    assert not torch.equal(flat(found), flat(plain.apply(rounds[4], context())))


def test_error_feedback_without_the_earlier_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs 2 gradients of earlier rounds; 1 are known"):
        Sparsify(fraction=0.9, error_feedback=2).apply(random_gradient(0), context(earlier=1))
    with pytest.raises(SpecError, match="error_feedback needs scale"):
        build_pipeline([DefenseSpec.model_validate({"name": "sign", "error_feedback": 1})])


@pytest.mark.parametrize("kind", [Sparsify, RandomK])
def test_what_earlier_rounds_add_hides_traces_and_has_no_bound(kind: type[Sparsify]) -> None:
    without, with_ = kind(fraction=0.9), kind(fraction=0.9, error_feedback=1)
    assert (without.leaves("zeros"), without.norm_bound(1.0)) == (True, 1.0)
    assert (with_.leaves("zeros"), with_.norm_bound(1.0)) == (False, None)
    assert str(without) == f"{kind.name}(fraction=0.9, scope=layer)"
    assert str(with_) == f"{kind.name}(fraction=0.9, scope=layer, error_feedback=1)"


@pytest.mark.parametrize("scale", ["mean", "layer_mean"])
def test_a_scaled_sign_raises_no_norm(scale: str) -> None:
    for seed in range(100):
        gradient = random_gradient(seed)
        sent = Sign(scale=scale).apply(gradient, context())
        assert float(norm(sent)) <= float(norm(gradient)) * (1 + 1e-6)
        assert float(flat(sent).abs().sum()) <= float(flat(gradient).abs().sum()) * (1 + 1e-6)
    assert Sign(scale=scale).norm_bound(1.0) == 1.0
    assert Sign().norm_bound(1.0) is None


@pytest.mark.parametrize("defense", STOCHASTIC, ids=str)
def test_rounding_at_random_is_right_on_average(defense: Defense) -> None:
    gradient = {"a": torch.linspace(-1, 1, 9), "b": torch.tensor([3.0, -1.0, 0.2, -0.1, 0.0])}
    expected = flat(gradient)
    if isinstance(defense, TernGrad) and defense.clip:
        defense = TernGrad(clip=1.0)
        deviations = [float(np.std(tensor.numpy())) for tensor in gradient.values()]
        limits = torch.tensor([deviations[0]] * 9 + [deviations[1]] * 5)
        expected = torch.minimum(torch.maximum(expected, -limits), limits)
    randomness, draws = context(), 4000
    sent = torch.stack([flat(defense.apply(gradient, randomness)) for _ in range(draws)])
    error = (sent.mean(0) - expected).abs()
    assert float(error.max()) <= 5 * float(sent.std(0).max()) / math.sqrt(draws)
    assert bool((sent[:, expected == 0] == 0).all())


@pytest.mark.parametrize("defense", STOCHASTIC, ids=str)
def test_the_likelihood_of_random_rounding_is_that_of_a_plain_loop(defense: Defense) -> None:
    random = torch.Generator().manual_seed(0)
    gradient = {"a": torch.randn(30, 40, generator=random), "b": torch.randn(500, generator=random)}
    sent = defense.apply(gradient, context())
    everything = [v for tensor in gradient.values() for v in tensor.flatten().tolist()]
    expected = 0.0
    for name in gradient:
        values = gradient[name].flatten().tolist()
        of = everything if getattr(defense, "scope", "layer") == "global" else values
        if isinstance(defense, TernGrad):
            levels = 1
            if defense.clip:
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
                most = defense.clip * deviation
                values = of = [max(-most, min(v, most)) for v in values]
            top = max(map(abs, of))
        else:
            levels = defense.levels
            top = math.hypot(*of) if defense.norm == "l2" else max(map(abs, of))
        for value, seen in zip(values, sent[name].flatten().tolist(), strict=True):
            level, exact = round(abs(seen) / top * levels), abs(value) / top * levels
            below = math.floor(exact)
            chance = {below: 1 - (exact - below), below + 1: exact - below}.get(level, 0.0)
            assert seen * value >= 0
            expected += math.log(max(chance, 1e-12))
    found = float(defense.log_likelihood_alone(gradient, sent))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("defense", STOCHASTIC, ids=str)
def test_no_rounding_makes_the_truth_impossible(defense: Defense) -> None:
    for seed in range(50):
        gradient = random_gradient(seed)
        sent = defense.apply(gradient, context(seed))
        other = {name: -tensor for name, tensor in gradient.items()}
        truth = float(defense.log_likelihood_alone(gradient, sent))
        assert math.isfinite(truth)
        assert truth > float(defense.log_likelihood_alone(other, sent))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_torchs_values(name: str) -> None:
    kind = FORMATS[name]
    bits = torch.arange(2 ** (8 * kind.itemsize)).to(
        torch.uint8 if kind.itemsize == 1 else torch.uint16
    )
    values = bits.view(kind).float()
    values = values[values.isfinite()]
    sent = FloatFormat(format=name).apply({"w": values}, context())
    assert torch.equal(sent["w"], values)
    random = torch.Generator().manual_seed(0)
    most = torch.finfo(kind).max
    points = (
        torch.randn(20_000, generator=random) * torch.randn(20_000, generator=random).exp() ** 4
    )
    sent = FloatFormat(format=name).apply({"w": points}, context())["w"]
    inside = points.abs() <= most
    assert torch.equal(sent[inside], points[inside].to(kind).float())
    assert torch.equal(sent[~inside], most * points[~inside].sign())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_scaled_format_keeps_the_largest_and_no_units(name: str, scale: float) -> None:
    defense, values = FloatFormat(format=name, scale="tensor"), random_gradient(0)["a.weight"]
    sent = defense.apply({"w": scale * values}, context())["w"]
    assert float(sent.abs().max()) == pytest.approx(scale * float(values.abs().max()))
    torch.testing.assert_close(sent / scale, defense.apply({"w": values}, context())["w"])


IDENTIFIED = [
    *ALL,
    Sparsify(fraction=0.99),
    RandomK(fraction=0.99),
    Threshold(least=2.0),
    Qsgd(levels=4, norm="max"),
]


def candidates(seed: int) -> list[Gradient]:
    """32 gradients that have most in common, and differ in length."""
    random = torch.Generator().manual_seed(seed)

    def drawn() -> Gradient:
        shapes = {"a": (20, 15), "b": (60,), "c": (5,)}
        return {n: torch.randn(shape, generator=random) ** 3 for n, shape in shapes.items()}

    def length() -> float:
        return math.exp(0.1 * float(torch.randn((), generator=random)))

    common = drawn()
    return [
        {n: size * (common[n] + 0.15 * own) for n, own in drawn().items()}
        for size in (length() for _ in range(32))
    ]


@pytest.mark.parametrize("defense", IDENTIFIED, ids=str)
def test_the_replica_identifies_no_less(defense: Defense) -> None:
    shown = {"with": 0, "without": 0, "likelihood": 0, "hidden": 0}
    for trial in range(100):
        gradients, truth = candidates(trial), trial % 32
        earlier = [candidates(1000 + trial)[i] for i in range(rounds_remembered(defense))]
        randomness = torch.Generator().manual_seed(trial)
        sent = defense.apply(gradients[truth], Context(randomness, earlier=earlier))
        stacked = {name: torch.stack([g[name] for g in gradients]) for name in sent}

        def score(
            how: str, gradient: Gradient, sent: Gradient = sent, defense: Defense = defense
        ) -> torch.Tensor:
            if how == "likelihood":
                return -defense.log_likelihood_alone(gradient, sent)
            if how == "without":
                return relative_l2(gradient, sent)
            seen = None if how == "hidden" else sent
            return relative_l2(defense.replicate(gradient, seen), sent)

        for how in shown:
            if how != "likelihood" or defense.stochastic:
                best = vmap(lambda g, how=how, score=score: score(how, g))(stacked).argmin()
                shown[how] += int(best) == truth
    assert shown["with"] >= shown["without"]
    assert shown["hidden"] >= shown["without"]
    if defense.stochastic:
        assert shown["likelihood"] >= shown["with"]


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zeros_midway_between_two_levels_are_matched_either_way(bits: int) -> None:
    rows = torch.randn(1, 40, generator=torch.Generator().manual_seed(bits))
    rows[:, ::2] = 0
    exact = {"head": torch.cat([rows, -rows])}  # as with two classes
    for rounding in (1e-7, -1e-7):
        sent = Quantize(bits=bits).apply({"head": exact["head"] + rounding}, context())
        replica = Quantize(bits=bits).replicate(exact, sent)
        assert float(relative_l2(replica, sent)) < 1e-6
