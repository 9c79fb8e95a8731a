"""Every supported layer and call, forward and gradient, against torch: each stands between trainable layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import assert_trains_like_torch, classified, normal

from evensong.mobile_runtime.compiler import zoo

pytestmark = pytest.mark.torch

N, CLASSES = 5, 3


class Between(nn.Module):
    """A trainable layer, the part under test, and a linear head on its flattened result."""

    def __init__(
        self, first: nn.Module, part: nn.Module | Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
    ):
        super().__init__()
        self.first = first
        self.part = part
        with torch.no_grad():
            self.features = self.eval().part(self.first(torch.zeros(2, *shape))).flatten(1).shape[1]
        self.head = nn.Linear(self.features, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.part(self.first(x)).flatten(1))


class Attention(nn.Module):
    """A squeeze-and-excitation gate: one factor for each channel of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.gate(x.mean(dim=(2, 3))))[:, :, None, None]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv(x))


class Position(nn.Module):
    """A learned row added to every example, and a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 4, 6))
        self.gain = nn.Parameter(torch.randn(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * (x + self.offset)


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class Recurrent(nn.Module):
    """A recurrent layer; ``reads`` says what of its results goes on."""

    def __init__(self, layer: nn.Module, reads: str = "states") -> None:
        super().__init__()
        self.layer = layer
        self.reads = reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, last = self.layer(x)
        if isinstance(last, tuple):
            last = last[0]
        return {"states": states, "last": last.transpose(0, 1), "both": torch.cat([states[:, -1], last[-1]], 1)}[
            self.reads
        ]


class TimeFirst(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = self.layer(x.transpose(0, 1))
        states = results[0] if isinstance(results, tuple) else results
        return states.transpose(0, 1)


class Attends(nn.Module):
    """Self-attention, or attention to the first steps, of a layer of torch."""

    def __init__(self, cross: bool = False, causal: bool = False, masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.cross, self.causal, self.masked = cross, causal, masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = x[:, :4] if self.cross else x
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        elif self.masked:
            mask = torch.arange(6)[:, None] + 2 < torch.arange(keys.shape[1])
        return self.layer(x, keys, keys, attn_mask=mask, is_causal=self.causal)[0]


class AttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, weights = self.layer(x, x.tanh(), x)
        return torch.cat([y, weights], dim=-1)


class EncoderDecoder(nn.Module):
    """torch's encoder and decoder layers; the decoder sees earlier steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        return self.decoder(x[:, :4], self.encoder(x), tgt_mask=mask, tgt_is_causal=True)


def dot_product(**options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads.tanh(), 2 * heads, **options)
        return y.transpose(1, 2).flatten(2)

    return run


class ClassToken(nn.Module):
    """A learned step before those of every example."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)


class Mixer(nn.Module):
    """A weight from the left: over the steps instead of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x


SEQUENCE = {
    "attention": Attends(),
    "attention, causal": Attends(causal=True),
    "attention, masked": Attends(masked=True),
    "attention to others": Attends(cross=True),
    "attention without bias": Attends(cross=True, bias=False),
    "attention of other sizes": Attends(kdim=4, vdim=4),
    "attention weights": AttentionWeights(),
    "attention, time first": TimeFirst(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)),
    "encoder and decoder": EncoderDecoder(),
    "dot product": dot_product(),
    "dot product, causal": dot_product(is_causal=True, scale=0.3),
    "dot product, masked": dot_product(attn_mask=torch.ones(6, 6).tril(2).bool()),
    "dot product, causal by its mask": dot_product(attn_mask=torch.ones(6, 6).tril().bool()),
    "dot product, biased": dot_product(attn_mask=torch.arange(36.0).reshape(6, 6) / 9),
    "dot product of one head": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x),
    "dot product over itself": lambda x: F.scaled_dot_product_attention(
        x.tanh(), x, x, attn_mask=x @ x.transpose(1, 2)
    ),
    "bmm": lambda x: torch.bmm(x, torch.tanh(x).transpose(1, 2)),
    "matmul": lambda x: torch.softmax(x @ x.mT, dim=-1) @ x,
    "matmul, left transposed": lambda x: x.mT @ torch.tanh(x),
    "matmul of heads": lambda x: (
        x.view(-1, 6, 2, 2).transpose(1, 2) @ torch.tanh(x.view(-1, 6, 2, 2)).permute(0, 2, 3, 1)
    ),
    "einsum": lambda x: torch.einsum("nij,nkj->nik", x, torch.tanh(x)),
    "einsum with weights": lambda x: torch.einsum("nij,jk->nki", x, torch.arange(12.0).reshape(4, 3) / 9),
    "class token": ClassToken(),
    "constants as large as the batch": lambda x: torch.cat([x + torch.ones(x.shape[0], 1, 4), torch.zeros_like(x)], 1),
    "weight from the left": Mixer(),
    "gru": Recurrent(nn.GRU(4, 5, batch_first=True)),
    "gru deep": Recurrent(nn.GRU(4, 3, num_layers=2, batch_first=True, dropout=0.0), "both"),
    "gru both ways": Recurrent(nn.GRU(4, 3, num_layers=2, batch_first=True, bidirectional=True), "last"),
    "gru without bias": Recurrent(nn.GRU(4, 3, bias=False, batch_first=True), "last"),
    "gru time first": TimeFirst(nn.GRU(4, 3, bidirectional=True)),
    "lstm": Recurrent(nn.LSTM(4, 5, batch_first=True)),
    "lstm deep": Recurrent(nn.LSTM(4, 3, num_layers=2, batch_first=True), "both"),
    "lstm both ways": Recurrent(nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True), "last"),
    "lstm without bias": Recurrent(nn.LSTM(4, 3, bias=False, batch_first=True), "last"),
}

IMAGE = {
    "conv 3x3": nn.Conv2d(4, 6, 3),
    "conv same": nn.Conv2d(4, 6, (3, 4), padding="same"),
    "conv stride": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2)),
    "conv dilation": nn.Conv2d(4, 6, 2, dilation=2),
    "conv groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "conv depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2),
    "conv without bias": nn.Conv2d(4, 6, 1, bias=False),
    "max pool": nn.MaxPool2d(2),
    "max pool overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "max pool ceil": nn.MaxPool2d(2, ceil_mode=True),
    "relu then max pool": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "avg pool": nn.AvgPool2d(2),
    "avg pool padded": nn.AvgPool2d(3, stride=2, padding=1),
    "avg pool without padding": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "adaptive average 1": nn.AdaptiveAvgPool2d(1),
    "adaptive average": nn.AdaptiveAvgPool2d((7, 1)),
    "adaptive max": nn.AdaptiveMaxPool2d(1),
    "batch norm": nn.BatchNorm2d(4),
    "batch norm, relu, pool": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
    "batch norm without affine": nn.BatchNorm2d(4, affine=False),
    "layer norm over all": nn.LayerNorm((4, 7, 5)),
    "residual": Residual(),
    "squeeze and excitation": Attention(),
    "concatenated branches": lambda x: torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), x[:, :, 0, 0]], dim=1),
    "channel shuffle": lambda x: x.view(x.shape[0], 2, 2, 7, 5).transpose(1, 2).reshape(x.shape[0], 4, 7, 5),
    "concat on channels": lambda x: torch.cat([x, torch.sigmoid(x)], dim=1),
    "chunk": lambda x: torch.mul(*x.chunk(2, dim=1)),
    "split": lambda x: torch.cat(x.split([1, 3], dim=1)[::-1], dim=2 - 1),
    "slice": lambda x: x[:, 1:3, :, 2:],
    "mean of height": lambda x: x.mean(dim=2),
    "mean of the outer": lambda x: x.mean(dim=(1, 3)),
    "moved axis": lambda x: x.movedim(-1, 1),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "zero padding": nn.ZeroPad2d((1, 2, 0, 3)),
    "padding that cuts": nn.ZeroPad2d((-1, 1, 2, -2)),
    "padding into a convolution": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 2)), nn.Conv2d(4, 4, 3, stride=2, padding=1)),
    "padded channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 3)),
    "transposed conv": nn.ConvTranspose2d(4, 3, 3),
    "transposed conv options": nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, bias=False),
    "transposed conv depthwise": nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4),
    "transposed conv dilated": nn.ConvTranspose2d(4, 2, 2, stride=2, padding=1, output_padding=1, dilation=3),
    "group norm": nn.GroupNorm(2, 4),
    "group norm of all": nn.GroupNorm(1, 4, affine=False),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "rms norm over all": nn.RMSNorm((4, 7, 5)),
    "standardised": lambda x: (x - x.mean(dim=(2, 3), keepdim=True)) / x.std(dim=(2, 3), keepdim=True),
    "prelu": nn.PReLU(4),
    "softmax over channels": lambda x: F.softmax(x, dim=1),
    "dropout in evaluation": nn.Dropout(0.0),
}

SIGNAL = {
    "conv": nn.Conv1d(4, 5, 3),
    "conv options": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    "conv same": nn.Conv1d(4, 4, 3, padding="same"),
    "max pool": nn.MaxPool1d(2),
    "avg pool": nn.AvgPool1d(3, stride=1),
    "adaptive average": nn.AdaptiveAvgPool1d(3),
    "adaptive max": nn.AdaptiveMaxPool1d(1),
    "batch norm": nn.BatchNorm1d(4),
    "zero padding": nn.ConstantPad1d((2, 1), 0.0),
    "transposed conv": nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "transposed conv options": nn.ConvTranspose1d(4, 6, 2, stride=3, groups=2, dilation=2),
    "group norm": nn.GroupNorm(4, 4),
    "rms norm": nn.RMSNorm(6, eps=1e-4),
    "gate from the mean": lambda x: x * x.mean(dim=1, keepdim=True),
    "masked": lambda x: x.masked_fill(torch.ones(4, 6).triu(1) > 0, -2.0),
    "chosen by a mask": lambda x: torch.where(torch.arange(6) % 2 == 0, x, torch.tanh(x)),
    "masked softmax": lambda x: x.masked_fill(torch.ones(4, 6).triu(3).bool(), float("-inf")).softmax(-1),
    "outer product": lambda x: x[:, :, None, :] * x[:, None, :, :],
    "mean and max": lambda x: torch.cat([x.mean(-1), x.max(-1).values], dim=1),
    "sum": lambda x: x.sum(dim=-1, keepdim=True),
    "layer norm": nn.LayerNorm(6),
    "positions": Position(),
    "transpose and linear": lambda x: F.linear(x.transpose(1, 2), torch.ones(2, 4) / 3),
}

VECTOR = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0, 6),
    "clamp": lambda x: x.clamp(min=0),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(0.7),
    "prelu": nn.PReLU(),
    "hardtanh other bounds": nn.Hardtanh(-0.5, 1.5),
    "clamp to bounds": lambda x: x.clamp(-0.3, 0.4) + x.clamp_min(0.1) * x.clamp(max=0.2),
    "exp and log": lambda x: torch.exp(x) + torch.log(x * x + 0.1),
    "roots": lambda x: (x.abs() + 0.2).sqrt() + (x * x + 0.3).rsqrt(),
    "powers": lambda x: x**3 + x**4 + (x * x + 0.5) ** -1 + (x * x + 0.5) ** 1.5 + (x * x + 0.5) ** -2 + 1 / (x.exp()),
    "quotients": lambda x: x / (1 + x.abs()) + torch.sigmoid(x) / x.exp(),
    "sign": lambda x: x * torch.sign(x),
    "largest and smallest": lambda x: torch.maximum(x, torch.tanh(2 * x)) - torch.minimum(x, torch.zeros(6)),
    "normalised": lambda x: F.normalize(x, dim=1),
    "variance": lambda x: x - x.var(dim=1, unbiased=False, keepdim=True),
    "rms norm": nn.RMSNorm(6),
    "group norm": nn.GroupNorm(2, 6),
    "softmax": nn.Softmax(dim=1),
    "log softmax": nn.LogSoftmax(dim=-1),
    "layer norm": nn.LayerNorm(6),
    "layer norm without affine": nn.LayerNorm(6, elementwise_affine=False),
    "batch norm": nn.BatchNorm1d(6),
    "tied": Tied(),
    "scalars": lambda x: (2 * x - 1) / 3 + (1 - x) * 0.5 - (-x),
    "square": lambda x: x**2 + x * x,
    "fan-out": lambda x: torch.tanh(x) + torch.sigmoid(x) * x,
    "subtract": lambda x: torch.tanh(x) - x,
    "reshape": lambda x: x.view(-1, 2, 3).transpose(1, 2).flatten(1),
    "unflatten": nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Flatten()),
    "stack": lambda x: torch.stack([x, torch.tanh(x)], dim=1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1).contiguous().clone(),
    "product with a constant": lambda x: x @ torch.arange(12.0).reshape(6, 2).div(10),
    "rows per example": lambda x: F.log_softmax(x.reshape(-1, 3), dim=1).reshape(-1, 6),
}


@pytest.mark.parametrize("name", IMAGE)
def test_image_layers(name: str) -> None:
    torch.manual_seed(3)
    model = Between(nn.Conv2d(2, 4, 3, padding=1), IMAGE[name], (2, 7, 5))
    assert_trains_like_torch(model, normal((N, 2, 7, 5)), classified(CLASSES, N), steps=3)


@pytest.mark.parametrize("name", SIGNAL)
def test_signal_layers(name: str) -> None:
    torch.manual_seed(3)
    model = Between(nn.Conv1d(2, 4, 3, padding=1), SIGNAL[name], (2, 6))
    assert_trains_like_torch(model, normal((N, 2, 6)), classified(CLASSES, N), steps=3)


@pytest.mark.parametrize("name", VECTOR)
def test_vector_layers(name: str) -> None:
    torch.manual_seed(3)
    model = Between(nn.Linear(4, 6), VECTOR[name], (4,))
    assert_trains_like_torch(model, normal((N, 4)), classified(CLASSES, N), steps=3)


@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_layers(name: str) -> None:
    torch.manual_seed(3)
    model = Between(nn.Linear(2, 4), SEQUENCE[name], (6, 2))
    assert_trains_like_torch(model, normal((N, 6, 2)), classified(CLASSES, N), steps=3, batch_sizes=(N, 2))


class Tokens(nn.Module):
    """An embedding whose tokens are averaged, or a bag that does both."""

    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(11, 6, mode="mean") if bag else nn.Embedding(11, 6)
        self.bag = bag
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        return self.head(rows if self.bag else rows.mean(dim=1))


@pytest.mark.parametrize("bag", [False, True])
def test_tokens(bag: bool) -> None:
    torch.manual_seed(3)
    ids = np.random.default_rng(0).integers(0, 11, (N, 7)).astype(np.int32)
    assert_trains_like_torch(Tokens(bag), ids, classified(CLASSES, N), steps=3)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_other_losses(loss: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    target = np.random.default_rng(1).integers(0, 2, (N, 2)).astype(np.float32)
    assert_trains_like_torch(model, normal((N, 4)), target, loss=loss)


def test_cross_entropy_for_each_position() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, CLASSES, 1))
    labels = np.random.default_rng(1).integers(0, CLASSES, (N, 6)).astype(np.int32)
    assert_trains_like_torch(model, normal((N, 2, 6)), labels)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (zoo.mlp, (784,)),
        (zoo.small_cnn, (1, 28, 28)),
        (zoo.har_cnn, (9, 128)),
        (zoo.digits_cnn, (1, 8, 8)),
        pytest.param(zoo.fedavg_cnn, (1, 28, 28), marks=pytest.mark.slow),
    ],
)
def test_the_shared_models(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Same losses as torch to 1e-5 over 8 steps, with batches smaller than the program's as well."""
    assert_trains_like_torch(make(), normal((8, *shape)) / 2, classified(6, 8), batch_sizes=(8, 3, 1))
