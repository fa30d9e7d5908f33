from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import kstest

from ggl_audit.errors import AuditError, InputError, SpecError
from ggl_audit.inputs.images import ImageSet, digits
from ggl_audit.inputs.model_loading import load_model
from ggl_audit.priors.card import read_card
from ggl_audit.priors.generator import Architecture, Generator
from ggl_audit.priors.latents import DeclaredLatents
from ggl_audit.priors.loading import bundled_folder, load_prior, load_trained
from ggl_audit.priors.making import architecture_for, make_prior
from ggl_audit.priors.prior import Prior
from ggl_audit.priors.training import Schedule, augment, invert
from ggl_audit.spec import LatentSpec, Spec

CPU = torch.device("cpu")


def made(folder: Path, seen: ImageSet, **schedule: int) -> None:
    make_prior(
        folder, seen, None, architecture_for(seen, 6, 48), Schedule(**{"steps": 4, **schedule}),
        CPU, "a test", "none", lambda steps: None,
    )  # fmt: skip


def test_the_bundled_prior_represents_images_it_has_not_seen() -> None:
    prior = load_trained(bundled_folder() / "digits")
    assert isinstance(prior.generator, Generator)
    private = digits("private")
    some = ImageSet(private.images[::10], private.labels[::10], "some")
    figures, pictures = invert(prior.generator, some, starts=4, steps=200)
    errors = (pictures - some.images).square().flatten(1).mean(1)
    assert figures.psnr_db == pytest.approx(float((-10 * errors.log10()).mean()), abs=0.01)
    assert figures.psnr_db > 28
    card = read_card(bundled_folder() / "digits")
    assert card.inversion is not None
    assert figures.psnr_db > card.inversion.psnr_db - 3


def test_the_bundled_prior_draws_the_digit_it_is_asked_for() -> None:
    """A nearest-neighbour classifier on the public digits, which is right on 98 % of real ones."""
    prior = load_trained(bundled_folder() / "digits")
    labels = torch.arange(10).repeat_interleave(50)
    random = torch.Generator().manual_seed(0)
    drawn = prior.decode(torch.randn(500, prior.size, generator=random), labels)
    known = digits("prior")
    nearest = torch.cdist(drawn.flatten(1), known.images.flatten(1)).argmin(dim=1)
    assert float((known.labels[nearest] == labels).double().mean()) > 0.9
    for label in range(10):
        spread = drawn[labels == label].flatten(1).std(dim=0).mean()
        real = known.images[known.labels == label].flatten(1).std(dim=0).mean()
        assert float(spread) > 0.6 * float(real)


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 32), (1, 28), (3, 64), (1, 24)])
def test_sizes_and_channels(channels: int, size: int, tmp_path: Path) -> None:
    images = ImageSet(torch.rand(8, channels, size, size), torch.tensor([0, 1] * 4), "noise")
    made(tmp_path / "p", images)
    prior = load_trained(tmp_path / "p")
    drawn = prior.decode(torch.randn(3, 6), torch.tensor([0, 1, 0]))
    assert drawn.shape == (3, channels, size, size)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_training_is_decided_by_the_seed(tmp_path: Path) -> None:
    seen = digits("private")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(tmp_path / name, seen, seed=seed)
    a, b, c = ((tmp_path / n / "generator.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(4, 1, 30, 30), [0, 0, 1, 1], "size 30 cannot be halved"),
        (torch.rand(4, 1, 16, 20), [0, 0, 1, 1], "expected square"),
        (torch.rand(4, 1, 16, 16), [0, 0, 2, 2], "class 1 has 0 images"),
    ],
)
def test_images_that_cannot_be_trained_on(
    images: torch.Tensor, labels: list[int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AuditError, match=words):
        made(tmp_path / "p", ImageSet(images, torch.tensor(labels), "these"))
    assert not (tmp_path / "p").exists()


def test_each_picture_is_computed_by_itself() -> None:
    generator = Generator(Architecture(channels=1, size=16, classes=3, latent=4)).eval()
    latents, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    together = generator(latents, labels)
    for i in range(5):
        alone = generator(latents[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_augmentation_is_mild() -> None:
    images = digits("prior").images[:200]
    torch.manual_seed(0)
    varied = augment(images)
    assert varied.shape == images.shape
    assert 0 <= float(varied.min()) <= float(varied.max()) <= 1
    errors = (varied - images).square().flatten(1).mean(1)
    others = (images.roll(1, 0) - images).square().flatten(1).mean(1)
    assert 0 < float(errors.mean()) < 0.3 * float(others.mean())


def test_a_uniform_latent_is_drawn_uniformly() -> None:
    class Identity(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    latent = LatentSpec(shape=[1, 1, 1], distribution="uniform")
    prior = Prior(Identity(), DeclaredLatents(latent), None, "identity")
    normal = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    drawn = prior.decode(normal, torch.zeros(5000, dtype=torch.long)).flatten()
    assert kstest(drawn.numpy(), "uniform").pvalue > 0.001


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no card\.yaml"):
        load_trained(tmp_path)
    made(tmp_path / "p", digits("private"))
    card = tmp_path / "p" / "card.yaml"
    good = card.read_text()
    card.write_text(good.replace("latent: 6", "latent: 7"))
    with pytest.raises(InputError, match="does not fit the architecture"):
        load_trained(tmp_path / "p")
    card.write_text(good.replace("latent: 6", "latent: many"))
    with pytest.raises(InputError, match=r"architecture\.latent"):
        load_trained(tmp_path / "p")
    card.write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_trained(tmp_path / "p")


def test_a_generator_of_the_users_own(sample: Callable[..., Spec], tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(
        "import torch\n"
        "class Gan(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up = torch.nn.ConvTranspose2d(5, 1, 16)\n"
        "    def forward(self, latents):\n"
        "        return torch.sigmoid(self.up(latents))\n"
    )
    weights = {"up.weight": torch.zeros(5, 1, 16, 16), "up.bias": torch.full((1,), 100.0)}
    save_file(weights, tmp_path / "gan.safetensors")
    declared = {
        "factory": f"{tmp_path / 'gan.py'}:Gan",
        "weights": str(tmp_path / "gan.safetensors"),
        "latent": {"shape": [5, 1, 1]},
        "output_range": [0.0, 1.0],
    }
    spec = sample("undefended", prior=declared)
    model = load_model(spec, CPU)
    prior = load_prior(spec, model)
    assert (prior.size, prior.classes) == (5, None)
    assert float(prior.decode(torch.zeros(1, 5), torch.zeros(1).long()).min()) == 1.0
    save_file({"up.bias": torch.zeros(1)}, tmp_path / "gan.safetensors")
    with pytest.raises(InputError, match=r"has no 'up\.weight'"):
        load_prior(spec, model)
    images = digits("private")
    made(tmp_path / "p", ImageSet(images.images, images.labels % 2, "two"))
    of_two_classes = sample("undefended", prior={"trained": str(tmp_path / "p")})
    with pytest.raises(SpecError, match="knows 2 classes; the model has 10"):
        load_prior(of_two_classes, model)
