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


class DsCnn(nn.Module):
    """The depthwise separable keyword spotter of *Hello Edge* (Zhang et al. 2017), as MLPerf Tiny has it. Input
    [n, 1, 49, 10] (49 frames of 10 cepstral coefficients), result [n, 12].
    """

    def __init__(self, channels: int = 64, blocks: int = 4, classes: int = 12) -> None:
        super().__init__()
        layers = [_normalised(nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1), bias=False))]
        for _ in range(blocks):
            layers.append(_normalised(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)))
            layers.append(_normalised(nn.Conv2d(channels, channels, 1, bias=False)))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def ds_cnn(seed: int = 0) -> nn.Module:
    """A :class:`DsCnn` from a seed: 23,180 parameters."""
    return _initialised(DsCnn(), seed)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter by channel, project; added to its input where the shapes are equal."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_normalised(nn.Conv2d(inputs, hidden, 1, bias=False), nn.ReLU6()))
        layers.append(
            _normalised(nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False), nn.ReLU6())
        )
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if self.is_residual else y  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), channels rounded to multiples of 8. Input [n, 3, 96, 96]."""

    #: expansion, channels at width 1, blocks, stride of the first
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, width: float = 0.35, classes: int = 10) -> None:
        super().__init__()
        channels = _multiple_of_8(32 * width)
        features: list[nn.Module] = [
            _normalised(nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.ReLU6())
        ]
        for expansion, full_channels, blocks, first_stride in self.STAGES:
            outputs = _multiple_of_8(full_channels * width)
            for block in range(blocks):
                features.append(InvertedResidual(channels, outputs, first_stride if block == 0 else 1, expansion))
                channels = outputs
        features.append(_normalised(nn.Conv2d(channels, 1280, 1, bias=False), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def mobilenet_v2_035(seed: int = 0) -> nn.Module:
    """A :class:`MobileNetV2` of width 0.35 for ten classes, from a seed: 408,938 parameters."""
    return _initialised(MobileNetV2(), seed)


def _normalised(convolution: nn.Conv2d, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), activation or nn.ReLU())


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and never more than a tenth below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _initialised(model: nn.Module, seed: int) -> nn.Module:
    """He-uniform weights, zero biases and neutral normalisation from one generator, in the order of the state dict;
    the global one is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if _is_scale(model, name) else 0.0)
            else:
                bound = (6.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
    return model


def _is_scale(model: nn.Module, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and isinstance(model.get_submodule(module), nn.BatchNorm2d)
