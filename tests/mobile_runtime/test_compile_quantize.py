"""Post-training int8: near float32 on real digits, integer where it should be, and a float32 head trains on top."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import ENGINES

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import PostTrainingInt8, compile, zoo
from evensong.mobile_runtime.compiler.calibrate import quantization
from evensong.mobile_runtime.session import Session

pytestmark = pytest.mark.torch

datasets = pytest.importorskip("sklearn.datasets")

Split = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    """1,297 handwritten digits to train on and 500 to test, as images in 0 to 1."""
    data = datasets.load_digits()
    x = (data.images[:, None] / 16).astype(np.float32)
    y = data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order[500:]], y[order[500:]]), (x[order[:500]], y[order[:500]])


@pytest.fixture(scope="module")
def trained(digits: tuple[Split, Split]) -> nn.Module:
    """A digits model trained on the engine."""
    (x, y), _ = digits
    model = zoo.digits_cnn()
    session = load(compile(model, x[:1], batch_size=32))
    _train(session, x, y, epochs=6)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in session.get().items()})
    return model


@pytest.mark.parametrize("activations", ["minmax", "percentile", "mse"])
def test_int8_loses_at_most_one_point_on_digits(
    activations: str, trained: nn.Module, digits: tuple[Split, Split]
) -> None:
    (x, _), (test_x, test_y) = digits
    settings = PostTrainingInt8(x[:256], activations=activations)  # type: ignore[arg-type]
    compiled = compile(trained, x[:1], trainable="none", quantize=settings)
    with torch.no_grad():
        expected = trained.eval()(torch.from_numpy(test_x)).numpy()
    accuracy = float((expected.argmax(1) == test_y).mean())
    session = load(compiled)
    for engine in ENGINES:  # integers: the same bits everywhere
        np.testing.assert_array_equal(load(compiled, engine=engine).predict(test_x[:50]), session.predict(test_x[:50]))
    assert accuracy > 0.93
    assert session.evaluate(test_x, test_y).accuracy >= accuracy - 0.01
    error = np.abs(session.predict(test_x) - expected).mean()
    assert error < 0.02 * np.abs(expected).max()
    names = {op.name for op in compiled.artifact.program("predict").ops}
    assert names == {"QUANTIZE", "QCONV2D", "QMAX_POOL2D", "QLINEAR", "DEQUANTIZE"}
    assert len(compiled.artifact.const) < 0.35 * 4 * sum(p.numel() for p in trained.parameters())
    assert compiled.artifact.manifest["quantized"] is True


def test_a_float_head_trains_on_the_int8_body(trained: nn.Module, digits: tuple[Split, Split]) -> None:
    (x, y), (test_x, test_y) = digits
    compiled = compile(trained, x[:1], trainable=["head.*"], quantize=PostTrainingInt8(x[:256]), batch_size=32)
    names = [op.name for op in compiled.artifact.program("train").ops]
    boundary = names.index("DEQUANTIZE")
    assert names[boundary:] == ["DEQUANTIZE", "LINEAR", "CROSS_ENTROPY", "SUM_ROWS", "LINEAR_UPDATE", "SGD"]
    assert all(name.startswith("Q") for name in names[:boundary])
    session = load(compiled)
    session.set({"head.weight": np.zeros((10, 32), np.float32), "head.bias": np.zeros(10, np.float32)})
    assert session.evaluate(test_x, test_y).accuracy < 0.2
    _train(session, x, y, epochs=3)
    assert session.evaluate(test_x, test_y).accuracy > 0.93
    full = compile(trained, x[:1], batch_size=32).memory()
    assert compiled.memory().training_peak < 0.25 * full.training_peak


class Mixed(nn.Module):
    """Every integer operation, and float32 islands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.depthwise(x))
        x = self.pool(0.5 * x)
        joined = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        rows = torch.sigmoid(joined).view(-1, 2, 8)
        return torch.softmax(self.head(self.norm(rows).flatten(1)), 1)


def test_every_integer_operation_is_near_float() -> None:
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.stem[1].running_mean.normal_()
        model.stem[1].running_var.uniform_(0.5, 2)
    x = np.random.default_rng(0).normal(size=(64, 2, 8, 6)).astype(np.float32)
    compiled = compile(model, x[:1], trainable="none", quantize=PostTrainingInt8(x, activations="minmax"))
    names = {op.name for op in compiled.artifact.program("predict").ops}
    assert {"QCONV2D", "QLUT", "QADD", "QAVG_POOL2D", "QMAX_POOL2D", "CONCAT", "QLINEAR"} <= names
    assert not {"CONV2D", "LINEAR", "BATCH_NORM_EVAL"} & names
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(load(compiled).predict(x), expected, atol=0.03)


def test_a_trainable_body_is_left_in_float() -> None:
    x = np.random.default_rng(0).normal(size=(8, 784)).astype(np.float32)
    compiled = compile(zoo.mlp(), x, quantize=PostTrainingInt8(x))
    assert [op.name for op in compiled.artifact.program("predict").ops] == ["LINEAR", "LINEAR"]


def test_calibration_takes_batches_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) + self.right(b)

    random = np.random.default_rng(0)
    a, b = random.normal(size=(50, 3)).astype(np.float32), random.normal(size=(50, 5)).astype(np.float32)
    model = Two()
    whole = compile(model, [a, b], trainable="none", quantize=PostTrainingInt8([a, b], activations="minmax"))
    batches = [(a[start : start + 10], b[start : start + 10]) for start in range(0, 50, 10)]
    split = compile(model, [a, b], trainable="none", quantize=PostTrainingInt8(batches, activations="minmax"))
    assert whole.hash == split.hash
    with torch.no_grad():
        expected = model(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(load(whole).predict(a, b), expected, atol=0.1)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_grid_holds_zero_and_its_range(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    grid = quantization(low, high)
    assert -128 <= grid.zero_point <= 127
    assert grid.scale * (127 - grid.zero_point) >= high - 1.01 * grid.scale
    assert grid.scale * (-128 - grid.zero_point) <= low + 1.01 * grid.scale


def _train(session: Session, x: np.ndarray, y: np.ndarray, *, epochs: int) -> None:
    for _ in range(epochs):
        for start in range(0, len(x) - 31, 32):
            session.train_step(x[start : start + 32], y[start : start + 32], learning_rate=0.2)
