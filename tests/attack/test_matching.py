from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ggl_audit.attack.matching import Matching
from ggl_audit.attack.objective import LatentObjective, penalty
from ggl_audit.basics.gradient import Gradient, flat, stack
from ggl_audit.client.gradients import ClientGradients
from ggl_audit.defenses import Clip, Context, Defense, Drawn, Pipeline, Quantize, Sign, Sparsify
from ggl_audit.errors import SpecError
from ggl_audit.inputs.model import ClientModel
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.priors.loading import load_prior
from ggl_audit.spec import RegularizerSpec, Spec
from tests.conftest import plain_gradient
from tests.inputs.test_model import USER_MODELS

PIPELINES: list[list[Defense]] = [
    [],
    [Sparsify(fraction=0.9)],
    [Sparsify(fraction=0.9, scope="global"), Clip(bound=0.5)],
    [Sign()],
    [Clip(bound=1.0), Quantize(bits=4)],
    [Clip(bound=0.3, scope="layer")],
]


def context() -> Context:
    return Context(torch.Generator().manual_seed(0))


def loop_distance(replica: Gradient, observed: Gradient, distance: str) -> float:
    a, b = flat(replica).double(), flat(observed).double()
    if distance == "l2":
        return float(((a - b) ** 2).sum() / (b**2).sum())
    return float(1 - (a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("steps", PIPELINES, ids=lambda s: str(Pipeline(s)))
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_batched_distances_are_those_of_a_plain_loop(
    model: ClientModel, steps: list[Defense], distance: str, chunk: int | None
) -> None:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, 4, 1, 16, 16, generator=random)
    labels = torch.randint(10, (2, 4), generator=random)
    truths = torch.rand(2, 1, 16, 16, generator=random)
    defense = Pipeline(steps)
    observed = [defense.apply(plain_gradient(model, t, 3), context()) for t in truths]
    matching = Matching(model, defense, distance)
    if chunk is not None:
        matching.clients.chunk = chunk
    batched = matching.distances(images, labels, stack(observed))
    for t in range(2):
        for n in range(4):
            gradient = plain_gradient(model, images[t, n], int(labels[t, n]))
            replica = defense.replica.replicate([gradient], observed[t])
            expected = loop_distance(replica, observed[t], distance)
            # The sign of a value that is zero up to rounding may fall either way.
            tolerance = 1e-2 if any(isinstance(s, (Sign, Quantize)) for s in steps) else 1e-4
            assert float(batched[t, n]) == pytest.approx(expected, rel=tolerance)


def test_the_true_image_has_distance_zero(model: ClientModel) -> None:
    truth = torch.rand(1, 16, 16)
    for steps in PIPELINES:
        defense = Pipeline(steps)
        observed = defense.apply(plain_gradient(model, truth, 3), context())
        got = Matching(model, defense).distances(
            truth[None, None], torch.tensor([[3]]), stack([observed])
        )
        assert float(got) < 1e-3


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_distances_do_not_see_the_scale_of_the_loss(
    sample: Callable[..., Spec], distance: str
) -> None:
    image, labels = torch.rand(1, 1, 1, 16, 16), torch.tensor([[2]])
    found = []
    for scale in (1.0, 1e-5):
        spec = sample("undefended", model__loss={"scale": scale})
        model = load_model(spec, torch.device("cpu"))
        observed = plain_gradient(model, torch.full((1, 16, 16), 0.25), 2)
        matching = Matching(model, Pipeline(), distance)
        found.append(float(matching.distances(image, labels, stack([observed]))))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_chunks_bound_what_is_held_at_a_time(
    model: ClientModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    matching = Matching(model, Pipeline([Quantize(bits=4)]), memory=16 * 4 * model.size * 5)
    largest = 0
    whole = matching.clients.gradients

    def watched(images: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> Gradient:
        nonlocal largest
        largest = max(largest, len(images))
        return whole(images, labels, drawn)

    monkeypatch.setattr(matching.clients, "gradients", watched)
    observed = plain_gradient(model, torch.rand(1, 16, 16), 3)
    images, labels = torch.rand(3, 50, 1, 16, 16), torch.zeros(3, 50, dtype=torch.long)
    assert matching.distances(images, labels, stack([observed] * 3)).shape == (3, 50)
    assert largest <= 20


def test_a_model_that_cannot_be_batched_is_refused(
    sample: Callable[..., Spec], tmp_path: object
) -> None:
    path = tmp_path / "nets.py"
    path.write_text(USER_MODELS)
    spec = sample("undefended", model__factory=f"{path}:Branching", model__weights=None)
    with pytest.raises(SpecError, match="cannot be evaluated for many candidates"):
        ClientGradients(load_model(spec, torch.device("cpu")), Pipeline()).try_out()


def test_the_regularizers_are_the_papers() -> None:
    latents = torch.tensor([[[1.0, -1.0, 3.0, 1.0]]])
    mean, variance = 1.0, 2.0
    kl = penalty(latents, RegularizerSpec(name="kl", weight=0.5))
    expected = 0.5 * 0.5 * (mean**2 + variance - torch.tensor(variance).log() - 1)
    torch.testing.assert_close(kl, expected.view(1, 1))
    shell = penalty(latents, RegularizerSpec(name="norm", weight=0.5))
    torch.testing.assert_close(shell, torch.tensor([[0.5 * (12 / 4 - 1) ** 2]]))
    assert float(penalty(latents, RegularizerSpec())) == 0


def test_the_objective_is_the_distance_of_the_decoded_latent(sample: Callable[..., Spec]) -> None:
    spec = sample("sparsified")
    model = load_model(spec, torch.device("cpu"))
    prior = load_prior(spec, model)
    defense = Pipeline([Sparsify(fraction=0.9)])
    latents = torch.randn(2, 3, prior.size)
    labels = torch.tensor([4, 5])
    observed = [
        defense.apply(plain_gradient(model, torch.rand(1, 16, 16), int(y)), context())
        for y in labels
    ]
    objective = LatentObjective(
        Matching(model, defense, "l2"), prior, stack(observed), labels, RegularizerSpec(name="norm")
    )
    losses = objective.losses(latents)
    for t in range(2):
        for n in range(3):
            image = prior.decode(latents[t, n][None], labels[t][None])[0]
            gradient = plain_gradient(model, image, int(labels[t]))
            expected = loop_distance(
                defense.replica.replicate([gradient], observed[t]), observed[t], "l2"
            ) + float(penalty(latents[t, n], RegularizerSpec(name="norm")))
            assert float(losses[t, n]) == pytest.approx(expected, rel=1e-4)
