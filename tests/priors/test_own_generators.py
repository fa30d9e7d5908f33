from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from scipy.stats import kstest, norm, truncnorm, uniform
from torch import nn
from torchvision.transforms import functional as transforms

from ggl_audit.errors import InputError, SpecError
from ggl_audit.inputs.images import digits, fingerprints
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.inputs.spec_file import read_spec
from ggl_audit.priors.latents import DeclaredLatents, GaussianLatents
from ggl_audit.priors.loading import load_prior, sample_images
from ggl_audit.priors.prior import Conversion, Prior
from ggl_audit.spec import LatentSpec, PriorSpec

CPU = torch.device("cpu")
OLD_PROGRAMS = "ignore:`torch.jit:FutureWarning"

TOYS = """\
import torch
import torch.nn.functional as F
from torch import nn


def classifier(channels=1, height=8, width=8, classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


class Plain(nn.Module):
    '''tanh pictures, (channels, 8, 8), of latents (6,).'''

    def __init__(self, channels=1, size=8):
        super().__init__()
        self.layer = nn.Linear(6, channels * size * size)
        nn.init.normal_(self.layer.weight, std=1.5)
        self.shape = (channels, size, size)

    def forward(self, latents):
        return torch.tanh(self.layer(latents)).unflatten(1, self.shape)


class Layered(nn.Module):
    '''What a DCGAN is made of; latents (6, 1, 1).'''

    def __init__(self):
        super().__init__()
        self.start = nn.ConvTranspose2d(6, 8, 4)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Upsample(scale_factor=2)
        self.end = nn.Conv2d(8, 1, 3, padding=1)
        nn.init.normal_(self.end.weight)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.norm.running_mean.uniform_(-0.3, 0.3)

    def forward(self, latents):
        features = F.leaky_relu(self.norm(self.start(latents)), 0.2)
        return torch.tanh(self.end(self.up(features)))


class Labelled(nn.Module):
    '''Labels in whatever form: embedded here (classes given), or concatenated.'''

    def __init__(self, width=4, classes=None):
        super().__init__()
        self.table = None if classes is None else nn.Embedding(classes, width)
        self.layer = nn.Linear(6 + width, 64)
        nn.init.normal_(self.layer.weight)

    def forward(self, latents, labels):
        given = labels if self.table is None else self.table(labels)
        return torch.tanh(self.layer(torch.cat([latents, given], 1))).unflatten(1, (1, 8, 8))


class Changed(Plain):
    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def forward(self, latents):
        drawn = super().forward(latents)
        if self.how == "upper half":
            return drawn / 2 + 0.5
        if self.how == "bytes":
            return (drawn / 2 + 0.5) * 255
        if self.how == "overshoot":
            return drawn * 1.15
        if self.how == "flat":
            return drawn * 0 + 0.3
        if self.how == "tuple":
            return drawn, latents
        if self.how == "dict":
            return {"image": drawn}
        if self.how == "no channels":
            return drawn[:, 0]
        if self.how == "one for all":
            return drawn.mean(0, keepdim=True)
        if self.how == "nan":
            return drawn.log()
        if self.how == "noise":
            return drawn + 0.05 * torch.randn_like(drawn)
        if self.how == "batch statistics":
            return torch.tanh(F.batch_norm(drawn, None, None, training=True))
        if self.how == "not alone":
            return torch.tanh(F.batch_norm(drawn.flatten(1), None, None, training=True)
                              .unflatten(1, (1, 8, 8)))
        raise SystemExit(self.how)


class Styled(nn.Module):
    '''A mapping network and what draws of w; w is (2, 3).'''

    def __init__(self, slope=0.2, rank=6):
        super().__init__()
        self.slope = slope
        self.first = nn.Linear(6, 6)
        nn.init.normal_(self.first.weight)
        self.first.weight.data[rank:] = 0
        self.draw = nn.Linear(6, 64)
        nn.init.normal_(self.draw.weight)

    def mapping(self, latents):
        return F.leaky_relu(self.first(latents), self.slope).unflatten(1, (2, 3))

    def forward(self, w):
        return torch.tanh(self.draw(w.flatten(1))).unflatten(1, (1, 8, 8))


def w_of(generator):
    return generator.mapping


def wrong_mapping(generator):
    return lambda latents: latents.sum()


def half_mapping(generator):
    return lambda latents: latents.half()


def constant_mapping(generator):
    return lambda latents: 0 * latents


def mapping_with_labels(generator):
    return lambda latents, labels: latents


def no_mapping(generator):
    return None
"""

Load = Callable[..., Prior]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the prior of a spec in a folder with TOYS."""
    (tmp_path / "gans.py").write_text(TOYS)

    def load(
        prior: dict[str, Any],
        shape: tuple[int, int, int] = (1, 8, 8),
        classes: int = 4,
        seed: int = 0,
        overrides: dict[str, Any] | None = None,
    ) -> Prior:
        channels, height, width = shape
        kwargs = {"channels": channels, "height": height, "width": width, "classes": classes}
        declared = {
            "version": 1,
            "model": {
                "factory": "gans.py:classifier",
                "kwargs": kwargs,
                "input": {"shape": list(shape)},
            },
            "capture": {"gradient": "gradient.safetensors"},
            "prior": prior,
            "seed": seed,
            "device": "cpu",
        }
        path = tmp_path / "audit.yaml"
        path.write_text(yaml.safe_dump(declared))
        spec = read_spec(path, (overrides or {}).items())
        return load_prior(spec, load_model(spec, CPU))

    return load


def toy(name: str, *shape: int, **more: Any) -> dict[str, Any]:
    """A prior from TOYS; latents of shape (6,) unless another is given."""
    latent = {"shape": list(shape) or [6]}
    return {"factory": f"gans.py:{name}", "latent": latent, **more}


def coordinates(prior: Prior, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, prior.size, generator=torch.Generator().manual_seed(seed))


def refused(load: Load, prior: dict[str, Any], *words: str, **how: Any) -> None:
    with pytest.raises((SpecError, InputError)) as error:
        load(prior, **how)
    for word in words:
        assert word in str(error.value)


# What a generator takes


@given(
    st.floats(0.01, 6),
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40),
)
def test_truncated_latents_are_the_exact_quantiles(truncation: float, given: list[float]) -> None:
    space = DeclaredLatents(
        LatentSpec(shape=[len(given)], distribution="truncated", truncation=truncation)
    )
    found = space(torch.tensor([given]))[0].numpy()
    u = np.array(given, dtype=np.float32).astype(np.float64)
    # The lower tail twice: the upper one has no digits left.
    lower = truncnorm.ppf(norm.cdf(-abs(u)), -truncation, truncation)
    np.testing.assert_allclose(found, np.where(u < 0, lower, -lower), rtol=3e-6, atol=3e-7)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("distribution", "law"),
    [("normal", norm), ("uniform", uniform(-1, 2)), ("truncated", truncnorm(-2, 2))],
)
def test_latents_have_the_declared_distribution_and_shape(distribution: Any, law: Any) -> None:
    space = DeclaredLatents(LatentSpec(shape=[5, 2, 1], distribution=distribution))
    assert space.size == 10
    drawn = space(torch.randn(800, 10, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (800, 5, 2, 1)
    assert kstest(drawn.flatten().numpy(), law.cdf).pvalue > 0.001


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated"])
def test_far_coordinates_stay_finite(distribution: Any) -> None:
    space = DeclaredLatents(LatentSpec(shape=[4], distribution=distribution))
    values = space(torch.tensor([[-40.0, -8.0, 8.0, 40.0]]))[0]
    assert bool(torch.isfinite(values).all())
    if distribution != "normal":
        assert float(values.abs().max()) <= 2


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"factory": "a:b"}, "needs latent"),
        (
            {"bundled": "digits", "factory": "a:b"},
            "exactly one of bundled, trained",
        ),
        ({"bundled": "digits", "latent": {"shape": [1]}}, "latent: only for one's own"),
        ({"exported": "a.pt2", "latent": {"shape": [1]}, "weights": "b.pt"}, "for a factory"),
        (toy("Plain", truncation=1), "Extra inputs"),
        (toy("Plain", 10_000, 10_000), "too many to search"),
        (toy("Plain", latent={"shape": [1], "truncation": 1}), "distribution: truncated"),
        (toy("Plain", latent={"shape": []}), "at least 1"),
        (toy("Plain", labels="embedding"), "need each other"),
        (toy("Plain", embedding="e.pt"), "need each other"),
        (toy("Plain", classes=3), "labels: index or one_hot"),
        (toy("Plain", conditional=True), "Extra inputs"),
        (toy("Plain", output_range=[1, 0]), "low to high"),
        (toy("Plain", colour="sepia"), "grey_to_rgb"),
    ],
)
def test_declarations_that_make_no_sense(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PriorSpec.model_validate(declared)


@pytest.mark.parametrize("kind", ["index", "one_hot", "embedding"])
def test_labels_reach_the_generator_in_the_declared_form(
    load: Load, tmp_path: Path, kind: str
) -> None:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    save_file({"weight": rows}, tmp_path / "rows.safetensors")
    labels = torch.tensor([3, 0, 2])
    expected, declared, classes = {
        "index": (labels, {"kwargs": {"classes": 4}}, 4),
        "one_hot": (torch.eye(6)[labels], {"classes": 6, "kwargs": {"width": 6}}, 6),
        "embedding": (
            rows[labels],
            {"embedding": "rows.safetensors", "kwargs": {"width": 3}},
            5,
        ),
    }[kind]
    prior = load(toy("Labelled", labels=kind, **declared))
    assert prior.classes == classes
    latents = coordinates(prior, 3)
    assert torch.equal(prior.inputs(latents, labels)[1], expected)
    own = prior.generator(latents, expected)
    assert torch.equal(prior.decode(latents, labels), (own + 1) / 2)
    assert not torch.equal(prior.decode(latents, labels), prior.decode(latents, labels.flip(0)))


def test_a_generator_that_knows_fewer_classes_is_refused(load: Load, tmp_path: Path) -> None:
    refused(
        load, toy("Labelled", labels="one_hot", classes=3, kwargs={"width": 3}),
        "knows 3 classes; the model has 4",
    )  # fmt: skip
    refused(
        load, toy("Labelled", labels="index", kwargs={"classes": 3}),
        "prior.factory", "labels (8,) int64", "IndexError",
    )  # fmt: skip
    save_file({"rows": torch.zeros(3, 4)}, tmp_path / "rows.safetensors")
    declared = {"labels": "embedding", "embedding": "rows.safetensors"}
    refused(load, toy("Labelled", **declared), "knows 3 classes")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}, "found 2"),
        ({"a": torch.zeros(4)}, "(4,) float32"),
        ({"a": torch.zeros(4, 4, dtype=torch.int64)}, "int64"),
        ({"a": torch.full((4, 4), float("nan"))}, "NaN"),
    ],
)
def test_a_file_that_is_no_embedding(
    load: Load, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    save_file(tensors, tmp_path / "rows.safetensors")
    declared = toy("Labelled", labels="embedding", embedding="rows.safetensors")
    refused(load, declared, "rows.safetensors", words)


# What a generator gives


@pytest.mark.parametrize("size", [(5, 5), (20, 12)])
def test_pictures_are_resized_as_torchvision_and_pillow_do(size: tuple[int, int]) -> None:
    pictures = digits("private").images[:3]
    resized = Conversion((0.0, 1.0), None, size)(pictures)
    # antialias: a boolean that torchvision has had since 0.15
    theirs = transforms.resize(pictures, list(size), antialias=True)
    torch.testing.assert_close(resized, theirs)
    for mine, picture in zip(resized, pictures, strict=True):
        scan = Image.fromarray((picture[0] * 255).round().byte().numpy())
        again = scan.resize(size[::-1], Image.Resampling.BILINEAR)
        assert float((mine[0] - torch.from_numpy(np.array(again)) / 255).abs().max()) < 1.6 / 255


def test_colours_are_converted_as_pillow_does() -> None:
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    output = torch.from_numpy(colours).permute(2, 0, 1)[None] / 255
    grey = Conversion((0.0, 1.0), "rgb_to_grey")(output)[0, 0]
    theirs = np.asarray(Image.fromarray(colours).convert("L"))
    assert grey.shape == theirs.shape
    assert np.abs(grey.numpy() * 255 - theirs).max() < 1.01  # Pillow cuts the fraction off
    back = Conversion((0.0, 1.0), "grey_to_rgb")(output[:, :1])
    assert torch.equal(back, output[:, :1].repeat(1, 3, 1, 1))


def test_declared_conversions_are_done(load: Load) -> None:
    grey = load(toy("Plain", colour="grey_to_rgb", resize=[5, 7]), shape=(3, 5, 7))
    drawn = grey.decode(coordinates(grey, 3), torch.zeros(3, dtype=torch.long))
    assert drawn.shape == (3, 3, 5, 7)
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    colour = load(toy("Plain", kwargs={"channels": 3}, colour="rgb_to_grey"))
    images = sample_images(colour, torch.tensor([0, 1, 2]), np.random.default_rng(0)).images
    assert images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("more", "shape", "words"),
    [
        ({}, (1, 9, 8), ["[1, 8, 8]", "[1, 9, 8]", "resize: [9, 8]", "prior train"]),
        ({}, (3, 8, 8), ["Declare colour: grey_to_rgb to"]),
        ({}, (3, 4, 4), ["colour: grey_to_rgb and resize: [4, 4]"]),
        ({"kwargs": {"channels": 3}}, (1, 8, 8), ["colour: rgb_to_grey"]),
        ({"kwargs": {"channels": 4}}, (1, 8, 8), ["Give a prior of that size"]),
        ({"resize": [4, 4]}, (1, 5, 5), ["prior.resize", "[4, 4]", "[5, 5]"]),
        ({"colour": "rgb_to_grey"}, (1, 8, 8), ["prior.colour", "[1, 8, 8]"]),
        ({"output_shape": [3, 8, 8]}, (1, 8, 8), ["prior.output_shape", "draws [1, 8, 8]"]),
    ],
)
def test_a_misfit_is_an_error_that_names_the_key(
    load: Load, more: dict[str, Any], shape: tuple[int, int, int], words: list[str]
) -> None:
    refused(load, toy("Plain", **more), *words, shape=shape)


def test_the_size_may_be_declared(load: Load) -> None:
    prior = load(toy("Plain", output_shape=[1, 8, 8], resize=[4, 4]), shape=(1, 4, 4))
    assert prior.doubts == ()


@pytest.mark.parametrize(
    ("how", "declared", "words"),
    [
        ("upper half", None, ["prior.output_range", "bright half", "[0, 1]?"]),
        ("bytes", None, ["prior.output_range", "to 255", "far beyond [-1, 1]"]),
        ("plain", [0.0, 1.0], ["prior.output_range", "from -1 to 1", "far beyond [0, 1]"]),
    ],
)
def test_a_wrong_range_is_found(
    load: Load, how: str, declared: list[float] | None, words: list[str]
) -> None:
    prior = toy("Plain") if how == "plain" else toy("Changed", kwargs={"how": how})
    refused(load, prior if declared is None else {**prior, "output_range": declared}, *words)


@pytest.mark.parametrize(
    ("how", "declared", "doubts"),
    [
        ("upper half", [0.0, 1.0], 0),
        ("bytes", [0.0, 255.0], 0),
        ("overshoot", [-1.0, 1.0], 0),
        ("upper half", [-1.0, 1.0], 1),  # it may draw bright pictures
        ("upper half", [0.0, 255.0], 1),
        ("flat", [-1.0, 1.0], 1),
    ],
)
def test_a_range_that_may_be_wrong_is_a_doubt(
    load: Load, how: str, declared: list[float], doubts: int
) -> None:
    prior = load(toy("Changed", kwargs={"how": how}, output_range=declared))
    assert len(prior.doubts) == doubts
    assert all("uses little of output_range" in doubt.text for doubt in prior.doubts)


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (toy("Plain", 5), ["called with latents (8, 5) float32", "RuntimeError", "prior.latent"]),
        (toy("Plain", labels="index"), ["latents (8, 6) float32, labels (8,) int64", "TypeError"]),
        (toy("Labelled"), ["latents (8, 6) float32 and failed", "TypeError", "prior.labels"]),
        (toy("Changed", kwargs={"how": "exit"}), ["SystemExit"]),
        (toy("Changed", kwargs={"how": "tuple"}), ["returned a tuple of 2", "wraps it"]),
        (toy("Changed", kwargs={"how": "dict"}), ["returned a dict of 1"]),
        (toy("Changed", kwargs={"how": "no channels"}), ["(8, 8, 8)", "(8, channels"]),
        (toy("Changed", kwargs={"how": "one for all"}), ["(1, 1, 8, 8)"]),
        (toy("Changed", kwargs={"how": "nan"}), ["NaN"]),
        (toy("Changed", kwargs={"how": "noise"}), ["is random", "noise_mode='const'"]),
        (toy("Changed", kwargs={"how": "batch statistics"}), ["alone than among", "batch norm"]),
        (toy("Changed", kwargs={"how": "not alone"}), ["alone than among", "ValueError"]),
    ],
)
def test_a_generator_that_cannot_be_searched(
    load: Load, prior: dict[str, Any], words: list[str]
) -> None:
    refused(load, prior, "prior.factory", *words)


def test_batch_norm_uses_the_statistics_of_training(load: Load) -> None:
    prior = load(toy("Layered", 6, 1, 1))
    assert not any(layer.training for layer in prior.generator.modules())
    latents, labels = coordinates(prior, 5), torch.zeros(5, dtype=torch.long)
    alone = torch.cat([prior.decode(latent[None], labels[:1]) for latent in latents])
    torch.testing.assert_close(alone, prior.decode(latents, labels), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(OLD_PROGRAMS)  # torch.func.jvp is made of some
@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated"])
def test_pictures_can_be_differentiated(load: Load, distribution: str) -> None:
    latent = {"shape": [6], "distribution": distribution}
    prior = load(
        toy("Plain", kwargs={"channels": 3}, latent=latent, colour="rgb_to_grey", resize=[5, 5]),
        shape=(1, 5, 5),
    )
    prior.generator.double()
    label = torch.zeros(2, dtype=torch.long)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return prior.decode(latents, label)

    start = torch.stack([torch.zeros(6), torch.linspace(-2, 2, 6)]).double()
    direction = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    _, derivative = torch.func.jvp(decode, (start,), (direction,))
    step = 1e-6 * direction
    numeric = (decode(start + step) - decode(start - step)) / 2e-6
    torch.testing.assert_close(derivative, numeric, rtol=1e-4, atol=1e-6)
    assert float(derivative.abs().max()) > 0.01


# Where it is from


def save_program(generator: nn.Module, path: Path, *example: torch.Tensor) -> None:
    """Saves a generator for batches of any size, or of four as the path's name says."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = None if path.stem == "four" else tuple({0: batch} for _ in example)
    torch._dynamo.reset()  # PyTorch 2.6 exports no more than 8 in one process
    torch.export.save(torch.export.export(generator, example, dynamic_shapes=shapes), path)


@pytest.mark.parametrize("file", ["any.pt2", "four.pt2"])
def test_saved_programs_draw_the_same_pictures(load: Load, tmp_path: Path, file: str) -> None:
    eager = load(toy("Layered", 6, 1, 1))
    save_program(eager.generator, tmp_path / file, torch.randn(4, 6, 1, 1))
    prior = load({"exported": file, "latent": {"shape": [6, 1, 1]}})
    latents, labels = coordinates(eager, 11), torch.zeros(11, dtype=torch.long)
    torch.testing.assert_close(prior.decode(latents, labels), eager.decode(latents, labels))
    assert prior.source == f"prior {file}"


def test_saved_programs_take_labels(load: Load, tmp_path: Path) -> None:
    eager = load({"bundled": "digits"}, shape=(1, 16, 16), classes=10)
    labels = torch.arange(10)
    latents = coordinates(eager, 10)
    save_program(eager.generator, tmp_path / "any.pt2", latents[:4], labels[:4])
    declared = {"exported": "any.pt2", "latent": {"shape": [48]}, "labels": "index"}
    prior = load(declared, shape=(1, 16, 16), classes=10)
    torch.testing.assert_close(prior.decode(latents, labels), eager.decode(latents, labels))


@pytest.mark.parametrize(
    ("file", "words"), [("any.pt2", "saved in eval mode"), ("four.pt2", "saved in train mode")]
)
def test_a_program_saved_in_training_mode_is_found(
    load: Load, tmp_path: Path, file: str, words: str
) -> None:
    generator = load(toy("Layered", 6, 1, 1)).generator.train()
    save_program(generator, tmp_path / file, torch.randn(4, 6, 1, 1))
    refused(load, {"exported": file, "latent": {"shape": [6, 1, 1]}}, words)


def test_weights_are_filled_in_by_name(load: Load, tmp_path: Path) -> None:
    plain = load(toy("Plain", kwargs={"channels": 3}), shape=(3, 8, 8), seed=1)
    weights = plain.generator.state_dict()
    labels = torch.zeros(4, dtype=torch.long)
    expected = plain.decode(coordinates(plain, 4), labels)
    for prefix in ("", "module.", "_orig_mod.module."):
        wrapped = {prefix + name: tensor for name, tensor in weights.items()}
        torch.save(wrapped, tmp_path / "weights.pt")
        declared = toy("Plain", kwargs={"channels": 3}, weights="weights.pt")
        prior = load(declared, shape=(3, 8, 8))
        assert torch.equal(prior.decode(coordinates(prior, 4), labels), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"layer.weight": w["layer.weight"]}, "no 'layer.bias' (64,)"),
        (lambda w: {**w, "other": torch.zeros(1)}, "holds 'other'"),
        (lambda w: {**w, "layer.bias": torch.zeros(1)}, "'layer.bias' has the shape (1,)"),
    ],
)
def test_weights_that_do_not_fit(
    load: Load, tmp_path: Path, change: Callable[..., Any], words: str
) -> None:
    weights = load(toy("Plain")).generator.state_dict()
    torch.save(change(weights), tmp_path / "weights.pt")
    refused(load, toy("Plain", weights="weights.pt"), "weights.pt", words)


def test_what_it_was_trained_on_has_the_size_of_the_model(load: Load, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for size in (8, 9):
        images = random.integers(0, 256, (5, size, size), dtype=np.uint8)
        np.savez(tmp_path / f"{size}.npz", images=images, labels=np.zeros(5, dtype=np.int64))
    seen = load(toy("Plain", trained_on={"npz": "8.npz"})).seen
    with np.load(tmp_path / "8.npz") as file:
        images = torch.from_numpy(file["images"])[:, None] / 255
    assert seen == frozenset(fingerprints(images))
    refused(load, toy("Plain", trained_on={"npz": "9.npz"}), "9x9")


def test_a_converted_bundled_prior_does_not_claim_what_it_saw(load: Load) -> None:
    assert load({"bundled": "digits"}, shape=(1, 16, 16), classes=10).seen
    prior = load(
        {"bundled": "digits", "resize": [20, 20], "colour": "grey_to_rgb"},
        shape=(3, 20, 20),
        classes=10,
    )
    assert prior.seen is None
    refused(load, {"bundled": "digits"}, "resize: [20, 20]", shape=(1, 20, 20), classes=10)


# W spaces


def styled(**more: Any) -> dict[str, Any]:
    return toy("Styled", latent_mapping="gans.py:w_of", **more)


def gaussian(prior: Prior) -> GaussianLatents:
    assert isinstance(prior.space, GaussianLatents)
    return prior.space


def test_w_of_a_linear_mapping_is_its_gaussian(load: Load) -> None:
    """w = A z + b has the mean b and the covariance A A^T."""
    prior = load(styled(kwargs={"slope": 1.0}))
    space, first = gaussian(prior), prior.generator.first
    assert isinstance(first, nn.Linear)
    assert prior.size == 6
    covariance = first.weight @ first.weight.T
    scale = float(covariance.diagonal().max())
    assert float((space.axes.T @ space.axes - covariance).abs().max()) < 0.1 * scale
    assert float((space.mean - first.bias).abs().max()) < 0.1 * scale**0.5
    # A rotation of the latents is all that is between the two coordinates.
    rotation = torch.linalg.solve(first.weight, space.axes.T)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6), rtol=0, atol=0.12)


def test_w_is_searched_in_whitened_coordinates(load: Load) -> None:
    prior = load(styled())
    space, generator = gaussian(prior), prior.generator
    latents = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(3))
    w = generator.mapping(latents).flatten(1)
    whitened = (w - space.mean) @ torch.linalg.pinv(space.axes)
    torch.testing.assert_close(whitened.T.cov(), torch.eye(6), rtol=0, atol=0.1)
    assert float(whitened.mean(0).abs().max()) < 0.05
    u, labels = coordinates(prior, 5), torch.zeros(5, dtype=torch.long)
    of_u = torch.stack([space.mean + sum(a * axis for a, axis in zip(row, space.axes, strict=True))
                        for row in u])  # fmt: skip
    expected = (generator(of_u.view(5, 2, 3)) + 1) / 2
    torch.testing.assert_close(prior.decode(u, labels), expected)


def test_w_has_as_many_coordinates_as_it_has_axes(load: Load) -> None:
    prior = load(styled(kwargs={"rank": 4, "slope": 1.0}))
    assert prior.size == 4
    images = sample_images(prior, torch.tensor([0, 1]), np.random.default_rng(0)).images
    assert images.shape == (2, 1, 8, 8)


def test_w_is_decided_by_the_seed(load: Load, tmp_path: Path) -> None:
    weights = load(styled()).generator.state_dict()
    save_file(weights, tmp_path / "styled.safetensors")
    declared = styled(weights="styled.safetensors")
    first, again, other = (gaussian(load(declared, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.axes, again.axes)
    assert not torch.equal(first.axes, other.axes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", ["no callable 'gone'"]),
        ("wrong_mapping", ["made () of 256 latents"]),
        ("half_mapping", ["finite numbers of float32"]),
        ("constant_mapping", ["all latents to the same w"]),
        ("mapping_with_labels", ["called with latents of [6]", "TypeError", "mapping(generator)"]),
        ("no_mapping", ["TypeError", "returned"]),
    ],
)
def test_mappings_that_are_none(load: Load, name: str, words: list[str]) -> None:
    declared = toy("Styled", latent_mapping=f"gans.py:{name}")
    refused(load, declared, "prior.latent_mapping", *words)


# Public checkpoints, by a spec and a file beside it

PUBLIC = """\
import torch
from torch import nn


class Up(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.block = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, features):
        return self.block(features)


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            Up(64, 256, 3, 2), Up(256, 128, 4, 1), Up(128, 64, 3, 2),
            nn.ConvTranspose2d(64, 1, 4, 2), nn.Tanh(),
        )

    def forward(self, latents):
        return self.model(latents)


class LabelledDigits(nn.Module):
    def __init__(self):
        super().__init__()
        self.label_emb = nn.Embedding(10, 10)
        self.l1 = nn.Sequential(nn.Linear(20, 6272))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128), nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, 0.8), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64, 0.8), nn.ReLU(),
            nn.Conv2d(64, 1, 3, padding=1), nn.Tanh(),
        )

    def forward(self, latents, labels):
        joined = torch.cat([latents, self.label_emb(labels)], dim=1)
        return self.conv_blocks(self.l1(joined).view(-1, 128, 7, 7))


def convolved(layer, channels):
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2))


class Faces(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator_deconv = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(100, 256, 4, bias=False), nn.BatchNorm2d(256)),
            convolved(nn.Conv2d(256, 128, 3, padding=1, bias=False), 128),
            convolved(nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), 64),
            convolved(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), 32),
            nn.Sequential(nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, latents):
        return self.generator_deconv(latents)
"""


@pytest.fixture
def public(load: Load, shared: Path, tmp_path: Path) -> Load:
    """Loads one of the public checkpoints; its weights are given on the command line."""
    (tmp_path / "public.py").write_text(PUBLIC)

    def load_public(name: str, weights: str, shape: tuple[int, int, int], **more: Any) -> Prior:
        return load(
            {"factory": f"public.py:{name}", **more},
            shape=shape,
            classes=10 if shape[0] == 1 else 2,
            overrides={"prior.weights": str((shared / "generators" / weights).resolve())},
        )

    return load_public


def mnist(shared: Path) -> torch.Tensor:
    raw = gzip.decompress((shared / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return torch.from_numpy(pixels.copy()) / 255


def recognized(shared: Path, images: torch.Tensor) -> torch.Tensor:
    """Which digit the public classifier sees in each of (n, 1, 28, 28)."""
    path = shared / "classifiers" / "mnist_cnn_botorch.pt"
    weights = torch.load(path, weights_only=True, map_location="cpu")
    features = (images - 0.1307) / 0.3081
    for layer in ("conv1", "conv2"):
        convolved = F.conv2d(features, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        features = F.max_pool2d(F.relu(convolved), 2)
    hidden = F.relu(F.linear(features.flatten(1), weights["fc1.weight"], weights["fc1.bias"]))
    return F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"]).argmax(1)


def alike(first: torch.Tensor, second: torch.Tensor) -> float:
    """The correlation of two pictures."""
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def test_public_digits(public: Load, shared: Path) -> None:
    prior = public(
        "Digits", "mnist_wgangp_akanametov.pt", (1, 28, 28), latent={"shape": [64, 1, 1]}
    )
    assert (prior.size, prior.classes, prior.doubts) == (64, None, ())
    drawn = prior.decode(coordinates(prior, 200), torch.zeros(200, dtype=torch.long))
    real = mnist(shared)
    assert alike(drawn.mean(0), real.mean(0)) > 0.95
    assert abs(float(drawn.mean() - real.mean())) < 0.05
    assert len(recognized(shared, drawn).unique()) == 10
    assert float(drawn.std(0).mean()) > 0.7 * float(real.std(0).mean())


def test_public_digits_with_labels(public: Load, shared: Path) -> None:
    prior = public(
        "LabelledDigits", "mnist_cwgangp_hayato.pth", (1, 28, 28),
        latent={"shape": [10]}, labels="index",
    )  # fmt: skip
    assert (prior.size, prior.classes, prior.doubts) == (10, 10, ())
    labels = torch.arange(200) % 10
    drawn = prior.decode(coordinates(prior, 200), labels)
    assert float((recognized(shared, drawn) == labels).double().mean()) > 0.5
    assert alike(drawn.mean(0), mnist(shared).mean(0)) > 0.95


def test_public_faces(public: Load, shared: Path) -> None:
    prior = public(
        "Faces", "celeba32_dcgan_fletchersarip.pt", (3, 32, 32),
        latent={"shape": [100, 1, 1], "distribution": "uniform"},
    )  # fmt: skip
    assert (prior.size, prior.classes, prior.doubts) == (100, None, ())
    drawn = prior.decode(coordinates(prior, 200), torch.zeros(200, dtype=torch.long)).mean(0)
    with np.load(shared / "faces" / "caltech_faces_easy_64.npz") as file:
        scans = torch.from_numpy(file["images"]).permute(0, 3, 1, 2) / 255
    # The generator draws nothing but the face; these have hair and a background.
    face = F.interpolate(scans[:, :, 8:48, 12:52], (32, 32), mode="area").mean(0)
    assert alike(drawn, face) > 0.7
    assert alike(drawn.flip(1), face) < 0.75 * alike(drawn, face)
