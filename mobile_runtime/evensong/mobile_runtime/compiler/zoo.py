"""The models that the product and its benchmarks share. Each is made from a seed and is the same on every machine."""

from __future__ import annotations

import torch
from torch import nn


def mlp(seed: int = 0) -> nn.Module:
    """784-200-10, the 2NN's smaller sister: 159,010 parameters. Input [n, 784]."""
    return _initialised(nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)), seed)


def small_cnn(seed: int = 0) -> nn.Module:
    """28x28 grey images, 3x3 convolutions of 16 and 32 channels: 20,490 parameters. Input [n, 1, 28, 28]."""
    return _initialised(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        ),
        seed,
    )


def fedavg_cnn(seed: int = 0) -> nn.Module:
    """The CNN of McMahan et al. 2017 for 28x28 images: 1,663,370 parameters. Input [n, 1, 28, 28]."""
    return _initialised(
        nn.Sequential(
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
        ),
        seed,
    )


class HarCnn(nn.Module):
    """Activity from 2.56 s of nine motion signals: 14,150 parameters. Input [n, 9, 128], result [n, 6]."""

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
        self.head = nn.Linear(96, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        pooled = torch.cat([features.mean(dim=-1), features.amax(dim=-1)], dim=1)
        return self.head(pooled)  # type: ignore[no-any-return]


def har_cnn(seed: int = 0) -> nn.Module:
    """A :class:`HarCnn` from a seed."""
    return _initialised(HarCnn(), seed)


class DigitsCnn(nn.Module):
    """scikit-learn's handwritten digits, 8x8 with values 0 to 1. Input [n, 1, 8, 8], result [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def digits_cnn(seed: int = 0) -> nn.Module:
    """A :class:`DigitsCnn` from a seed."""
    return _initialised(DigitsCnn(), seed)


def _initialised(model: nn.Module, seed: int) -> nn.Module:
    """He-uniform weights and zero biases from one generator, in the order of the state dict; the global one is left
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                bound = (6.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
    return model
