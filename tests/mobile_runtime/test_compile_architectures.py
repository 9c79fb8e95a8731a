"""Random small architectures trained for eight steps: whatever the compiler makes of them, the engines follow torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import assert_trains_like_torch, classified, normal

from evensong.mobile_runtime.compiler import SGD, Adam

pytestmark = pytest.mark.torch

CLASSES = 4

#: Smooth almost everywhere and well conditioned, so that rounding does not grow over the steps.
ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Tanh, nn.SiLU]
OPTIMIZERS = [
    SGD(),
    SGD(momentum=0.9),
    SGD(momentum=0.8, weight_decay=0.01, nesterov=True),
    Adam(eps=1e-3),
    Adam(eps=1e-3, weight_decay=0.01),
    Adam(eps=1e-3, weight_decay=0.1, decoupled=True),
]


class Branches(nn.Module):
    """Two paths from one input that are added or joined."""

    def __init__(self, left: nn.Module, right: nn.Module, join: bool) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.left(x), self.right(x)
        return torch.cat([a, b], dim=1) if self.join else a + b


@st.composite
def image_models(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A stack of convolutions, norms, activations, pools and branches over [channels, height, width], and a head."""
    channels, height, width = draw(st.integers(1, 4)), draw(st.integers(4, 9)), draw(st.integers(4, 9))
    shape = (channels, height, width)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        grown = 4 * draw(st.integers(1, 2))
        kind = draw(st.sampled_from(["conv", "branches", "grouped", "strided"]))
        norm = draw(st.booleans())
        bias = not norm  # a bias before batch norm has no gradient but rounding, which Adam would blow up
        if kind == "branches":
            join = draw(st.booleans())
            one, three = nn.Conv2d(channels, grown, 1, bias=bias), nn.Conv2d(channels, grown, 3, padding=1, bias=bias)
            layers.append(Branches(one, three, join))
            grown *= 1 + join
        elif kind == "grouped" and channels % 4 == 0:
            groups = draw(st.sampled_from([2, 4]))
            layers.append(nn.Conv2d(channels, grown, 3, padding=1, groups=groups, bias=bias))
        elif kind == "strided":
            layers.append(nn.Conv2d(channels, grown, (3, 2), stride=(2, 1), padding=1, bias=bias))
        else:
            size, padding = draw(st.sampled_from([1, 3])), draw(st.integers(0, 1))
            layers.append(nn.Conv2d(channels, grown, size, padding=padding, bias=bias))
        channels = grown
        if norm:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if min(_shape_after(layers, shape)) >= 4:
            layers.append(
                draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.Identity()]))
            )
        if min(_shape_after(layers, shape)) < 3:
            break
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Flatten())
    features = _shape_after(layers, shape)[0]
    if draw(st.booleans()):
        layers += [nn.Linear(features, 6), nn.LayerNorm(6), nn.Tanh()]
        features = 6
    return nn.Sequential(*layers, nn.Linear(features, CLASSES)), shape


def _shape_after(layers: list[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(nn.Sequential(*layers).eval()(torch.zeros(2, *shape)).shape[1:])


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_image_models_train_like_torch(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    model, shape = data.draw(image_models(), label="model")
    optimizer = data.draw(st.sampled_from(OPTIMIZERS), label="optimizer")
    # batch norm with one example has no variance: torch refuses it
    least = 2 if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else 1
    sizes = data.draw(st.lists(st.integers(least, 6), min_size=1, max_size=3), label="batch sizes")
    assert_trains_like_torch(
        model,
        normal((6, *shape)),
        classified(CLASSES, 6),
        optimizer=optimizer,
        batch_sizes=sizes,
        steps=4,  # batch norm over two examples multiplies the last bits with each step
        weight_tolerance=1e-4,
    )


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    optimizer=st.sampled_from(OPTIMIZERS),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_random_perceptrons_train_like_torch(
    widths: list[int], activation: type[nn.Module], optimizer: SGD | Adam, sizes: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in zip([5, *widths], widths, strict=False):
        layers += [nn.Linear(before, after), activation()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
    assert_trains_like_torch(model, normal((9, 5)), classified(CLASSES, 9), optimizer=optimizer, batch_sizes=sizes)


def test_only_the_head_is_trained() -> None:
    """The frozen body has no gradient, its weights are constants, and the head follows torch."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    model = nn.Sequential(body, nn.ReLU(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        body[1].running_mean.normal_()
        body[1].running_var.uniform_(0.5, 2)
    for module in body.modules():  # torch: a frozen batch norm is one in evaluation mode
        module.train(False)
        module.train = lambda mode=True: None  # type: ignore[method-assign, misc]
    compiled = assert_trains_like_torch(model, normal((6, 1, 6, 6)), classified(CLASSES, 6), trainable=["2.*"])
    train = compiled.artifact.program("train")
    assert [op.name for op in train.ops] == [
        "CONV2D",  # batch norm folded, ReLU fused, and the flatten's transpose moved into the linear weights
        "LINEAR",
        "LINEAR",
        "CROSS_ENTROPY",
        "SUM_ROWS",
        "LINEAR_UPDATE",
        "SGD",
    ]
    assert [variable.name for variable in compiled.artifact.variables] == ["2.weight", "2.bias"]


def test_bias_alone_can_be_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES))
    assert_trains_like_torch(model, normal((6, 5)), classified(CLASSES, 6), trainable=["*.bias"])


class TiedEmbedding(nn.Module):
    """The table of the tokens is also the weight of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, 6)
        self.output = nn.Linear(6, CLASSES, bias=False)
        self.output.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.table(ids).mean(dim=1))


class TwiceConvolved(nn.Module):
    """One convolution at two places, and a positional encoding made in forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = torch.sin(torch.arange(x.shape[-1]).float())
        return self.head(self.conv(torch.relu(self.conv(x + position))).mean(dim=(2, 3)))


def test_shared_weights_gather_all_their_gradients() -> None:
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, CLASSES, (6, 5)).astype(np.int32)
    tied = assert_trains_like_torch(TiedEmbedding(), ids, classified(CLASSES, 6), optimizer=SGD(momentum=0.9))
    assert [variable.name for variable in tied.artifact.variables] == ["table.weight"]
    assert_trains_like_torch(TwiceConvolved(), normal((6, 2, 5, 4)), classified(CLASSES, 6))


def test_one_number_for_each_example() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    assert_trains_like_torch(model, normal((6, 5)), normal((6,), seed=1), loss="mse")


def test_dropout_keeps_the_expected_share() -> None:
    """Masks cannot equal torch's; their share, their scale and their change from step to step can be checked."""
    from evensong.mobile_runtime import load
    from evensong.mobile_runtime.compiler import compile

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1000))
            self.drop = nn.Dropout(0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x * self.gain)

    compiled = compile(Dropped(), np.ones((1, 1000), np.float32), loss="mse", batch_size=1)
    session = load(compiled, seed=7)
    x = np.ones((1, 1000), np.float32)
    np.testing.assert_array_equal(session.predict(x), x)
    # mse against zero: the gradient of gain is 2 y / 1000 / 0.7, with y = 1 / 0.7 where kept and 0 where dropped
    masks = []
    for _ in range(2):
        session.reset_optimizer() if not masks else None
        before = session.get(["gain"])["gain"]
        session.train_step(x, np.zeros_like(x), learning_rate=1.0)
        masks.append(session.get(["gain"])["gain"] != before)
    assert abs(masks[0].mean() - 0.7) < 0.06
    assert (masks[0] != masks[1]).mean() > 0.2
    changed = session.get(["gain"])["gain"][masks[0] & ~masks[1]]
    np.testing.assert_allclose(changed, 1 - 2 / 1000 / 0.7**2, rtol=1e-5)
