"""ATS and mixup against Pillow, torchvision and arithmetic by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
from PIL import Image, ImageOps
from pydantic import ValidationError
from scipy import stats
from torch import nn
from torch.func import functional_call, grad, vmap

from ggl_audit.basics.gradient import Gradient, flat
from ggl_audit.defenses.ats import POLICY, SIGNS, TRANSFORMATIONS, Ats
from ggl_audit.defenses.base import Context, Drawn
from ggl_audit.defenses.mixup import WEIGHT, Mixup
from ggl_audit.defenses.pipeline import Pipeline

HYBRID = Ats(
    policies=(
        "translate_x 9, contrast 6, translate_y 2",
        "translate_y 3, contrast 7, contrast 7",
    )
)


def context(seed: int) -> Context:
    return Context(torch.Generator().manual_seed(seed))


def pictures(images: int = 3, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Values that 8 bits hold, so that Pillow sees the same."""
    random = torch.Generator().manual_seed(seed)
    size = (images, channels, 12, 14)
    return torch.randint(256, size, generator=random).float() / 255


def transformed(policy: str, images: torch.Tensor, sign: int = 1) -> torch.Tensor:
    drawn = {POLICY: torch.tensor([0]), SIGNS: torch.tensor([[sign] * 3])}
    changed, _ = Ats(policies=(policy,)).transform(images, torch.zeros(len(images), 2), drawn)
    return changed


def to_pillow(image: torch.Tensor) -> Image.Image:
    return V.to_pil_image((image * 255).round().byte())


def from_pillow(image: Image.Image) -> torch.Tensor:
    return V.pil_to_tensor(image).float() / 255


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 2, 5, 9])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", V.adjust_brightness),
        ("contrast", V.adjust_contrast),
        ("color", V.adjust_saturation),
        ("sharpness", V.adjust_sharpness),
    ],
)
def test_factors_are_those_of_torchvision(
    name: str, reference: object, level: int, sign: int
) -> None:
    images = pictures()
    assert callable(reference)
    expected = reference(images, 1 + sign * 0.5 * level / 9)
    # torchvision takes 0.2989 for the weight of red, Pillow 0.299.
    torch.testing.assert_close(
        transformed(f"{name} {level}", images, sign), expected, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_translations_are_those_of_pillow(axis: str, level: int, sign: int) -> None:
    images = pictures()
    for image, changed in zip(
        images, transformed(f"translate_{axis} {level}", images, sign), strict=True
    ):
        picture = to_pillow(image)
        share = sign * np.linspace(0, 150 / 331, 10)[level]
        x, y = (share * picture.width, 0) if axis == "x" else (0, share * picture.height)
        expected = picture.transform(
            picture.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y), fillcolor=(0, 0, 0)
        )
        assert torch.equal((changed * 255).round(), from_pillow(expected) * 255)


@pytest.mark.parametrize("level", [0, 2, 6, 9])
def test_rotations_are_those_of_pillow(level: int) -> None:
    images = pictures()
    for image, changed in zip(images, transformed(f"rotate {level}", images), strict=True):
        picture = to_pillow(image)
        expected = picture.rotate(30 * level / 9, fillcolor=(128, 128, 128))
        same = ((changed - from_pillow(expected)).abs() < 1e-3).all(0).float().mean()
        # Points that fall between two pixels go to either.
        assert same > 0.97


@pytest.mark.parametrize("level", [0, 1, 4, 8, 9])
def test_other_transformations_are_those_of_pillow(level: int) -> None:
    images = pictures()
    bits = int(np.round(np.linspace(8, 4, 10))[level])
    threshold = np.linspace(256, 0, 10)[level]
    references = {
        "posterize": lambda picture: ImageOps.posterize(picture, bits),
        "solarize": lambda picture: ImageOps.solarize(picture, threshold),
        "invert": ImageOps.invert,
    }
    for name, reference in references.items():
        for image, changed in zip(images, transformed(f"{name} {level}", images), strict=True):
            expected = from_pillow(reference(to_pillow(image)))
            torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    darker = 0.2 + 0.5 * images
    stretched = transformed(f"autocontrast {level}", darker)
    torch.testing.assert_close(stretched, V.autocontrast(darker), rtol=0, atol=1e-5)
    grey = torch.full((1, 1, 5, 5), 0.4)
    assert torch.equal(transformed("autocontrast 0", grey), grey)


def test_each_image_gets_its_own_policy_and_signs() -> None:
    images = pictures(24)
    drawn = HYBRID.draw(context(3), 24)
    assert set(drawn[POLICY].tolist()) == {0, 1}
    together, targets = HYBRID.transform(images, torch.eye(24), drawn)
    assert torch.equal(targets, torch.eye(24))
    for i in range(24):
        x = images[i : i + 1]
        signs = drawn[SIGNS][i].tolist()
        policy = HYBRID.policies[int(drawn[POLICY][i])]
        for part, sign in zip(policy.split(", "), signs, strict=True):
            x = transformed(part, x, sign)
        torch.testing.assert_close(together[i : i + 1], x)


def test_the_guesses_hold_every_draw_once() -> None:
    guesses = HYBRID.guesses(None)
    assert len(guesses) == 16
    images = pictures(1)
    outcomes = [HYBRID.transform(images, torch.eye(1), guess)[0] for guess in guesses]
    for seed in range(40):
        sent, _ = HYBRID.transform(images, torch.eye(1), HYBRID.draw(context(seed), 1))
        assert any(torch.equal(sent, outcome) for outcome in outcomes)
    assert len(Ats(policies=("rotate 3, invert 0",)).guesses(None)) == 1


def test_every_transformation_maps_over_images_and_guesses() -> None:
    names = list(TRANSFORMATIONS)
    step = Ats(policies=tuple(f"{name} 4" for name in names))
    images = pictures(5, channels=1)[:, None]
    drawn = [step.draw(context(seed), 1) for seed in range(5)]
    stacked = {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}
    mapped, _ = vmap(step.transform)(images, torch.ones(5, 1, 2), stacked)
    for i in range(5):
        alone, _ = step.transform(images[i], torch.ones(1, 2), drawn[i])
        torch.testing.assert_close(mapped[i], alone)
        assert alone.shape == images[i].shape
        assert 0 <= float(alone.min()) <= float(alone.max()) <= 1


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (("blur 3",), "'blur 3' is no transformation"),
        (("contrast",), "'contrast' is no transformation"),
        (("contrast 10",), "level '10'; expected a whole number, 0 to 9"),
        (("contrast 1, contrast 2, contrast 3, contrast 4",), "4 transformations; expected 3"),
        ((), "at least 1"),
    ],
)
def test_policies_that_cannot_be_read_are_refused(policies: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Ats(policies=policies)


def test_mixup_by_hand() -> None:
    images = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1)
    mixed, targets = Mixup().transform(images, torch.eye(3), {WEIGHT: torch.tensor(0.75)})
    assert mixed.flatten().tolist() == [0.25, 0.875, 0.375]
    assert targets.tolist() == [[0.75, 0.25, 0], [0, 0.75, 0.25], [0.25, 0, 0.75]]
    single, target = Mixup().transform(images[:1], torch.eye(1), {WEIGHT: torch.tensor(0.6)})
    assert torch.equal(single, images[:1])
    assert torch.equal(target, torch.eye(1))


@pytest.mark.parametrize("images", [2, 3, 4])
def test_the_smaller_weight_is_the_same_batch_in_reverse(images: int) -> None:
    x, y = pictures(images), torch.eye(images)
    step = Mixup()
    large, labels = step.transform(x, y, {WEIGHT: torch.tensor(0.7)})
    small, reverse = step.transform(x.flip(0), y.flip(0), {WEIGHT: torch.tensor(0.3)})
    order = [int((labels - row).abs().sum(1).argmin()) for row in reverse]
    assert sorted(order) == list(range(images))
    torch.testing.assert_close(large[order], small)
    torch.testing.assert_close(labels[order], reverse)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_weights_follow_the_folded_beta(alpha: float) -> None:
    step = Mixup(alpha=alpha, tries=5)
    drawn = [float(step.draw(context(seed), 2)[WEIGHT]) for seed in range(800)]
    assert 0.5 <= min(drawn) <= max(drawn) <= 1
    folded = stats.kstest(drawn, lambda w: 2 * stats.beta.cdf(w, alpha, alpha) - 1)
    assert folded.pvalue > 1e-4
    tried = [float(guess[WEIGHT]) for guess in step.guesses(None)]
    below = [2 * stats.beta.cdf(weight, alpha, alpha) - 1 for weight in tried]
    np.testing.assert_allclose(below, [0.1, 0.3, 0.5, 0.7, 0.9], atol=1e-3)


def test_mixup_repeats_with_its_generator() -> None:
    assert torch.equal(*(Mixup().draw(context(5), 4)[WEIGHT] for _ in range(2)))


MODEL = nn.Sequential(nn.Flatten(), nn.Linear(168, 8), nn.Sigmoid(), nn.Linear(8, 4))


def gradient(step: Ats | Mixup, images: torch.Tensor, drawn: Drawn) -> Gradient:
    labels = F.one_hot(torch.arange(len(images)) % 4, 4).float()

    def loss(parameters: Gradient) -> torch.Tensor:
        x, targets = step.transform(images, labels, drawn)
        return F.cross_entropy(functional_call(MODEL, parameters, (x,)), targets)

    return grad(loss)({name: p.detach() for name, p in MODEL.named_parameters()})


@pytest.mark.parametrize(("step", "size"), [(HYBRID, 1), (Mixup(tries=8), 3)], ids=str)
def test_the_best_guess_never_identifies_less(step: Ats | Mixup, size: int) -> None:
    torch.manual_seed(0)
    neutral: Drawn = {
        WEIGHT: torch.tensor(1.0),
        POLICY: torch.tensor([-1]),
        SIGNS: torch.ones(1, 3),
    }
    plain = guessed = 0
    for trial in range(20):
        batches = pictures(8 * size, channels=1, seed=trial).split(size)
        observed = gradient(step, batches[0], step.draw(context(trial), size))

        def apart(batch: torch.Tensor, drawn: Drawn, observed: Gradient = observed) -> float:
            return float((flat(gradient(step, batch, drawn)) - flat(observed)).norm())

        without = [apart(batch, neutral) for batch in batches]
        best = [min(apart(b, guess) for guess in step.guesses(observed)) for b in batches]
        assert best[0] <= without[0]
        plain += min(range(8), key=without.__getitem__) == 0
        guessed += min(range(8), key=best.__getitem__) == 0
    assert guessed == 20
    assert guessed >= plain


@pytest.mark.parametrize("step", [HYBRID, Mixup()], ids=str)
def test_steps_on_the_data_leave_the_gradient_alone(step: Ats | Mixup) -> None:
    defense = Pipeline([step])
    for seed in range(1000):
        values = {"a": torch.randn(4, generator=torch.Generator().manual_seed(seed))}
        assert torch.equal(defense.apply(values, context(seed))["a"], values["a"])
        assert torch.equal(defense.replica.replicate([values], values)["a"], values["a"])
        assert [check.outcome for check in defense.checks.verify(values)] == ["hidden"]
    assert defense.training.changes_images


def test_signs_are_drawn_evenly() -> None:
    drawn = HYBRID.draw(context(0), 4000)
    assert drawn[SIGNS].shape == (4000, 3)
    counts = [
        int(((drawn[POLICY] == policy) & (drawn[SIGNS] == torch.tensor(signs)).all(1)).sum())
        for policy, signs in itertools.product((0, 1), itertools.product((1, -1), repeat=3))
    ]
    assert stats.chisquare(counts).pvalue > 1e-4
