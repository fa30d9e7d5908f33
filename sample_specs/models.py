"""The client's model of the sample audits, as a user's own file: a small CNN for 16x16 digits."""

from torch import nn


def small_cnn(classes: int = 10) -> nn.Module:
    """Two strided convolutions and two linear layers, about 20,000 parameters."""
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
