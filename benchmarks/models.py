"""The models that the runtime is measured on, in plain PyTorch; parameters are counted in the docstrings."""

from __future__ import annotations

import torch
from torch import nn


def mlp() -> nn.Module:
    """784-200-10: 159,010 parameters."""
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def small_cnn() -> nn.Module:
    """3x3 convolutions 16-32 over 28x28 images: 20,490 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def fedavg_cnn() -> nn.Module:
    """The CNN of McMahan et al. (2017), 5x5 convolutions 32-64 and 512 units: 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


class HarCnn(nn.Module):
    """1-D convolutions over nine sensor channels of 128 samples: 14,150 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(9, 24, 9, stride=2),
            nn.ReLU(),
            nn.Conv1d(24, 32, 5, stride=2),
            nn.ReLU(),
            nn.Conv1d(32, 48, 5, stride=2),
            nn.ReLU(),
        )
        self.mean, self.max = nn.AvgPool1d(12), nn.MaxPool1d(12)
        self.head = nn.Linear(96, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 9, 128]`` float32 to logits ``[n, 6]``."""
        x = self.body(x)
        pooled: torch.Tensor = self.head(torch.cat([self.mean(x), self.max(x)], dim=1).flatten(1))
        return pooled


#: Model, shape of one example, classes.
MODELS = {
    "mlp": (mlp, (784,), 10),
    "small_cnn": (small_cnn, (1, 28, 28), 10),
    "fedavg_cnn": (fedavg_cnn, (1, 28, 28), 10),
    "har_cnn": (HarCnn, (9, 128), 6),
}
