"""What can be wrong with a spec by itself."""

from __future__ import annotations

from ggl_audit.messages import Message

CHANNEL_VALUES = Message(
    "model/channel-values",
    "{name} has {count} values; expected 1 or {channels} (the channels of shape)",
    advice="Give `mean` and `std` one value, or one for each channel.",
)
BGR = Message(
    "model/bgr",
    "channels: bgr is for 3 channels; shape has {channels}",
    advice="Leave `channels` out, or give `shape` as channels, height, width.",
)
LOSS_NAME_OR_FACTORY = Message(
    "loss/name-or-factory",
    "give either name or factory",
    advice="Name a loss that is known (`cross_entropy`, `binary_cross_entropy`) or your own "
    "callable.",
)
KWARGS_WITHOUT_FACTORY = Message(
    "model/kwargs-without-factory",
    "kwargs are for a factory",
    advice="Leave `kwargs` out; a saved program takes no arguments, nor does a loss that is given "
    "by name.",
)
LEAVE_THE_PARAMETER_OUT = (
    "Leave the parameter out; a callable of yours takes its own in `model.loss.kwargs`."
)
FOR_CROSS_ENTROPY = Message(
    "loss/for-cross-entropy",
    "label_smoothing and weight are for cross_entropy",
    advice=LEAVE_THE_PARAMETER_OUT,
)
FOR_BINARY_CROSS_ENTROPY = Message(
    "loss/for-binary-cross-entropy",
    "pos_weight is for binary_cross_entropy",
    advice=LEAVE_THE_PARAMETER_OUT,
)
ONE_MODEL = Message(
    "model/one-model",
    "give exactly one of {keys}",
    advice="Keep the one key that says where the model is from.",
)
EVAL_MODULES = Message(
    "model/eval-modules",
    "eval_modules are for a factory in mode: train",
    advice="Declare `mode: train`, or leave `eval_modules` out; a saved program stays in the mode "
    "it was saved in.",
)
A_RATE_OR_A_LIST = (
    "Declare `capture.local.lr` as a number, or as a list: one for each step of the optimizer, "
    "over all epochs."
)
NO_LEARNING_RATE = Message(
    "capture/no-learning-rate",
    "expected a learning rate above zero, or a list with that of each local step, found "
    "{value!r:.80}",
    advice=A_RATE_OR_A_LIST,
)
KEYS_OF_THE_OPTIMIZER = (
    "Leave the key out, or declare the `optimizer` that it belongs to; the keys are those of "
    "`torch.optim`."
)
OTHER_OPTIMIZERS = Message(
    "capture/other-optimizers",
    "{keys}: not for optimizer: {optimizer}",
    advice=KEYS_OF_THE_OPTIMIZER,
)
NESTEROV = Message(
    "capture/nesterov",
    "nesterov needs momentum, and no dampening",
    advice=KEYS_OF_THE_OPTIMIZER,
)
LABELS_OR_TARGETS = Message(
    "loss/labels-or-targets",
    "give labels or targets, not both",
    advice="Give `capture.labels` for class indices, `capture.targets` for all else.",
)
GRADIENT_OR_CHECKPOINTS = (
    "Declare either `capture.gradient`, or `capture.after` (and `before`) with `kind: update`."
)
ONE_CAPTURE = Message(
    "capture/one-capture",
    "give gradient, or after (a checkpoint) for kind: update",
    advice=GRADIENT_OR_CHECKPOINTS,
)
AFTER = Message(
    "capture/after",
    "after is for kind: update",
    advice=GRADIENT_OR_CHECKPOINTS,
)
BEFORE = Message(
    "capture/before",
    "before is for after, the checkpoint after training",
    advice=GRADIENT_OR_CHECKPOINTS,
)
OTHERS = Message(
    "capture/others",
    "others are for captures that gradient names, without targets",
    advice=GRADIENT_OR_CHECKPOINTS,
)
LABELS_COUNT = Message(
    "labels/count",
    "labels has {count} entries; expected {batch_size} (capture.batch_size) for each client, or "
    "'infer'",
    advice="Declare a label for each image, `capture.batch_size` for each client, in the order of "
    "the clients.",
)
LOCAL_FOR_AN_UPDATE = (
    "Declare `capture.local` for an update, and only there: optimizer and its keys, learning "
    "rate, epochs, batch size, what is accumulated, clip, weight decay, proximal term."
)
NEEDS_LOCAL = Message(
    "capture/needs-local",
    "kind: update needs local: {{lr: ...}}, how the client trained",
    advice=LOCAL_FOR_AN_UPDATE,
)
LOCAL = Message(
    "capture/local",
    "local is for kind: update",
    advice=LOCAL_FOR_AN_UPDATE,
)
LEARNING_RATES = Message(
    "capture/learning-rates",
    "local.lr has {count} entries; expected one for each of {steps} local steps",
    advice=A_RATE_OR_A_LIST,
)
SIGN = Message(
    "capture/sign",
    "sign: after_minus_before is for kind: update, of a gradient file",
    advice="Leave it out: a gradient has one sign, and of checkpoints the tool makes the "
    "difference itself.",
)
MOMENTS = Message(
    "capture/moments",
    "previous and beta1 are for kind: moments",
    advice="Leave them out; only Adam's moments need them.",
)
STEP_NAME_OR_FACTORY = Message(
    "defense/step-name-or-factory",
    "a step needs either name or factory",
    advice="Give each entry of `defense` one of the two.",
)
TRUNCATION = Message(
    "generator/truncation",
    "truncation is for distribution: truncated",
    advice="Declare `distribution: truncated`, or leave `truncation` out.",
)
LATENT_TOO_LARGE = Message(
    "generator/latent-too-large",
    "shape has more values than {limit:,}, too many to search",
    advice="Declare the latent itself, or search a smaller one by `prior.latent_mapping` or a "
    "factory that expands it.",
)
ONE_IMAGE_SET = Message(
    "image/one-image-set",
    "give exactly one of bundled, npz and folder",
    advice="Say once where the images are.",
)
SPLIT = Message("image/split", "split is for an npz", advice="Say once where the images are.")
ONE_PRIOR = Message(
    "generator/one-prior",
    "give exactly one of {keys}",
    advice="Keep the one key that says where the generator is from.",
)
FOR_OWN_GENERATOR = Message(
    "generator/for-own-generator",
    "{keys}: only for one's own generator",
    advice="Leave these keys out; a bundled or trained prior has them on its card.",
)
NEEDS_LATENT = Message(
    "generator/needs-latent",
    "one's own generator needs latent: {{shape: [...]}}",
    advice="Declare what it takes, without the batch: `latent: {shape: [100, 1, 1]}`.",
)
KWARGS_AND_WEIGHTS = Message(
    "generator/kwargs-and-weights",
    "kwargs and weights are for a factory",
    advice="Leave them out; a saved program holds its weights.",
)
EMBEDDING = Message(
    "generator/embedding",
    "labels: embedding and embedding: FILE need each other",
    advice="Declare how the generator takes labels, and only what belongs to it.",
)
CLASSES = Message(
    "generator/classes",
    "classes is for labels: index or one_hot",
    advice="Declare how the generator takes labels, and only what belongs to it.",
)
OUTPUT_RANGE = Message(
    "generator/output-range",
    "output_range must go from black to white, low to high",
    advice="Write `[BLACK, WHITE]`, for example `[-1, 1]`; invert in a factory what draws white "
    "as the lowest value.",
)
TOO_FEW_EVALUATIONS = Message(
    "spec/too-few-evaluations",
    "evaluations is {evaluations}, but {restarts} restarts with a population of {population} take "
    "at least {least}",
    advice="Raise `attack.evaluations`, or lower `attack.restarts` or `attack.population`.",
)
NOTHING_TO_DOWNLOAD = Message(
    "image/nothing-to-download",
    "weights are given, so there is nothing to download",
    advice="Leave out `evidence.lpips.weights` or `evidence.lpips.download`.",
)
NEEDS_GUARANTEE = Message(
    "client/needs-guarantee",
    "client.batch_size above 1 needs guarantee: {{unit: sample, reduction: ...}}: a batch is "
    "taken apart by what each sample may add to it",
    advice="Declare the `guarantee`, or set `client.batch_size` to 1.",
)
