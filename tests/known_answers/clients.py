"""DP-SGD steps as clients write them, one right and four with a mistake."""

import torch
import torch.nn.functional as F
from torch import nn

Gradient = dict[str, torch.Tensor]


def single(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> Gradient:
    model.zero_grad()
    F.cross_entropy(model(image[None]), label[None]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def clipped(gradient: Gradient, bound: float) -> Gradient:
    norm = torch.stack([tensor.norm() for tensor in gradient.values()]).norm()
    return {name: tensor * min(1.0, bound / float(norm)) for name, tensor in gradient.items()}


def noisy(gradient: Gradient, std: float) -> Gradient:
    return {name: tensor + std * torch.randn_like(tensor) for name, tensor in gradient.items()}


def mean(gradients: list[Gradient]) -> Gradient:
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}


def step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    bound: float,
    std: float,
    mistake: str = "none",
) -> Gradient:
    gradients = [single(model, image, label) for image, label in zip(images, labels, strict=True)]
    if mistake == "noise before clip":
        return mean([clipped(noisy(gradient, std), bound) for gradient in gradients])
    if mistake == "batch clipped":
        return noisy(clipped(mean(gradients), bound), std)
    private = mean([clipped(gradient, bound) for gradient in gradients])
    if mistake == "no noise":
        return private
    return noisy(private, std / 10 if mistake == "a tenth of the noise" else std)


def hundredth(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    """The gradient itself, times a learning rate."""
    return {name: tensor / 100 for name, tensor in single(model, images[0], labels[0]).items()}
