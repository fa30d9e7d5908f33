"""The optimizers of local training: what PyTorch's do in one step, as pure functions.

The replay of local training is mapped over candidates and differentiated, so nothing is changed in
place. Values are those of ``torch.optim`` with the parameters of the same names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ggl_audit.basics.gradient import Gradient, each, norm
from ggl_audit.spec import OPTIMIZER_KEYS, LocalTrainingSpec

State = dict[str, Gradient]
"""What an optimizer remembers between steps, by the names that PyTorch has for it."""

CLIP_ROUNDING = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``."""


class Optimizer(ABC):
    """One client's optimizer.

    Args:
        local: its parameters.
    """

    def __init__(self, local: LocalTrainingSpec) -> None:
        self.local = local

    @abstractmethod
    def start(self, weights: Gradient) -> State:
        """What it remembers before the first step."""

    @abstractmethod
    def step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        """The weights after a step, and what is remembered.

        Args:
            weights: before it.
            gradient: at these.
            state: what is remembered of earlier steps.
            step: their number.
        """

    def _with_decay(self, weights: Gradient, gradient: Gradient) -> Gradient:
        decay = self.local.weight_decay
        if not decay:
            return gradient
        return {name: tensor + decay * weights[name] for name, tensor in gradient.items()}


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum as Sutskever et al. (ICML 2013) have it."""

    def start(self, weights: Gradient) -> State:
        """Nothing: the first step's velocity is its gradient, not dampened."""
        return {}

    def step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        """By v = momentum v + (1 - dampening) g; w = w - lr v, or w - lr (g + momentum v)."""
        local, lr = self.local, self.local.lr_of(step)
        gradient = moved = self._with_decay(weights, gradient)
        if local.momentum:
            velocity = gradient
            if step > 0:
                share = 1 - local.dampening
                velocity = {
                    name: local.momentum * state["velocity"][name] + share * tensor
                    for name, tensor in gradient.items()
                }
            state, moved = {"velocity": velocity}, velocity
            if local.nesterov:
                moved = {n: g + local.momentum * velocity[n] for n, g in gradient.items()}
        return {name: weight - lr * moved[name] for name, weight in weights.items()}, state


class Adam(Optimizer):
    """Adam (Kingma and Ba, ICLR 2015), its decay added to the gradient; or with AMSGrad."""

    def start(self, weights: Gradient) -> State:
        """Moments of zero."""
        zero = each(torch.zeros_like, weights)
        return {"first": zero, "second": zero, "largest": zero}

    def step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        """By w = w - lr m / (sqrt(v) + eps), with the moments m and v as if not begun at zero."""
        return self._step(weights, self._with_decay(weights, gradient), state, step)

    def _step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        local, (beta1, beta2) = self.local, self.local.betas
        rate = local.lr_of(step) / (1 - beta1 ** (step + 1))
        root_of_share = (1 - beta2 ** (step + 1)) ** 0.5
        first = {n: beta1 * state["first"][n] + (1 - beta1) * g for n, g in gradient.items()}
        second = {n: beta2 * state["second"][n] + (1 - beta2) * g * g for n, g in gradient.items()}
        largest = second
        if local.amsgrad:
            largest = {n: torch.maximum(state["largest"][n], v) for n, v in second.items()}
        after = {
            name: weight - rate * first[name] / (_root(largest[name]) / root_of_share + local.eps)
            for name, weight in weights.items()
        }
        return after, {"first": first, "second": second, "largest": largest}


class AdamW(Adam):
    """Adam, its decay taken from the weights (Loshchilov and Hutter, ICLR 2019)."""

    def step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        """By w = (1 - lr weight_decay) w, then as Adam."""
        kept = 1 - self.local.lr_of(step) * self.local.weight_decay
        return self._step(each(lambda weight: kept * weight, weights), gradient, state, step)


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton, 2012); centered as Graves (2013) has it."""

    def start(self, weights: Gradient) -> State:
        """Averages of zero."""
        zero = each(torch.zeros_like, weights)
        return {"square": zero, "mean": zero, "velocity": zero}

    def step(
        self, weights: Gradient, gradient: Gradient, state: State, step: int
    ) -> tuple[Gradient, State]:
        """By v = momentum v + g / (sqrt(s) + eps) and w = w - lr v, s the mean of g^2."""
        local, alpha, mean = self.local, self.local.alpha, state["mean"]
        gradient = self._with_decay(weights, gradient)
        square = {n: alpha * state["square"][n] + (1 - alpha) * g * g for n, g in gradient.items()}
        spread = square
        if local.centered:
            mean = {n: alpha * mean[n] + (1 - alpha) * g for n, g in gradient.items()}
            spread = {n: s - mean[n] * mean[n] for n, s in square.items()}
        velocity = {
            name: local.momentum * state["velocity"][name] + g / (_root(spread[name]) + local.eps)
            for name, g in gradient.items()
        }
        lr = local.lr_of(step)
        after = {name: weight - lr * velocity[name] for name, weight in weights.items()}
        return after, {"square": square, "mean": mean, "velocity": velocity}


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
}


NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}


def clip_norm(gradient: Gradient, most: float) -> Gradient:
    """Scales a step's gradient to this norm at most, as ``torch.nn.utils.clip_grad_norm_``."""
    share = (most / (norm(gradient) + CLIP_ROUNDING)).clamp(max=1.0)
    return each(lambda tensor: share * tensor, gradient)


def rate_of_one_step(local: LocalTrainingSpec | None, images: int) -> float | None:
    """What a client's gradient is multiplied by in what it sends, 1 for the gradient itself.

    A clip of the step's norm may make it less, and weight decay adds as much of the weights.

    Args:
        local: how the client trains; None where it sends a gradient.
        images: of the client.

    Returns:
        None where more is done to it: by several steps, or by an optimizer that divides each value
        by its own size.
    """
    if local is None:
        return 1.0
    if local.optimizer != "sgd" or local.steps(images) > 1:
        return None
    parts = -(-images // (local.batch_size or images))
    share = parts / local.accumulate if parts < local.accumulate else 1.0
    ahead = 1 + local.momentum if local.nesterov else 1.0
    return local.lr_of(0) * share * ahead


def described(local: LocalTrainingSpec) -> str:
    """The optimizer and what is done beside it, in words."""
    rates = local.lr if isinstance(local.lr, list) else [local.lr]
    said = [f"lr {rates[0]:g}" if len(set(rates)) == 1 else f"lr {rates[0]:g} to {rates[-1]:g}"]
    for key in OPTIMIZER_KEYS[local.optimizer]:
        value = getattr(local, key)
        if value != LocalTrainingSpec.model_fields[key].default:
            said.append(_declared(key, value))
    others = ("weight_decay", "proximal", "clip_norm")
    said += [_declared(key, getattr(local, key)) for key in others if getattr(local, key)]
    if local.accumulate > 1:
        said.append(f"{local.accumulate} batches in a step")
    return f"{NAMES[local.optimizer]} with {', '.join(said)}"


def _declared(key: str, value: object) -> str:
    if isinstance(value, bool):
        return key
    numbers = value if isinstance(value, tuple) else (value,)
    return f"{key.replace('_', ' ')} {' and '.join(f'{number:g}' for number in numbers)}"


def _root(tensor: torch.Tensor) -> torch.Tensor:
    """The square root, whose derivative at zero is taken for zero, as it is infinite."""
    positive = tensor > 0
    return torch.where(positive, torch.where(positive, tensor, 1.0).sqrt(), 0.0)
