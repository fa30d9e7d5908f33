from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ggl_audit.attack.matching import Matching
from ggl_audit.audit import run_audit
from ggl_audit.basics.gradient import Gradient, each, flat, norm, stack, take
from ggl_audit.case.capturing import capture_gradient
from ggl_audit.case.loading import load_client
from ggl_audit.case.preparation import prepare
from ggl_audit.cli import app
from ggl_audit.client.clients import DeclaredClient
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import (
    Clip,
    Context,
    Defense,
    Noise,
    Pipeline,
    SecAdam,
    SecureAggregation,
    Sign,
    Sparsify,
)
from ggl_audit.defenses.sec_adam import last_gradient
from ggl_audit.errors import SpecError
from ggl_audit.inputs.capture import write_capture
from ggl_audit.inputs.images import digits
from ggl_audit.inputs.model import ClientModel
from ggl_audit.spec import Spec
from tests.conftest import Counter, contexts, plain_gradient

CPU = torch.device("cpu")
Cohort = tuple[Pipeline, ClientModel]
Steps = list[dict[str, Any]]

TRAINS = {"capture__kind": "update", "capture__local": {"lr": 0.1, "epochs": 2}}


def dp_sgd(multiplier: float = 2.0, bound: float = 0.5) -> dict[str, Any]:
    return {"name": "dp_sgd", "bound": bound, "noise_multiplier": multiplier}


def dp_fedavg(clients: int, multiplier: float = 2.0) -> dict[str, Any]:
    recipe = {"name": "dp_fedavg", "bound": 0.5, "noise_multiplier": multiplier}
    return {**recipe, "clients": clients}


def clip(bound: float, unit: str = "client", scope: str = "global") -> dict[str, Any]:
    return {"name": "clip", "bound": bound, "unit": unit, "scope": scope}


def noise(std: float, **more: Any) -> dict[str, Any]:
    return {"name": "noise", "std": std, **more}


def together(clients: int) -> dict[str, Any]:
    return {"name": "secure_aggregation", "clients": clients}


SPARSIFY = {"name": "sparsify", "fraction": 0.9}
SIGN = {"name": "sign"}
MIXUP = {"name": "mixup"}
ATS = {"name": "ats", "policies": ["rotate 3"]}


def context(seed: int = 0, **more: Any) -> Context:
    return Context(torch.Generator().manual_seed(seed), **more)


def random_gradient(seed: int, scale: float = 1.0) -> Gradient:
    random = torch.Generator().manual_seed(seed)
    return {
        "a": scale * torch.randn(30, 20, generator=random, dtype=torch.float64),
        "b": scale * torch.randn(20, generator=random, dtype=torch.float64),
    }


@pytest.fixture
def cohort(sample: Callable[..., Spec]) -> Callable[..., Cohort]:
    def build(defense: Steps, batch_size: int = 1, **keys: Any) -> Cohort:
        spec = sample(
            "undefended",
            capture__batch_size=batch_size,
            evidence__truth=None,
            defense=defense,
            **keys,
        )
        return load_client(spec, CPU)

    return build


# Secure aggregation.


@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize(
    "steps",
    [[], [Clip(bound=1.0)], [Sparsify(fraction=0.7)], [Sign()], [Clip(bound=1.0), Sign()]],
    ids=lambda steps: str(Pipeline(steps)),
)
def test_a_release_is_the_mean_of_what_each_client_would_send_alone(
    steps: list[Defense], clients: int
) -> None:
    gradients = [random_gradient(seed, scale=1.0 + seed) for seed in range(clients)]
    alone = [Pipeline(steps).apply(gradient, context()) for gradient in gradients]
    sent = Pipeline([*steps, SecureAggregation(clients=clients)]).release(
        gradients, [context(seed) for seed in range(clients)]
    )
    expected = torch.stack([flat(gradient) for gradient in alone]).mean(0)
    torch.testing.assert_close(flat(sent), expected)


def test_the_mean_of_batches_of_clients_is_that_of_all_images(
    cohort: Callable[..., Cohort],
) -> None:
    defense, model = cohort([together(3)], batch_size=2)
    data = digits("private")
    sent = DeclaredClient(ClientGradients(model, defense), defense).send(
        data.images[:6][None], data.labels[:6][None], contexts(1)
    )
    alone = [plain_gradient(model, data.images[i], int(data.labels[i])) for i in range(6)]
    expected = torch.stack([flat(gradient) for gradient in alone]).mean(0)
    torch.testing.assert_close(flat(take(sent, 0)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 4, 25])
def test_noise_of_each_client_is_less_on_their_mean(clients: int) -> None:
    defense = Pipeline(
        [Clip(bound=1.0), Noise(std=0.3), SecureAggregation(clients=clients), Noise(std=0.1)]
    )
    total = defense.randomness.total_noise()
    assert total is not None
    assert total.std == pytest.approx(math.hypot(0.3 / math.sqrt(clients), 0.1))
    empty = {"a": torch.zeros(200, 500)}
    contexts = [context(seed) for seed in range(clients)]
    sent = defense.release([empty] * clients, contexts)["a"]
    assert float(sent.std()) == pytest.approx(total.std, rel=0.02)
    assert defense.likelihood.is_known()
    assert defense.randomness.leaves_only_noise()


def test_the_likelihood_counts_with_noise_of_each_client() -> None:
    """What is left of the noise on the mean orders candidates as its density does."""
    steps = [Clip(bound=1.0), Noise(std=0.3), SecureAggregation(clients=4)]
    defense = Pipeline(steps)
    gradients = [random_gradient(seed) for seed in range(4)]
    observed = defense.release(gradients, [context(seed) for seed in range(4)])
    known = defense.replica.share(gradients[1:], observed)
    scores, expected = [], []
    for seed in (0, 10, 11, 12):
        one = random_gradient(seed)
        scores.append(float(defense.likelihood.mismatch([one], observed, known)))
        sent = [Clip(bound=1.0).apply(g, context()) for g in (one, *gradients[1:])]
        mean = torch.stack([flat(gradient) for gradient in sent]).mean(0)
        expected.append(float((mean - flat(observed)).square().sum()))
    size = float(norm(observed)) ** 2
    assert scores == pytest.approx([value / size for value in expected], rel=1e-6)


def test_laplace_noise_of_each_client_has_no_simple_likelihood_on_the_mean() -> None:
    steps = [Noise(std=0.3, distribution="laplace"), SecureAggregation(clients=4)]
    assert not Pipeline(steps).likelihood.is_known()


@pytest.mark.parametrize("steps", [[], [Noise(std=1e-3)]], ids=["", "noise"])
def test_the_check_of_the_norm_survives_aggregation(steps: list[Defense]) -> None:
    defense = Pipeline([Clip(bound=0.5), *steps, SecureAggregation(clients=3)])
    gradients = [random_gradient(0)] * 3
    contexts = [context(seed) for seed in range(3)]
    outcomes = [
        defense.checks.verify(sent)[0].outcome
        for sent in (
            defense.release(gradients, contexts),
            Pipeline([*steps, SecureAggregation(clients=3)]).release(gradients, contexts),
        )
    ]
    assert outcomes == ["agrees", "contradicts"]


def test_a_clip_beyond_what_a_mean_shows_is_said_to_be_hidden() -> None:
    defense = Pipeline([Sparsify(fraction=0.9), Sign(), SecureAggregation(clients=3)])
    sent = defense.release([random_gradient(s) for s in range(3)], [context()] * 3)
    outcomes = {check.step.split("(")[0]: check.outcome for check in defense.checks.verify(sent)}
    assert outcomes["sparsify"] == outcomes["sign"] == "hidden"


# What is promised.


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("multiplier", [0.5, 3.0])
def test_dp_sgd_promises_its_noise_multiplier(
    cohort: Callable[..., Cohort], batch_size: int, reduction: str, multiplier: float
) -> None:
    loss = {"reduction": reduction}
    defense, _ = cohort([dp_sgd(multiplier)], batch_size, model__loss=loss)
    mechanism = defense.sensitivity.guarantee("sample")
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(1 / multiplier)
    share = 0.5 / (batch_size if reduction == "mean" else 1)
    assert mechanism.bound == pytest.approx(share)
    assert mechanism.std == pytest.approx(multiplier * share)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_sample_adds_more_to_dp_sgd_than_is_promised(
    cohort: Callable[..., Cohort], reduction: str
) -> None:
    defense, model = cohort([dp_sgd(bound=0.2)], 4, model__loss={"reduction": reduction})
    mechanism = defense.sensitivity.guarantee("sample")
    assert mechanism is not None
    data = digits("private")
    matching = Matching(model, defense)
    with_one, without = (
        flat(take(matching.clients.gradients(data.images[one][None], data.labels[one][None]), 0))
        for one in (torch.tensor([0, 1, 2, 3]), torch.tensor([50, 1, 2, 3]))
    )
    moved = float((with_one - without).norm())
    assert 0.5 * mechanism.bound < moved <= 2 * mechanism.bound * (1 + 1e-5)


@pytest.mark.parametrize("clients", [1, 3, 20])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("trains", [False, True])
def test_dp_fedavg_promises_its_noise_multiplier_to_clients(
    cohort: Callable[..., Cohort], clients: int, batch_size: int, trains: bool
) -> None:
    keys = TRAINS if trains else {}
    defense, _ = cohort([dp_fedavg(clients, 2.5)], batch_size, **keys)
    mechanism = defense.sensitivity.guarantee("client")
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(1 / 2.5)
    assert mechanism.bound == pytest.approx(0.5 / clients)
    assert (defense.sensitivity.guarantee("sample") is None) == (batch_size > 1)
    better = defense.sensitivity.guarantee()
    assert better is not None
    assert better.mu == pytest.approx(1 / 2.5)


@pytest.mark.parametrize("clients", [2, 9])
def test_noise_of_each_client_adds_up_to_a_promise(
    cohort: Callable[..., Cohort], clients: int
) -> None:
    defense, _ = cohort([clip(1.0), noise(2.0), together(clients)], 3)
    mechanism = defense.sensitivity.guarantee("client")
    assert mechanism is not None
    assert mechanism.mu == pytest.approx(1 / clients / (2.0 / math.sqrt(clients)))


def test_dp_sgd_of_a_cohort_divides_by_all(cohort: Callable[..., Cohort]) -> None:
    defense, _ = cohort([clip(1.0, "sample"), together(5), noise(0.1)], 4)
    mechanism = defense.sensitivity.guarantee("sample")
    assert mechanism is not None
    assert mechanism.bound == pytest.approx(1 / 20)
    assert defense.sensitivity.guarantee("client") is None


PROMISES: list[tuple[str, Steps, int, dict[str, Any], float | None, float | None]] = [
    ("clip of the batch", [clip(1.0), noise(0.5)], 4, {}, None, 1.0),
    ("clip of the only sample", [clip(1.0), noise(0.5)], 1, {}, 1.0, 1.0),
    ("clip of the only sample's update", [clip(1.0), noise(0.5)], 1, TRAINS, 1.0, 1.0),
    ("clip of layers", [clip(1.0, "sample", "layer"), noise(0.5)], 4, {}, None, None),
    ("no clip", [noise(0.5)], 4, {}, None, None),
    ("no noise", [clip(1.0, "sample")], 4, {}, None, None),
    ("noise first", [noise(0.5), clip(1.0)], 1, {}, None, None),
    ("Laplace", [clip(1.0), noise(0.5, distribution="laplace")], 1, {}, None, None),
    ("sparsified shares", [clip(1.0, "sample"), SPARSIFY, noise(0.5)], 4, {}, None, None),
    ("signs", [clip(1.0, "sample"), SIGN, noise(0.5)], 4, {}, None, None),
    ("clipped again", [clip(1.0, "sample"), clip(0.8), noise(0.5)], 4, {}, 0.25, 0.8),
    (
        "layers clipped again",
        [clip(1.0, "sample"), clip(0.8, scope="layer"), noise(0.5)],
        4,
        {},
        0.25,
        None,
    ),
    (
        "sparsified, then clipped",
        [clip(1.0, "sample"), SPARSIFY, clip(0.8), noise(0.5)],
        4,
        {},
        None,
        0.8,
    ),
    ("after the noise", [clip(1.0, "sample"), noise(0.5), SIGN], 4, {}, 0.25, None),
    ("local training", [clip(1.0, "sample"), noise(0.5)], 4, TRAINS, None, None),
    ("local training of one", [clip(1.0, "sample"), noise(0.5)], 1, TRAINS, None, None),
]


@pytest.mark.parametrize(
    ("steps", "batch_size", "keys", "sample_bound", "client_bound"),
    [row[1:] for row in PROMISES],
    ids=[row[0] for row in PROMISES],
)
def test_a_promise_is_made_to_whom_it_is_kept(
    cohort: Callable[..., Cohort],
    steps: Steps,
    batch_size: int,
    keys: dict[str, Any],
    sample_bound: float | None,
    client_bound: float | None,
) -> None:
    defense, _ = cohort(steps, batch_size, **keys)
    for unit, expected in (("sample", sample_bound), ("client", client_bound)):
        found = defense.sensitivity.guarantee(unit)
        assert (None if found is None else found.bound) == expected, unit
    bounds = [bound for bound in (sample_bound, client_bound) if bound is not None]
    better = defense.sensitivity.guarantee()
    assert (None if better is None else better.bound) == min(bounds, default=None)


def test_a_clip_of_mixed_images_does_not_bound_a_sample(cohort: Callable[..., Cohort]) -> None:
    defense, model = cohort([MIXUP, dp_sgd(multiplier=1.0, bound=0.1)], 4)
    data = digits("private")
    matching = Matching(model, defense)
    ones = torch.tensor([[0, 1, 2, 3], [0, 53, 2, 3]])
    drawn = {"mixup.weight": torch.tensor([0.5, 0.5])}
    sent = matching.clients.gradients(data.images[ones], data.labels[ones], drawn)
    moved = float((flat(take(sent, 0)) - flat(take(sent, 1))).norm())
    mechanism = defense.sensitivity.guarantee("sample")
    # Replacing moves by no more than removing one and adding another.
    assert mechanism is None or moved <= 2 * mechanism.bound
    assert mechanism is None or mechanism.bound >= 2 * 0.1 / 4


def test_a_clip_of_the_mean_lets_one_client_turn_it_around() -> None:
    """Means of +1 and of -1 are two bounds apart; one client makes the difference."""
    steps: list[Defense] = [SecureAggregation(clients=2), Clip(bound=1.0)]
    first = {"w": torch.tensor([10.0, 0.0])}
    second = {"w": torch.tensor([-30.0, 0.0])}
    nobody = each(torch.zeros_like, second)
    released = [
        flat(Pipeline(steps).release([first, other], [context()] * 2)) for other in (second, nobody)
    ]
    moved = float((released[0] - released[1]).norm())
    mechanism = Pipeline([*steps, Noise(std=1.0)]).sensitivity.guarantee("client")
    assert mechanism is None or moved <= mechanism.bound


@pytest.mark.parametrize("unit", ["sample", "client"])
def test_a_guarantee_that_the_steps_do_not_give_is_refused(
    sample: Callable[..., Spec], unit: str
) -> None:
    promise = {"unit": unit, "reduction": "mean", "rounds": 1, "sampling_rate": 1, "delta": 1e-5}
    steps = [clip(1.0), noise(0.5)] if unit == "sample" else [dp_sgd()]
    spec = sample(
        "undefended", defense=steps, capture__batch_size=4, guarantee=promise, evidence__truth=None
    )
    with pytest.raises(SpecError, match=f"not differentially private for one {unit}"):
        prepare(spec)


def test_the_update_of_clipped_samples_does_not_contradict_the_clip(
    cohort: Callable[..., Cohort],
) -> None:
    local = {"lr": 1.0, "epochs": 5}
    defense, model = cohort([clip(0.1, "sample")], 2, capture__kind="update", capture__local=local)
    data = digits("private")
    sent = DeclaredClient(ClientGradients(model, defense), defense).send(
        data.images[:2][None], data.labels[:2][None], contexts(1)
    )
    assert [check.outcome for check in defense.checks.verify(take(sent, 0))] != ["contradicts"]


# Orders.


@pytest.mark.parametrize(
    "steps",
    [
        [clip(1.0), ATS],
        [noise(0.1), MIXUP],
        [clip(1.0), {"name": "precode"}],
        [together(2), ATS],
        [together(2), together(2)],
        [{"name": "sec_adam"}, together(2)],
        [together(2), SIGN, together(2)],
        [dp_fedavg(2), together(2)],
        [clip(1.0), clip(1.0, "sample")],
        [SPARSIFY, dp_sgd()],
        [together(2), clip(1.0, "sample")],
        [clip(1.0, "sample"), ATS],
    ],
    ids=lambda steps: " ".join(step["name"] for step in steps),
)
def test_an_order_that_no_client_can_have_is_refused(
    cohort: Callable[..., Cohort], steps: Steps
) -> None:
    with pytest.raises(SpecError, match=r"cannot come after|aggregates twice") as error:
        cohort(steps, 2)
    assert error.value.key == ("defense",)


@pytest.mark.parametrize(
    "steps",
    [
        [ATS, clip(1.0, "sample"), clip(1.0), noise(0.1), together(2), SPARSIFY, noise(0.1)],
        [MIXUP, SIGN, {"name": "sec_adam", "clients": 2}],
        [clip(1.0, "sample"), clip(0.5, "sample")],
    ],
    ids=lambda steps: " ".join(step["name"] for step in steps),
)
def test_an_order_that_a_client_can_have_is_taken(
    cohort: Callable[..., Cohort], steps: Steps
) -> None:
    assert len(cohort(steps, 2)[0].steps) == len(steps)


# SecAdam.


def adam_direction(
    histories: list[list[Gradient]], beta1: float, beta2: float, eps: float
) -> torch.Tensor:
    """The formulas, one after another, for gradients of each client from the oldest on."""
    means, variances = [], []
    for history in histories:
        m = v = torch.zeros_like(flat(history[0]))
        for gradient in history:
            g = flat(gradient)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
        t = len(history)
        means.append(m / (1 - beta1**t))
        variances.append(v / (1 - beta2**t) + eps**2)
    return torch.stack(means).mean(0) / torch.stack(variances).mean(0).sqrt()


BETAS = [(0.9, 0.999), (0.5, 0.5), (0.0, 0.9)]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("clients", [1, 3])
def test_sec_adam_is_that_of_a_plain_loop(
    clients: int, rounds: int, betas: tuple[float, float]
) -> None:
    histories = [
        [random_gradient(100 * client + t, 0.1 * (1 + client)) for t in range(rounds)]
        for client in range(clients)
    ]
    step = SecAdam(clients=clients, round=rounds, beta1=betas[0], beta2=betas[1], eps=1e-3)
    assert step.earlier_rounds == rounds - 1
    sent = Pipeline([step]).release(
        [history[-1] for history in histories],
        [context(earlier=tuple(history[:-1])) for history in histories],
    )
    expected = adam_direction(histories, *betas, 1e-3)
    torch.testing.assert_close(flat(sent).double(), expected, rtol=1e-5, atol=1e-6)


def test_fresh_moments_of_one_client_are_signs() -> None:
    gradient = random_gradient(0)
    gradient["b"][:5] = 0.0
    sent = Pipeline([SecAdam()]).apply(gradient, context())
    torch.testing.assert_close(flat(sent), flat(each(torch.sign, gradient)).float())


def test_fresh_moments_of_tiny_values_are_still_signs() -> None:
    """Squares of float32 gradients vanish below 1e-22; those of double precision do not."""
    gradient = {"w": torch.tensor([1e-30, -1e-25, 1.0, 0.0])}
    sent = Pipeline([SecAdam(eps=1e-40)]).apply(gradient, context())
    assert sent["w"].tolist() == pytest.approx([1.0, -1.0, 1.0, 0.0], abs=1e-5)


def test_matching_ranks_fresh_moments_as_it_ranks_signs(model: ClientModel) -> None:
    data = digits("private")
    candidates = data.images[:30][None]
    labels = data.labels[:1].expand(1, 30)
    gradient = plain_gradient(model, data.images[0], int(data.labels[0]))
    orders = []
    for step in (SecAdam(), Sign()):
        defense = Pipeline([step])
        observed = stack([defense.apply(gradient, context())])
        found = Matching(model, defense).distances(candidates, labels, observed)[0]
        orders.append(found)
        assert int(found.argmin()) == 0
    torch.testing.assert_close(orders[0], orders[1], rtol=0.02, atol=0.01)
    assert orders[0].argsort().tolist()[:5] == orders[1].argsort().tolist()[:5]


def test_several_clients_are_matched_as_they_are_sent(model: ClientModel) -> None:
    data = digits("private")
    defense = Pipeline([SecAdam(clients=3)])
    matching = Matching(model, defense)
    observed = DeclaredClient(matching.clients, defense).send(
        data.images[:3][None], data.labels[:3][None], contexts(1)
    )
    found = matching.distances(data.images[:3][None, None], data.labels[:3][None, None], observed)
    assert float(found) < 1e-2
    others = data.images[1:3][None], data.labels[1:3][None]
    known = matching.distances(
        data.images[:9][None, :, None], data.labels[:1].expand(1, 9, 1), observed, others
    )
    assert int(known.argmin()) == 0


@pytest.mark.parametrize("clients", [3])
def test_sparsified_clients_under_sec_adam_are_matched_as_they_are_sent(
    model: ClientModel, clients: int
) -> None:
    data = digits("private")
    defense = Pipeline([Sparsify(fraction=0.9), SecAdam(clients=clients)])
    matching = Matching(model, defense)
    images, labels = data.images[:clients][None], data.labels[:clients][None]
    observed = DeclaredClient(matching.clients, defense).send(images, labels, contexts(len(labels)))
    assert float(matching.distances(images[None], labels[None], observed)) < 1e-2
    assert "contradicts" not in [c.outcome for c in defense.checks.verify(take(observed, 0))]


def test_sparsified_earlier_rounds_do_not_contradict(model: ClientModel) -> None:
    data = digits("private")
    defense = Pipeline([Sparsify(fraction=0.9), SecAdam(round=2)])
    gradients = [plain_gradient(model, data.images[i], int(data.labels[i])) for i in range(2)]
    sent = defense.release([gradients[1]], [context(earlier=(gradients[0],))])
    assert "contradicts" not in [check.outcome for check in defense.checks.verify(sent)]


def test_no_history_of_gradients_exceeds_the_bound_on_the_values() -> None:
    random = torch.Generator().manual_seed(0)
    for trial in range(1000):
        rounds, clients = 1 + trial % 6, 1 + trial % 3
        beta1, beta2 = BETAS[trial % len(BETAS)]
        step = SecAdam(clients=clients, round=rounds, beta1=beta1, beta2=beta2)
        # A few of very different sizes, as a bound is reached where one round outweighs all.
        sizes = torch.exp(8 * torch.rand(clients, rounds, 1, generator=random) - 4)
        values = sizes * torch.randn(clients, rounds, 50, generator=random)
        if rounds > 1 and trial % 2:
            values[:, :-1] *= 1e-3
        sent = Pipeline([step]).release(
            [{"w": own[-1]} for own in values],
            [context(earlier=tuple({"w": g} for g in own[:-1])) for own in values],
        )
        contradicts, said = step.contradiction(sent, lambda size, confidence: 0.0)
        assert not contradicts, (trial, said)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("clients", [1, 3])
def test_a_value_beyond_the_bound_contradicts(rounds: int, clients: int) -> None:
    step = SecAdam(round=rounds, clients=clients)
    histories = [
        [random_gradient(10 * client + t) for t in range(rounds)] for client in range(clients)
    ]
    sent = Pipeline([step]).release(
        [history[-1] for history in histories],
        [context(earlier=tuple(history[:-1])) for history in histories],
    )
    assert step.contradiction(sent, lambda size, confidence: 0.0)[0] is False
    sent["a"][0, 0] = 1.01 * step._limit()
    assert step.contradiction(sent, lambda size, confidence: 0.0)[0] is True


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_raw_gradient_in_place_of_fresh_moments_contradicts(
    model: ClientModel, scale: float
) -> None:
    data = digits("private")
    gradient = plain_gradient(model, data.images[0], int(data.labels[0]))
    raw = each(lambda tensor: scale * tensor, gradient)
    assert Pipeline([SecAdam()]).checks.verify(raw)[0].outcome == "contradicts"


@given(
    beta1=st.floats(0, 0.99),
    scale=st.floats(1e-6, 1e6),
    rounds=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_the_last_gradient_is_in_two_moments_in_a_row(
    beta1: float, scale: float, rounds: int, seed: int
) -> None:
    gradients = [random_gradient(seed + t, scale) for t in range(rounds)]
    before = moment = each(torch.zeros_like, gradients[0])
    for gradient in gradients:
        before = moment
        moment = {n: beta1 * before[n] + (1 - beta1) * gradient[n] for n in gradient}
    found = last_gradient(moment, before, beta1)
    torch.testing.assert_close(flat(found), flat(gradients[-1]), rtol=1e-6, atol=1e-9 * scale)


SEARCHED = {
    "attack__evaluations": 600,
    "evidence__matching_trials": 60,
    "evidence__reconstruction_trials": 8,
}


@pytest.mark.parametrize("warm", [False, True])
def test_moments_in_the_clear_are_the_gradient(
    sample: Callable[..., Spec], model: ClientModel, tmp_path: Path, warm: bool
) -> None:
    data = digits("private")
    last, earlier = (plain_gradient(model, data.images[i], int(data.labels[i])) for i in (0, 30))
    previous = each(lambda tensor: 0.2 * tensor, earlier if warm else each(torch.zeros_like, last))
    moment = {n: 0.8 * previous[n] + 0.2 * last[n] for n in last}
    write_capture(tmp_path / "m.safetensors", moment)
    keys: dict[str, Any] = {"capture__kind": "moments", "capture__beta1": 0.8}
    if warm:
        write_capture(tmp_path / "before.safetensors", previous)
        keys["capture__previous"] = str(tmp_path / "before.safetensors")
    spec = sample(
        "undefended",
        capture__gradient=str(tmp_path / "m.safetensors"),
        evidence__truth=None,
        **keys,
        **SEARCHED,
    )
    report = run_audit(spec, Counter())
    assert "GGL004" in [finding.id for finding in report.findings]
    assert report.verdict.grade in ("D", "F"), report.verdict
    assert report.captured.norm == pytest.approx(float(norm(last)), rel=1e-4)
    assert report.captured.labels == [int(data.labels[0])]


def test_what_was_sent_beside_the_moments_before_counts(
    sample: Callable[..., Spec], model: ClientModel, tmp_path: Path
) -> None:
    data = digits("private")
    gradient = plain_gradient(model, data.images[0], int(data.labels[0]))
    before = each(lambda tensor: 0.2 * tensor, gradient)
    write_capture(tmp_path / "m.safetensors", gradient)
    keys: dict[str, Any] = {
        "capture__gradient": str(tmp_path / "m.safetensors"),
        "capture__previous": str(tmp_path / "before.safetensors"),
        "capture__kind": "moments",
        "evidence__truth": None,
    }
    write_capture(tmp_path / "before.safetensors", before)
    assert prepare(sample("undefended", **keys)).doubts == []
    write_capture(tmp_path / "before.safetensors", {**before, "odd": torch.ones(2)})
    (doubt,) = prepare(sample("undefended", **keys)).doubts
    assert "'odd'" in doubt.text
    assert "not measured" in doubt.text


# Encryption.


def test_a_ciphertext_ends_the_audit_with_who_holds_the_key(samples: Path, tmp_path: Path) -> None:
    spec = samples / "digits_undefended.yaml"
    step = [{"name": "encryption", "key_holder": "the hospital", "view": "outsider"}]
    result = CliRunner().invoke(
        app,
        [
            "run",
            str(spec),
            "--device=cpu",
            f"--set=defense={json.dumps(step)}",
            "--exit-zero",
            "-o",
            str(tmp_path / "r.json"),
        ],
    )
    assert result.exit_code == 3, result.output
    message = " ".join(result.stderr.split())
    assert "the hospital holds the key" in message
    assert "not the same as safe" in message
    assert result.stdout == ""
    assert not (tmp_path / "r.json").exists()


def test_the_key_holder_is_audited_as_without_encryption(sample: Callable[..., Spec]) -> None:
    step = {"name": "encryption", "key_holder": "the server"}
    reports = [
        run_audit(sample("undefended", defense=defense, evidence__truth=None), Counter())
        for defense in ([], [step])
    ]
    plain, encrypted = (report.evidence for report in reports)
    assert reports[0].verdict.grade == reports[1].verdict.grade
    assert plain.ceiling == encrypted.ceiling
    assert plain.floor == encrypted.floor
    assert any("the server holds the key" in said for said in reports[1].assumptions)


def test_a_capture_is_the_same_under_the_eyes_of_the_key_holder(
    sample: Callable[..., Spec], samples: Path
) -> None:
    step = {"name": "encryption", "key_holder": "the server"}
    image, sent = samples / "captures" / "private.png", []
    for defense in ([noise(0.1)], [noise(0.1), step], [step, noise(0.1)]):
        spec = sample("undefended", defense=defense, evidence__truth=None)
        sent.append(flat(capture_gradient(spec, [image], [3])))
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])
