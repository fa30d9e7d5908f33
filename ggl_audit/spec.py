"""What was declared: the audit's YAML file as pydantic models.

Every key, its type, its range and its default stand here and nowhere else; ``ggl-audit schema
spec`` prints them as JSON Schema. Paths are kept as they were written; :meth:`Spec.resolve` makes
them absolute, relative to the folder of the spec.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from ggl_audit import spec_messages
from ggl_audit.errors import Key, ReasonError

MEMORY_OF_A_PROCESSOR = 256
"""MiB: the chunks that fit its caches are the fast ones."""

Pixels = Annotated[int, Field(ge=1)]
Split = Literal["train", "val", "test"]
Layout = Literal["channels_first", "channels_last"]

MODEL_SOURCES = ("factory", "exported")
PRIOR_SOURCES = ("bundled", "trained", "factory", "exported")
LARGEST_LATENT = 100_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ImageFormat(_Section):
    """How the model wants its images: ``(image - mean) / std`` with the image in [0, 1]."""

    shape: tuple[
        Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
    ] = Field(description="channels, height, width")
    mean: list[float] = Field(default=[0.0], description="one value, or one a channel")
    std: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0], description="one value, or one a channel"
    )
    channels: Literal["rgb", "bgr"] = Field(
        default="rgb", description="bgr: as OpenCV reads; mean and std are in this order"
    )

    @model_validator(mode="after")
    def _one_value_or_one_a_channel(self) -> ImageFormat:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.shape[0]):
                raise ReasonError(
                    spec_messages.CHANNEL_VALUES(
                        name=name, count=len(getattr(self, name)), channels=self.shape[0]
                    )
                )
        if self.channels == "bgr" and self.shape[0] != 3:
            raise ReasonError(spec_messages.BGR(channels=self.shape[0]))
        return self


class LossSpec(_Section):
    """The client's training loss; ``scale`` multiplies it, as a loss weight would.

    One's own is called as ``loss(outputs, targets)``, returns a scalar for the batch, and does the
    reduction that is declared here by itself.
    """

    name: Literal["cross_entropy", "binary_cross_entropy"] | None = Field(
        default="cross_entropy", description="both take logits; unless there is a factory"
    )
    factory: str | None = Field(
        default=None,
        description="file.py:callable or package.module:callable, one's own; a class is made first",
    )
    kwargs: dict[str, Any] = Field(default={}, description="of the factory")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="for cross_entropy")
    weight: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="of each class, for cross_entropy"
    )
    pos_weight: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="of each logit's ones, for binary_cross_entropy"
    )
    reduction: Literal["mean", "sum"] = Field(default="mean", description="over the batch")
    scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _name_or_factory(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("factory") is not None:
            data = {"name": None, **data}
        return data

    @model_validator(mode="after")
    def _what_belongs_to_the_loss(self) -> LossSpec:
        if (self.name is None) == (self.factory is None):
            raise ReasonError(spec_messages.LOSS_NAME_OR_FACTORY())
        if self.factory is None and self.kwargs:
            raise ReasonError(spec_messages.KWARGS_WITHOUT_FACTORY())
        if self.name != "cross_entropy" and (self.label_smoothing or self.weight):
            raise ReasonError(spec_messages.FOR_CROSS_ENTROPY())
        if self.name != "binary_cross_entropy" and self.pos_weight:
            raise ReasonError(spec_messages.FOR_BINARY_CROSS_ENTROPY())
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it is cross-entropy without label smoothing and weights."""
        return self.name == "cross_entropy" and not self.label_smoothing and not self.weight

    def __str__(self) -> str:
        names = {"cross_entropy": "cross-entropy", "binary_cross_entropy": "binary cross-entropy"}
        return self.factory or names[str(self.name)]


class ModelSpec(_Section):
    """The client's model at the round of the capture."""

    factory: str | None = Field(
        default=None,
        description="file.py:callable beside the spec, package.module:callable, or "
        "torchvision:name",
    )
    exported: Path | None = Field(
        default=None, description="a file of torch.export.save, with a dynamic batch dimension"
    )
    kwargs: dict[str, Any] = Field(default={}, description="of the factory")
    weights: Path | None = Field(
        default=None,
        description="tensors by name or in order: .safetensors, .pt, .npz; those of the program, "
        "or of the factory, unless given",
    )
    layout: Layout = Field(
        default="channels_first", description="of weights; channels_last: see capture.layout"
    )
    input: ImageFormat
    output: Annotated[int, Field(ge=0)] | str | None = Field(
        default=None,
        description="what of it the loss is of, where it returns more than one tensor: a key or an "
        "attribute, or a place from 0; unless given, its `logits`, and all of it for a loss of "
        "one's own",
    )
    loss: LossSpec = LossSpec()
    frozen: list[str] = Field(
        default=[], description="parameters that are not trained, as names or patterns: features.*"
    )
    mode: Literal["eval", "train"] = Field(
        default="eval", description="train: batch norm uses the statistics of the batch"
    )
    eval_modules: list[str] = Field(
        default=[],
        description="for mode: train, modules that are in eval mode, with all that is in them, as "
        "names or patterns: backbone.*",
    )

    @model_validator(mode="before")
    @classmethod
    def _loss_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(loss := data.get("loss"), str):
            data = {**data, "loss": {"factory" if ":" in loss else "name": loss}}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if sum(getattr(self, source) is not None for source in MODEL_SOURCES) != 1:
            raise ReasonError(spec_messages.ONE_MODEL(keys=", ".join(MODEL_SOURCES)))
        if self.factory is None and self.kwargs:
            raise ReasonError(spec_messages.KWARGS_WITHOUT_FACTORY())
        return self

    @model_validator(mode="after")
    def _eval_modules_of_a_factory_in_train_mode(self) -> ModelSpec:
        if self.eval_modules and (self.factory is None or self.mode != "train"):
            raise ReasonError(spec_messages.EVAL_MODULES())
        return self

    @property
    def source(self) -> str:
        """The key that says where the model is from."""
        return next(source for source in MODEL_SOURCES if getattr(self, source) is not None)

    @property
    def origin(self) -> str:
        """What that key says."""
        return str(getattr(self, self.source))


OPTIMIZER_KEYS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
"""What belongs to each optimizer of local training, beside lr and weight_decay."""

ADAMW_DECAY = 0.01

Beta = Annotated[float, Field(ge=0, lt=1)]


def _learning_rates(value: Any) -> Any:
    rates = value if isinstance(value, list) else [value]
    try:
        usable = any(float(rate) > 0 for rate in rates) and min(map(float, rates)) >= 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ReasonError(spec_messages.NO_LEARNING_RATE(value=value))
    return value


LearningRates = Annotated[
    Annotated[float, Field(gt=0)] | list[Annotated[float, Field(ge=0)]],
    BeforeValidator(_learning_rates),
]


class LocalTrainingSpec(_Section):
    """Local training before an update is sent (FedAvg: McMahan et al., AISTATS 2017).

    The optimizers are those of ``torch.optim``, with their parameters and defaults. A scale that
    mixed precision multiplies the loss and divides the gradient by has no effect.
    """

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: LearningRates = Field(
        description="learning rate; a schedule as a list with that of each local step"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the client's images")
    batch_size: int | None = Field(
        default=None, ge=1, description="images taken together; all of them unless declared"
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="batches whose gradients, divided by this number, are summed up for a local "
        "step; at the end of an epoch it may be fewer",
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="of the gradient in each local step, clip_grad_norm_"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="for sgd and rmsprop")
    dampening: float = Field(default=0.0, ge=0, le=1, description="of the momentum, for sgd")
    nesterov: bool = Field(default=False, description="for sgd with momentum")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="for adam and adamw")
    amsgrad: bool = Field(default=False, description="for adam and adamw")
    alpha: float = Field(default=0.99, ge=0, lt=1, description="for rmsprop")
    centered: bool = Field(default=False, description="for rmsprop")
    eps: float = Field(default=1e-8, gt=0, description="for adam, adamw and rmsprop")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="L2 regularization; of adamw decoupled, and 0.01 unless declared",
    )
    proximal: float = Field(
        default=0.0, ge=0, description="FedProx's mu (Li et al., MLSys 2020, equation 2)"
    )
    order: Literal["fixed", "shuffled"] = Field(
        default="fixed", description="shuffled: drawn anew in each epoch, unknown to the attacker"
    )
    fresh: bool = Field(
        default=True,
        description="false: the optimizer goes on with its state of earlier rounds, which is not "
        "known",
    )

    @model_validator(mode="before")
    @classmethod
    def _decay_of_adamw(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("optimizer") == "adamw":
            data = {"weight_decay": ADAMW_DECAY, **data}
        return data

    @model_validator(mode="after")
    def _what_belongs_to_the_optimizer(self) -> LocalTrainingSpec:
        known = {key for keys in OPTIMIZER_KEYS.values() for key in keys}
        odd = sorted(self.model_fields_set & (known - {*OPTIMIZER_KEYS[self.optimizer]}))
        if odd:
            raise ReasonError(
                spec_messages.OTHER_OPTIMIZERS(keys=", ".join(odd), optimizer=self.optimizer)
            )
        if self.nesterov and (not self.momentum or self.dampening):
            raise ReasonError(spec_messages.NESTEROV())
        return self

    def steps(self, images: int) -> int:
        """The number of local steps on so many images."""
        parts = -(-images // (self.batch_size or images))
        return self.epochs * -(-parts // self.accumulate)

    def lr_of(self, step: int) -> float:
        """The learning rate of a local step, from 0."""
        return self.lr[step] if isinstance(self.lr, list) else self.lr

    @property
    def remembers(self) -> bool:
        """Whether the optimizer has a state."""
        return self.optimizer != "sgd" or self.momentum > 0


class IgnoredSpec(_Section):
    """What of a capture is left out, and why; the report repeats both."""

    name: str = Field(min_length=1, description="of the file, as a name or a pattern: optimizer.*")
    reason: str = Field(min_length=1)


class CaptureSpec(_Section):
    """What was captured and what is known of it."""

    gradient: Path | None = Field(
        default=None, description="tensors by name or in order: .safetensors, .pt, .npz"
    )
    before: Path | None = Field(
        default=None, description="with after: weights before training; the model's unless given"
    )
    after: Path | None = Field(
        default=None, description="for kind: update, in place of gradient: weights after training"
    )
    others: list[Path] = Field(
        default=[],
        description="captures of other clients in the same round, each checked and attacked too",
    )
    unsent: list[str] = Field(
        default=[],
        description="parameters and buffers that are never sent, as names or patterns: head.*",
    )
    layout: Layout = Field(
        default="channels_first",
        description="channels_last: kernels as (height, width, in, out) and dense layers as (in, "
        "out), as Keras, TensorFlow and JAX have them",
    )
    ignored: list[IgnoredSpec] = Field(
        default=[],
        description="what the file holds beside the trained parameters and is left out, though it "
        "was sent; each with the reason",
    )
    kind: Literal["gradient", "update", "moments"] = Field(
        default="gradient",
        description="update: weights before local training minus those after; moments: Adam's "
        "first moment, in the clear",
    )
    sign: Literal["before_minus_after", "after_minus_before"] = Field(
        default="before_minus_after",
        description="of an update that gradient names: after_minus_before, as MONAI sends it",
    )
    local: LocalTrainingSpec | None = Field(default=None, description="for kind: update")
    previous: Path | None = Field(
        default=None, description="for kind: moments, the one before; without, the state was fresh"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="for kind: moments")
    stage: Literal["defended", "raw"] = Field(
        default="defended", description="raw: the tool applies the declared defense first"
    )
    batch_size: int = Field(default=1, ge=1, description="images of one client")
    labels: Literal["infer"] | list[Annotated[int, Field(ge=0)]] | None = Field(
        default="infer", description="class indices; none where there are targets"
    )
    targets: Path | None = Field(
        default=None,
        description="what the images were to give, where that is more than a class: a tensor with "
        "a row for each, as the labels of the reference set",
    )

    @model_validator(mode="before")
    @classmethod
    def _targets_in_place_of_labels(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("targets") is not None:
            data = {"labels": None, **data}
        return data

    @model_validator(mode="after")
    def _labels_or_targets(self) -> CaptureSpec:
        if (self.labels is None) == (self.targets is None):
            raise ReasonError(spec_messages.LABELS_OR_TARGETS())
        return self

    @model_validator(mode="after")
    def _one_source(self) -> CaptureSpec:
        if (self.gradient is None) == (self.after is None):
            raise ReasonError(spec_messages.ONE_CAPTURE())
        if self.after is not None and self.kind != "update":
            raise ReasonError(spec_messages.AFTER())
        if self.before is not None and self.after is None:
            raise ReasonError(spec_messages.BEFORE())
        if self.others and (self.gradient is None or self.kind == "moments" or self.targets):
            raise ReasonError(spec_messages.OTHERS())
        return self

    @model_validator(mode="after")
    def _labels_for_every_client(self) -> CaptureSpec:
        if isinstance(self.labels, list) and (
            not self.labels or len(self.labels) % self.batch_size
        ):
            raise ReasonError(
                spec_messages.LABELS_COUNT(count=len(self.labels), batch_size=self.batch_size)
            )
        return self

    @model_validator(mode="after")
    def _what_belongs_to_the_kind(self) -> CaptureSpec:
        if self.kind == "update" and self.local is None:
            raise ReasonError(spec_messages.NEEDS_LOCAL())
        if self.kind != "update" and self.local is not None:
            raise ReasonError(spec_messages.LOCAL())
        if self.local is not None and isinstance(self.local.lr, list):
            steps = self.local.steps(self.batch_size)
            if len(self.local.lr) != steps:
                raise ReasonError(
                    spec_messages.LEARNING_RATES(count=len(self.local.lr), steps=steps)
                )
        if self.sign == "after_minus_before" and (self.kind != "update" or self.gradient is None):
            raise ReasonError(spec_messages.SIGN())
        if self.kind != "moments" and (self.previous or "beta1" in self.model_fields_set):
            raise ReasonError(spec_messages.MOMENTS())
        return self


class DefenseSpec(BaseModel):
    """One step of the declared defense: its name, and the parameters that the name asks for."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str | None = Field(default=None, description="as `ggl-audit list defenses` has it")
    factory: str | None = Field(
        default=None, description="file.py:callable or package.module:callable, one's own"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DefenseSpec:
        if (self.name is None) == (self.factory is None):
            raise ReasonError(spec_messages.STEP_NAME_OR_FACTORY())
        return self


class ClientSpec(_Section):
    """The client's own code, run on canaries in place of this tool's idea of the defense.

    It is called as ``step(model, images, labels, **kwargs)``, with normalized images (n, channels,
    height, width) and labels (n,), and returns what it sends by parameter name. Its randomness is
    PyTorch's, which is seeded before each call.
    """

    step: str = Field(description="file.py:callable beside the spec, or package.module:callable")
    kwargs: dict[str, Any] = {}
    batch_size: int = Field(
        default=1, ge=1, description="images in a step; the attacker knows all but one"
    )


class GuaranteeSpec(_Section):
    """What has to be known to account for differential privacy; nothing of it is guessed."""

    unit: Literal["sample", "client"] = Field(
        description="whose presence is to be hidden: what the clip bounds"
    )
    reduction: Literal["sum", "mean"] = Field(
        description="the noise is added to the sum over the units of a release, or to their mean"
    )
    rounds: int = Field(ge=1, description="releases over the whole training")
    sampling_rate: float = Field(
        gt=0, le=1, description="probability that a unit takes part in a round; 1: in every one"
    )
    delta: float = Field(gt=0, lt=1)
    epsilon: float | None = Field(
        default=None, gt=0, description="what the client claims, to be compared"
    )


class LatentSpec(_Section):
    """The shape and the distribution of what a generator takes, each value drawn by itself."""

    shape: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="without the batch: [64], or [100, 1, 1]"
    )
    distribution: Literal["normal", "uniform", "truncated"] = Field(
        default="normal",
        description="normal: N(0, 1); uniform: U[-1, 1]; truncated: N(0, 1) within +-truncation",
    )
    truncation: float = Field(
        default=2.0,
        gt=0,
        le=6,
        description="for distribution: truncated (BigGAN, Brock et al., ICLR 2019, draws within 2)",
    )

    @model_validator(mode="after")
    def _can_be_drawn(self) -> LatentSpec:
        if "truncation" in self.model_fields_set and self.distribution != "truncated":
            raise ReasonError(spec_messages.TRUNCATION())
        if math.prod(self.shape) > LARGEST_LATENT:
            raise ReasonError(spec_messages.LATENT_TOO_LARGE(limit=LARGEST_LATENT))
        return self


class ImageSetSpec(_Section):
    """A set of labelled images: a bundled one, an ``.npz`` or a folder with one folder a class."""

    bundled: str | None = None
    npz: Path | None = Field(default=None, description="arrays images (n, h, w[, c]) and labels")
    split: Split | None = Field(
        default=None, description="of an npz with train_images and train_labels and so on: MedMNIST"
    )
    folder: Path | None = Field(default=None, description="CLASS_INDEX/*.png")

    @model_validator(mode="after")
    def _one_source(self) -> ImageSetSpec:
        if sum(source is not None for source in (self.bundled, self.npz, self.folder)) != 1:
            raise ReasonError(spec_messages.ONE_IMAGE_SET())
        if self.split is not None and self.npz is None:
            raise ReasonError(spec_messages.SPLIT())
        return self


class PriorSpec(_Section):
    """The generator whose latent space is searched: bundled, trained by this tool, or one's own.

    One's own is called as ``generator(latents)``, or ``generator(latents, labels)``, and returns
    pictures (n, channels, height, width).
    """

    bundled: str | None = None
    trained: Path | None = Field(default=None, description="a folder that `prior train` wrote")
    factory: str | None = Field(
        default=None, description="file.py:callable or package.module:callable"
    )
    kwargs: dict[str, Any] = Field(default={}, description="of the factory")
    weights: Path | None = Field(
        default=None, description="for a factory: .safetensors, .pt (weights only) or .npz"
    )
    exported: Path | None = Field(default=None, description="a file of torch.export.save")
    latent: LatentSpec | None = None
    latent_mapping: str | None = Field(
        default=None,
        description="file.py:callable or package.module:callable; called with the generator, it "
        "returns what maps latents to the w that the generator takes, where the search then runs",
    )
    labels: Literal["none", "index", "one_hot", "embedding"] = Field(
        default="none", description="what the generator takes as its second argument"
    )
    classes: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="for labels: index or one_hot; the model's unless declared"
    )
    embedding: Path | None = Field(
        default=None, description="for labels: embedding, a file of one tensor (classes, features)"
    )
    output_range: tuple[float, float] = Field(
        default=(-1.0, 1.0), description="what black and white are in the generator's output"
    )
    output_shape: tuple[Pixels, Pixels, Pixels] | None = Field(
        default=None, description="channels, height, width of the generator's output"
    )
    colour: Literal["grey_to_rgb", "rgb_to_grey"] | None = Field(
        default=None,
        description="grey_to_rgb: three equal channels; rgb_to_grey: ITU-R 601 luma, as Pillow's L",
    )
    resize: tuple[Pixels, Pixels] | None = Field(
        default=None, description="to height, width: bilinear, antialiased, as torchvision's"
    )
    trained_on: ImageSetSpec | None = Field(
        default=None, description="what one's own generator was trained on, where it is known"
    )

    @model_validator(mode="after")
    def _one_source(self) -> PriorSpec:
        if sum(getattr(self, source) is not None for source in PRIOR_SOURCES) != 1:
            raise ReasonError(spec_messages.ONE_PRIOR(keys=", ".join(PRIOR_SOURCES)))
        if self.bundled is not None or self.trained is not None:
            given = self.model_fields_set - {"bundled", "trained", "colour", "resize"}
            if given:
                raise ReasonError(spec_messages.FOR_OWN_GENERATOR(keys=", ".join(sorted(given))))
        elif self.latent is None:
            raise ReasonError(spec_messages.NEEDS_LATENT())
        if self.factory is None and (self.kwargs or self.weights):
            raise ReasonError(spec_messages.KWARGS_AND_WEIGHTS())
        return self

    @model_validator(mode="after")
    def _labels_and_range(self) -> PriorSpec:
        if (self.labels == "embedding") != (self.embedding is not None):
            raise ReasonError(spec_messages.EMBEDDING())
        if self.classes is not None and self.labels not in ("index", "one_hot"):
            raise ReasonError(spec_messages.CLASSES())
        if self.output_range[0] >= self.output_range[1]:
            raise ReasonError(spec_messages.OUTPUT_RANGE())
        return self

    @property
    def source(self) -> str:
        """The key that says where the generator is from."""
        return next(source for source in PRIOR_SOURCES if getattr(self, source) is not None)


class RegularizerSpec(_Section):
    """A penalty on latents that the prior would not draw.

    ``posterior`` weighs the prior's density against the declared noise as Bayes' rule does, and is
    nothing without noise; ``kl`` and ``norm`` are the paper's (Li et al. 2022, section 3.3).
    """

    name: Literal["none", "posterior", "kl", "norm"] = "posterior"
    weight: float = Field(default=0.1, ge=0, description="of kl and norm")


class SubspaceSpec(_Section):
    """The few directions of the latent space that an optimizer is given that bears no more."""

    directions: Literal["random", "principal"] = Field(
        default="random",
        description="random: each search has its own; principal: those along which the generator's "
        "pictures change most",
    )
    dimension: int = Field(
        default=12, ge=1, description="how many; all of a latent space that has fewer"
    )


class AttackSpec(_Section):
    """Generative Gradient Leakage, and how hard it tries for each image."""

    method: Literal["auto", "ggl"] = Field(
        default="auto",
        description="ggl: the latent search alone; auto: also its refinement by derivatives, and "
        "the pixels without a prior, wherever there are derivatives",
    )
    steps: int = Field(
        default=200, ge=1, description="of Adam, in each attack that follows derivatives"
    )
    representation: float = Field(
        default=0.0,
        ge=0,
        description="weight of the representation that the head's gradient shows, as an extra term "
        "of the attacks that follow derivatives; without effect where it does not show",
    )
    optimizer: str = Field(
        default="gauss_newton",
        description="as `ggl-audit list optimizers` has it; for gauss_newton cma stands in where "
        "too few of its steps fit, and the report says so",
    )
    evaluations: int = Field(
        default=3000, ge=1, description="candidates tried for an image, all restarts together"
    )
    restarts: int = Field(default=1, ge=1, description="independent searches for each image")
    population: int = Field(default=12, ge=2, description="candidates of a search at a time")
    sigma: float = Field(default=0.3, gt=0, description="first step size, in prior deviations")
    subspace: SubspaceSpec | None = Field(
        default=None,
        description="for an optimizer that searches one, as bayesian (unless given: 12 random "
        "directions) and turbo (all)",
    )
    distance: Literal["l2", "cosine"] = "l2"
    regularizer: RegularizerSpec = RegularizerSpec()

    @model_validator(mode="after")
    def _budget_is_possible(self) -> AttackSpec:
        least = self.restarts * (self.population + 1)  # and the point that each recommends
        if self.evaluations < least:
            raise ReasonError(
                spec_messages.TOO_FEW_EVALUATIONS(
                    evaluations=self.evaluations,
                    restarts=self.restarts,
                    population=self.population,
                    least=least,
                )
            )
        return self


class LpipsSpec(_Section):
    """Where the weights of the LPIPS backbone are; the package carries only the linear heads."""

    net: Literal["alex", "squeeze", "vgg"] = "alex"
    weights: Path | None = Field(
        default=None,
        description="torchvision's ImageNet weights of the backbone; those in PyTorch's hub cache "
        "unless given",
    )
    download: bool = Field(
        default=False, description="whether they may be fetched into that cache, where they lack"
    )

    @model_validator(mode="after")
    def _one_source(self) -> LpipsSpec:
        if self.weights is not None and self.download:
            raise ReasonError(spec_messages.NOTHING_TO_DOWNLOAD())
        return self


def _listed(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, (str, Path)) else value


_OneOrMore = Annotated[
    list[Path],
    BeforeValidator(_listed),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "null"},
            ]
        }
    ),
]


class EvidenceSpec(_Section):
    """What the grade rests on."""

    reference: ImageSetSpec | None = Field(
        default=None, description="public images like the private ones; without, the prior's own"
    )
    candidates: int = Field(default=32, ge=2, description="N: the truth and N - 1 of its class")
    matching_trials: int = Field(default=200, ge=0, description="trials of the ceiling")
    reconstruction_trials: int = Field(
        default=20, ge=0, description="trials of the floor, and of the null control"
    )
    control_trials: int = Field(default=10, ge=0, description="trials of the undefended control")
    distance: Literal["pixels", "representation", "lpips"] = Field(
        default="pixels", description="by which a picture picks its candidate, for the floor"
    )
    stop_early: bool = Field(
        default=False, description="end an experiment once the grade cannot change any more"
    )
    truth: _OneOrMore = Field(
        default=[],
        description="the private image, where it is held; of several all of them, in the order of "
        "capture.labels and client by client",
    )
    public: list[Literal["label"]] = Field(
        default=[], description="questions whose answers are no secret, which no verdict counts"
    )
    lpips: LpipsSpec | None = Field(
        default=None,
        description="declared, it is measured for all canaries; else only between the private "
        "image and its picture, where PyTorch's hub cache has the weights",
    )


class GateSpec(_Section):
    """When an audit fails."""

    fail_on: Literal["A", "B", "C", "D", "F"] = Field(
        default="C", description="exit 1 at this grade or a worse one"
    )


class Spec(_Section):
    """One audit, as declared."""

    version: Literal[1]
    model: ModelSpec
    capture: CaptureSpec
    defense: list[DefenseSpec] = Field(default=[], description="in the client's order")
    client: ClientSpec | None = None
    guarantee: GuaranteeSpec | None = None
    prior: PriorSpec
    attack: AttackSpec = AttackSpec()
    evidence: EvidenceSpec = EvidenceSpec()
    gate: GateSpec = GateSpec()
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N, xpu or mps")
    memory: int | None = Field(
        default=None,
        ge=1,
        description="MiB that candidates' gradients may take at a time, about; unless given 256, "
        "and an eighth of what an accelerator has",
    )
    time_limit: float | None = Field(
        default=None, gt=0, description="seconds after which the audit ends with what it has"
    )

    @model_validator(mode="after")
    def _batches_are_of_samples(self) -> Spec:
        if self.client is None or self.client.batch_size == 1:
            return self
        if self.guarantee is None or self.guarantee.unit != "sample":
            raise ReasonError(spec_messages.NEEDS_GUARANTEE())
        return self

    _folder: Path = PrivateAttr(default=Path())
    _locate: Callable[[Key], str] | None = PrivateAttr(default=None)

    @property
    def memory_bytes(self) -> int:
        """What :attr:`memory` comes to in bytes."""
        return (self.memory or MEMORY_OF_A_PROCESSOR) * 2**20

    def resolve(self, path: Path) -> Path:
        """Makes a path of the spec usable: relative ones start at the folder of the spec."""
        return self._folder / path

    @property
    def folder(self) -> Path:
        """The folder that relative paths and factories start from."""
        return self._folder

    def locate(self, key: Key) -> str:
        """Names the file and line that declared a key, as far as they are known."""
        return self._locate(key) if self._locate else ""

    def placed(self, folder: Path, locate: Callable[[Key], str]) -> Spec:
        """Remembers where the spec came from, for paths and for messages."""
        self._folder = folder
        self._locate = locate
        return self
