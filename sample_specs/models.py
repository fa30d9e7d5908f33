"""The clients' models of the sample audits, as a user's own file: small CNNs for grey images."""

from torch import nn


def small_cnn(classes: int = 10) -> nn.Module:
    """For 16x16 digits: two strided convolutions and two linear layers, 20,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def radiograph_cnn(classes: int = 2) -> nn.Module:
    """For 28x28 radiographs: of the same form, smooth, 55,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 32),
        nn.SiLU(),
        nn.Linear(32, classes),
    )
