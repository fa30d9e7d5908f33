"""Transformations of the training images, found by search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from ggl_audit.basics.device import widened
from ggl_audit.basics.gradient import Gradient
from ggl_audit.defenses.base import Context, DataDefense, Drawn
from ggl_audit.errors import ReasonError
from ggl_audit.messages import Message

POLICY, SIGNS = "ats.policy", "ats.signs"

LEVELS = 9
"""Magnitudes are levels from 0 to 9, as in AutoAugment."""

LONGEST = 3
"""Transformations in a policy."""

Transformation = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
"""From images (n, c, h, w) in [0, 1], a share of the largest magnitude, and signs (n, 1, 1, 1)."""

POLICIES = (
    "Write each policy of `ats` as up to three names with levels: `translate_x 9, contrast 6`."
)
POLICY_TOO_LONG = Message(
    "defense/policy-too-long",
    "{policy!r} has {count} transformations; expected {most} at most",
    advice=POLICIES,
)
NO_TRANSFORMATION = Message(
    "defense/no-transformation",
    "{text!r} is no transformation; expected a name and a level, such as 'contrast 6', of {known}",
    advice=POLICIES,
)
NO_LEVEL = Message(
    "defense/no-level",
    "{name} has the level {level!r}; expected a whole number, 0 to 9",
    advice=POLICIES,
)


def _resampled(images: torch.Tensor, matrix: tuple[float, ...], fill: float) -> torch.Tensor:
    # The matrix (a, b, c, d, e, f) takes the middle of a pixel to where its value comes from.
    a, b, c, d, e, f = matrix
    height, width = images.shape[-2:]
    rows = widened(torch.arange(height, device=images.device))[:, None] + 0.5
    columns = widened(torch.arange(width, device=images.device))[None] + 0.5
    from_x = (a * columns + b * rows + c).floor().long()
    from_y = (d * columns + e * rows + f).floor().long()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)
    moved = images.flatten(-2)[..., index.flatten()].unflatten(-1, (height, width))
    return torch.where(inside, moved, fill)


def _translated(images: torch.Tensor, right: float, down: float) -> torch.Tensor:
    height, width = images.shape[-2:]
    return _resampled(images, (1, 0, right * width, 0, 1, down * height), fill=0)


def _translate_x(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    step = 150 / 331 * share
    return torch.where(sign > 0, _translated(images, step, 0), _translated(images, -step, 0))


def _translate_y(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    step = 150 / 331 * share
    return torch.where(sign > 0, _translated(images, 0, step), _translated(images, 0, -step))


def _rotate(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    angle = math.radians(30 * share)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    return _resampled(images, matrix, fill=128 / 255)


def _grey(images: torch.Tensor) -> torch.Tensor:
    channels = images.shape[-3]
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    luma = torch.tensor(weights, dtype=images.dtype, device=images.device)
    grey: torch.Tensor = images * luma[:, None, None]
    return grey.sum(-3, keepdim=True)


def _away(
    images: torch.Tensor, plain: torch.Tensor, share: float, sign: torch.Tensor
) -> torch.Tensor:
    away: torch.Tensor = plain + (1 + 0.5 * share * sign) * (images - plain)
    return away.clamp(0, 1)


def _brightness(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    return _away(images, torch.zeros_like(images), share, sign)


def _contrast(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    return _away(images, _grey(images).mean((-2, -1), keepdim=True), share, sign)


def _color(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    return _away(images, _grey(images), share, sign)


def _sharpness(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    kernel = torch.ones(1, 1, 3, 3, dtype=images.dtype, device=images.device) / 13
    kernel[0, 0, 1, 1] = 5 / 13
    inner = F.conv2d(images.flatten(0, 1)[:, None], kernel)[:, 0].unflatten(0, images.shape[:2])
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)[None]
    border = (rows % (height - 1) == 0) | (columns % (width - 1) == 0)
    smooth = torch.where(border, images, F.pad(inner, (1, 1, 1, 1)))
    return _away(images, smooth, share, sign)


def _posterize(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    step = 1 << (8 - round(8 - 4 * share))
    return (images * 255 / step).floor() * step / 255


def _solarize(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    return torch.where(images * 255 >= 256 * (1 - share), 1 - images, images)


def _invert(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    return 1 - images


def _autocontrast(images: torch.Tensor, share: float, sign: torch.Tensor) -> torch.Tensor:
    least, most = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    span = most - least
    return torch.where(span > 0, (images - least) / span.clamp(min=1e-12), images)


TRANSFORMATIONS: dict[str, tuple[Transformation, bool]] = {
    "translate_x": (_translate_x, True),
    "translate_y": (_translate_y, True),
    "rotate": (_rotate, False),
    "brightness": (_brightness, True),
    "contrast": (_contrast, True),
    "color": (_color, True),
    "sharpness": (_sharpness, True),
    "posterize": (_posterize, False),
    "solarize": (_solarize, False),
    "invert": (_invert, False),
    "autocontrast": (_autocontrast, False),
}
"""By name; and whether the client draws a sign, that is, a direction or more against less."""


@dataclass(frozen=True)
class Step:
    """A transformation of a policy.

    Attributes:
        name: of the transformation.
        level: its magnitude, 0 to 9.
    """

    name: str
    level: int

    @property
    def signs(self) -> tuple[int, ...]:
        """What the client draws from."""
        return (1, -1) if TRANSFORMATIONS[self.name][1] else (1,)

    def __call__(self, images: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        """Transforms (n, c, h, w) in [0, 1], each with its own sign, (n,) or (1,)."""
        return TRANSFORMATIONS[self.name][0](images, self.level / LEVELS, sign.view(-1, 1, 1, 1))


class Ats(DataDefense):
    """Transforms each training image by a policy: up to three transformations, one after another.

    A policy is written as its transformations with their levels, such as ``translate_x 9, contrast
    6, translate_y 2``. The client draws one of the policies for each image, and for each
    transformation that has one a sign. Magnitudes at level 9: a translation by 45 % of the side
    (black comes in), a rotation by 30 degrees (grey comes in), a factor 1.5 or 0.5 for brightness,
    contrast, color and sharpness, 4 bits in posterize, a threshold of 0 in solarize; invert and
    autocontrast have none. Values are not rounded to 8 bits in between.

    The search of Gao et al. (CVPR 2021) draws from 50 transformations. Its policies 3-1-7 and
    43-18-18 for CIFAR-100 are ``translate_x 9, contrast 6, translate_y 2`` and ``translate_y 3,
    contrast 7, contrast 7``, which the hybrid takes together. Its equalize and shear are left out,
    and the random crops and flips that training adds.
    """

    name: ClassVar[str] = "ats"
    source: ClassVar[str] = "Gao et al., CVPR 2021"
    treats_each_image_alone: ClassVar[bool] = True
    broken_by: ClassVar[str] = "attacks early in training (Balunovic et al., ICLR 2022)"

    policies: tuple[str, ...] = Field(
        min_length=1, description="the policies, each up to three transformations with levels 0-9"
    )

    @field_validator("policies")
    @classmethod
    def _readable(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        for policy in policies:
            _steps(policy)
        return policies

    def draw(self, context: Context, images: int) -> Drawn:
        """Draws each image's policy, (images,), and signs, (images, 3)."""
        random, device = context.generator, context.generator.device
        policy = torch.randint(len(self.policies), (images,), generator=random, device=device)
        signs = torch.randint(2, (images, LONGEST), generator=random, device=device) * 2 - 1
        return {POLICY: policy, SIGNS: signs}

    @property
    def drawn_for_each_image(self) -> frozenset[str]:
        """The policy and the signs."""
        return frozenset({POLICY, SIGNS})

    def guesses(self, observed: Gradient | None) -> list[Drawn]:
        """Every policy with all of its signs, the same for all images of a batch."""
        return [
            {
                POLICY: torch.tensor([index]),
                SIGNS: torch.tensor([[*signs, *[1] * (LONGEST - len(signs))]]),
            }
            for index, policy in enumerate(self.policies)
            for signs in itertools.product(*[step.signs for step in _steps(policy)])
        ]

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transforms the images by their policies; the labels stay."""
        chosen = drawn[POLICY].to(images.device).view(-1, 1, 1, 1)
        signs = drawn[SIGNS].to(images)
        transformed = images
        # Which policy was drawn is not known when many are mapped over: all are computed.
        for index, policy in enumerate(self.policies):
            changed = images
            for position, step in enumerate(_steps(policy)):
                changed = step(changed, signs[:, position])
            transformed = torch.where(chosen == index, changed, transformed)
        return transformed, targets


def _steps(policy: str) -> list[Step]:
    parts = [part.split() for part in policy.split(",")]
    if len(parts) > LONGEST:
        raise ReasonError(POLICY_TOO_LONG(policy=policy, count=len(parts), most=LONGEST))
    steps = []
    for part in parts:
        if len(part) != 2 or part[0] not in TRANSFORMATIONS:
            raise ReasonError(
                NO_TRANSFORMATION(text=" ".join(part), known=", ".join(TRANSFORMATIONS))
            )
        name, level = part
        if level not in {str(number) for number in range(LEVELS + 1)}:
            raise ReasonError(NO_LEVEL(name=name, level=level))
        steps.append(Step(name, int(level)))
    return steps
