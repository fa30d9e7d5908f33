"""Tries a generator before it is searched: does it draw what it is declared to draw?"""

from __future__ import annotations

import math
from typing import Any

import torch

from ggl_audit.basics.device import widened
from ggl_audit.basics.randomness import stream
from ggl_audit.errors import SpecError, raised
from ggl_audit.inputs.images import Shape
from ggl_audit.messages import Message, Said
from ggl_audit.priors.prior import Prior
from ggl_audit.spec import PriorSpec

SAMPLES = 64
TOGETHER = 8
ALONE = 3

BEYOND = 0.1
"""How far beyond output_range a value may be, in widths of the range: generators without a final
tanh overshoot."""

SHARE_BEYOND = 0.01
"""The share of the values, on each side, that may be farther beyond."""

PART_OF_RANGE = 0.525
"""Pictures in [0, 1], with a little overshoot, fill that much of a declared [-1, 1]."""

BRIGHT = 0.025
"""How far below the middle of output_range the darkest value of [0, 1] may come by overshoot."""

REPEATABLE = 1e-5
"""Between two drawings of the same latents, images in [0, 1]."""

INDEPENDENT = 1e-3
"""Between a latent drawn alone and among others; batches are summed in another order."""

RESIZED_OTHERWISE = Message(
    "generator/resized-otherwise",
    "{size}, but the model takes images of {expected}",
    advice="Set `prior.resize` to the height and width of `model.input.shape`.",
)
CALL_FAILS = Message(
    "generator/call-fails",
    "the generator was called with {inputs} and failed with {error}",
    "prior.latent, prior.labels and prior.classes say what it is called with.",
    advice="Correct `prior.latent`, `prior.labels` and `prior.classes`, which say what it is "
    "called with.",
)
RETURNS_NO_PICTURES = Message(
    "generator/returns-no-pictures",
    "the generator returned a {kind}{length}; expected one tensor of pictures (n, channels, "
    "height, width)",
    "Name a factory that wraps it and returns the pictures alone.",
    advice="Name a factory that wraps the generator and returns the pictures alone.",
)
PICTURES_OF_OTHER_SHAPE = Message(
    "generator/pictures-of-other-shape",
    "the generator was called with {inputs} and returned {shape} {dtype}; expected ({count}, "
    "channels, height, width)",
    advice="Name a factory that wraps the generator and returns the pictures alone.",
)
PICTURES_NOT_FINITE = Message(
    "generator/pictures-not-finite",
    "the generator draws values that are NaN or infinite",
    advice="Give the weights that it was trained to, in single precision.",
)
OTHER_OUTPUT_SHAPE = Message(
    "generator/other-output-shape",
    "{shape}, but {prior} draws {drawn} (channels, height, width)",
    advice="Correct `prior.output_shape`, or the weights and arguments of the generator.",
)
OTHER_COLOUR = Message(
    "generator/other-colour",
    "{colour}, but {prior} draws {drawn}",
    advice="Leave `prior.colour` out, or give the one that fits what is drawn.",
)
DRAWS_OTHER_IMAGES = Message(
    "generator/draws-other-images",
    "{prior} draws images of {drawn} (channels, height, width); the model takes {shape}",
    "{declare} a prior of that size: `ggl-audit prior train` makes one from your images.",
    advice="Declare `prior.colour` and `prior.resize` to have them converted, or train a prior of "
    "that size with `ggl-audit prior train`.",
)
DECLARE_THE_RANGE = (
    "Declare `prior.output_range`: the values of black and white in the generator's output."
)
BEYOND_RANGE = Message(
    "generator/beyond-range",
    "{count} pictures have values from {lowest:.3g} to {highest:.3g}, and {share:.0%} of them "
    "are far beyond {range}",
    "Declare the values of black and white in the generator's output.",
    advice=DECLARE_THE_RANGE,
)
BRIGHT_HALF = Message(
    "generator/bright-half",
    "{count} pictures have values from {lowest:.3g} to {highest:.3g}, the bright half of "
    "{range}, which is taken where nothing is declared",
    "Are they in [0, 1]? Declare output_range: [0, 1], or [-1, 1] if they are that bright.",
    advice=DECLARE_THE_RANGE,
)
IS_RANDOM = Message(
    "generator/is-random",
    "the generator is random: it draws two pictures of one latent, which differ by "
    "{difference:.2g} of the range",
    "Make it deterministic (StyleGAN: noise_mode='const').",
    advice='Switch off its noise (StyleGAN: `noise_mode="const"`), in a factory if need be.',
)
DEPENDS_ON_OTHERS = Message(
    "generator/depends-on-others",
    "the generator draws a latent otherwise alone than among others ({how}), as batch norm in "
    "training mode does",
    "Give one in eval mode; a traced or exported one has to be saved in eval mode.",
    advice="Give it in eval mode; a traced or exported one has to be saved so.",
)

USES_LITTLE_OF_RANGE = Message(
    "doubt/uses-little-of-range",
    "{prior} uses little of output_range {range}: {count} pictures have values from {lowest:.3g} "
    "to {highest:.3g}; if that is not what black and white are in its output, its pictures are not "
    "those it was trained to draw",
    advice="Check `prior.output_range`; this weakens only the floor and the comparison with the "
    "canaries.",
)


def try_out(
    prior: Prior, declared: PriorSpec, shape: Shape, classes: int, seed: int, device: torch.device
) -> list[Said]:
    """Draws pictures from all over the latent space and looks at them.

    Args:
        prior: to be tried.
        declared: what the spec says of it.
        shape: (channels, height, width) that the model takes.
        classes: of the model; the labels are spread over them.
        seed: decides the latents.
        device: of the generator.

    Returns:
        Why ``output_range`` may be wrong, where that cannot be told for sure.

    Raises:
        SpecError: the generator fails, returns something else than pictures of the model's size in
            the declared range, or draws a latent differently from time to time.
    """
    if declared.resize is not None and declared.resize != shape[1:]:
        raise SpecError(
            ("prior", "resize"),
            RESIZED_OTHERWISE(size=list(declared.resize), expected=list(shape[1:])),
        )
    random = stream(seed, "prior trial")
    latents = torch.as_tensor(random.standard_normal((SAMPLES // TOGETHER, TOGETHER, prior.size)))
    latents = latents.to(device, torch.float32)
    labels = torch.linspace(0, classes - 1, SAMPLES, device=device).round().long()
    labels = labels.view(TOGETHER, -1).T
    extents = []
    with torch.no_grad():
        for some_latents, some_labels in zip(latents, labels, strict=True):
            output = _draw(prior, declared, some_latents, some_labels)
            _check_shape(prior, declared, output, shape)
            extents.append(_extent(output, prior))
        doubts = _check_range(torch.stack(extents), prior, declared)
        _check_repeatable(prior, declared, latents[0], labels[0])
    return doubts


def _draw(
    prior: Prior, declared: PriorSpec, latents: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """What the generator gives for n latents, (n, channels, height, width), finite."""
    inputs = prior.inputs(latents, labels)
    shown = ", ".join(
        f"{name} {tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}"
        for name, given in zip(("latents", "labels"), inputs, strict=False)
    )
    key = ("prior", declared.source)
    try:
        output: Any = prior.generator(*inputs)
    except (Exception, SystemExit) as error:
        # The generator is the user's own code.
        raise SpecError(key, CALL_FAILS(inputs=shown, error=raised(error))) from error
    if not isinstance(output, torch.Tensor):
        length = f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else ""
        raise SpecError(key, RETURNS_NO_PICTURES(kind=type(output).__name__, length=length))
    if output.ndim != 4 or len(output) != len(latents) or output.is_complex():
        raise SpecError(
            key,
            PICTURES_OF_OTHER_SHAPE(
                inputs=shown,
                shape=tuple(output.shape),
                dtype=str(output.dtype).removeprefix("torch."),
                count=len(latents),
            ),
        )
    if not bool(torch.isfinite(output).all()):
        raise SpecError(key, PICTURES_NOT_FINITE())
    return output


def _check_shape(prior: Prior, declared: PriorSpec, output: torch.Tensor, shape: Shape) -> None:
    drawn = tuple(output.shape[1:])
    if declared.output_shape is not None and drawn != declared.output_shape:
        raise SpecError(
            ("prior", "output_shape"),
            OTHER_OUTPUT_SHAPE(
                shape=list(declared.output_shape), prior=prior.source, drawn=list(drawn)
            ),
        )
    channels = drawn[0]
    if declared.colour is not None:
        taken, given = (1, 3) if declared.colour == "grey_to_rgb" else (3, 1)
        if channels != taken:
            raise SpecError(
                ("prior", "colour"),
                OTHER_COLOUR(colour=declared.colour, prior=prior.source, drawn=list(drawn)),
            )
        channels = given
    size = drawn[1:] if declared.resize is None else declared.resize
    if (channels, *size) == shape:
        return
    conversions = []
    if channels != shape[0] and {drawn[0], shape[0]} == {1, 3}:
        conversions.append("colour: " + ("grey_to_rgb" if shape[0] == 3 else "rgb_to_grey"))
    if size != shape[1:]:
        conversions.append(f"resize: [{shape[1]}, {shape[2]}]")
    declare = f"Declare {' and '.join(conversions)} to have them converted, or give"
    raise SpecError(
        ("prior",),
        DRAWS_OTHER_IMAGES(
            prior=prior.source,
            drawn=list(drawn),
            shape=list(shape),
            declare=declare if conversions else "Give",
        ),
    )


def _extent(output: torch.Tensor, prior: Prior) -> torch.Tensor:
    """Lowest and highest value, and the shares far below black and far above white, (4,)."""
    black, white = prior.conversion.output_range
    values = widened(output)
    slack = BEYOND * (white - black)
    return torch.stack(
        [
            values.min(),
            values.max(),
            widened(values < black - slack).mean(),
            widened(values > white + slack).mean(),
        ]
    )


def _check_range(extents: torch.Tensor, prior: Prior, declared: PriorSpec) -> list[Said]:
    black, white = prior.conversion.output_range
    lowest, highest = float(extents[:, 0].min()), float(extents[:, 1].max())
    below, above = extents[:, 2:].mean(dim=0).tolist()
    key = ("prior", "output_range")
    bounds = f"[{black:g}, {white:g}]"
    seen = {"count": SAMPLES, "lowest": lowest, "highest": highest, "range": bounds}
    if max(below, above) > SHARE_BEYOND:
        raise SpecError(key, BEYOND_RANGE(**seen, share=max(below, above)))
    if highest - lowest > PART_OF_RANGE * (white - black):
        return []
    middle = (black + white) / 2
    flat = highest - lowest < 1e-3 * (white - black)
    bright = lowest >= middle - BRIGHT * (white - black)
    if bright and not flat and "output_range" not in declared.model_fields_set:
        raise SpecError(key, BRIGHT_HALF(**seen))
    return [USES_LITTLE_OF_RANGE(**seen, prior=prior.source)]


def _check_repeatable(
    prior: Prior, declared: PriorSpec, latents: torch.Tensor, labels: torch.Tensor
) -> None:
    key = ("prior", declared.source)
    first, second = prior.decode(latents, labels), prior.decode(latents, labels)
    if float((first - second).abs().max()) > REPEATABLE:
        raise SpecError(key, IS_RANDOM(difference=float((first - second).abs().max())))
    for index in range(ALONE):
        one = slice(index, index + 1)
        try:
            alone = prior.decode(latents[one], labels[one])
            apart = float((first[one] - alone).abs().max())
            found = f"by {apart:.2g} of the range"
        except (Exception, SystemExit) as error:
            # The generator is the user's own code.
            apart, found = math.inf, f"{type(error).__name__}: {error}"
        if apart > INDEPENDENT:
            raise SpecError(key, DEPENDS_ON_OTHERS(how=found))
