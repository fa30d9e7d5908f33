"""DP-SGD steps as clients write them, right ones and some with a mistake in the clip or noise."""

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


def summed(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, bound: float, std: float
) -> Gradient:
    """The sum of clipped gradients, and noise."""
    private = mean(
        [clipped(single(model, *pair), bound) for pair in zip(images, labels, strict=True)]
    )
    return noisy({name: len(images) * tensor for name, tensor in private.items()}, std)


def noise_of(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, std: float, kind: str
) -> Gradient:
    """The gradient of one image, clipped to 1, with noise that is right or of some wrong kind."""
    gradient = clipped(single(model, images[0], labels[0]), 1.0)
    seed = 1234 if kind == "seeded" else int(torch.randint(2**31, ()))
    draw, short = torch.Generator().manual_seed(seed), torch.randn(64)
    sent = {}
    for name, tensor in gradient.items():
        noise = torch.randn(tensor.shape, generator=draw)
        if kind == "tiled":
            repeats = -(-tensor.numel() // 64)
            noise = short.repeat(repeats)[: tensor.numel()].view_as(tensor)
        if kind == "tensors alike":
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        if kind == "a hundredth without":
            noise = noise * (torch.rand(tensor.shape, generator=draw) > 0.01)
        if kind == "head without" and name.startswith("7."):
            noise = torch.zeros_like(noise)
        if kind == "drawn in bfloat16":
            noise = noise.bfloat16().float()
        sent[name] = tensor + std * noise
    if kind.startswith("sent in "):
        sent = {name: tensor.to(getattr(torch, kind[8:])) for name, tensor in sent.items()}
    if kind == "five times the share":
        sent = {name: tensor + 4 * gradient[name] for name, tensor in sent.items()}
    return sent


def hundredth(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Gradient:
    """The gradient itself, times a learning rate."""
    return {name: tensor / 100 for name, tensor in single(model, images[0], labels[0]).items()}
