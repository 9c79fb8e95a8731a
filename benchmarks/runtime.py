"""The runtime against PyTorch eager and ExecuTorch (training), ONNX Runtime and ExecuTorch (inference), one thread
each, and its size on a device.

Losses and predictions are compared on the way: a fast step that computes something else counts for nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from benchmarks import runtime_peers as peers
from benchmarks.harness import Row, in_turns, wanted
from benchmarks.int8_training import int8_training
from benchmarks.products import products
from benchmarks.runtime_peers import Floats
from benchmarks.runtime_targets import targets
from evensong.mobile_runtime import Session, compile, load
from evensong.mobile_runtime.compiler import PostTrainingInt8, zoo

BATCH = 20
LEARNING_RATE = 0.05
TOLERANCE = 1e-5  #: relative, between our losses and torch's
STEPS_COMPARED = 8
#: Batch norm over 20 pictures of 3x3 amplifies rounding: after one update torch in float32 is as far from torch in
#: float64 as we are, after three both are off by a hundredth.
STEPS_COMPARED_BY_MODEL = {"mobilenet_v2_035": 1}

#: Model, shape of one example, classes.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (zoo.mlp, (784,), 10),
    "small_cnn": (zoo.small_cnn, (1, 28, 28), 10),
    "fedavg_cnn": (zoo.fedavg_cnn, (1, 28, 28), 10),
    "har_cnn": (zoo.har_cnn, (9, 128), 6),
    "ds_cnn": (zoo.ds_cnn, (1, 49, 10), 12),
    "mobilenet_v2_035": (zoo.mobilenet_v2_035, (3, 96, 96), 10),
}
QUANTIZED = ("mlp", "small_cnn", "har_cnn")


class PooledHarCnn(zoo.HarCnn):
    """The same network with its reductions written as pools, which ONNX Runtime can quantise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        pooled = torch.cat([nn.functional.avg_pool1d(features, 12), nn.functional.max_pool1d(features, 12)], dim=1)
        return self.head(pooled.flatten(1))  # type: ignore[no-any-return]


def run(only: str) -> Iterator[Row]:
    """Yields the rows that ``only`` asks for; see ``benchmarks/README.md`` for what each means."""
    peers.quiet()
    for name in MODELS:
        if wanted(f"train_step/{name}", only):
            yield train_step(name)
    for name in MODELS:
        if wanted(f"train_step_executorch/{name}", only):
            yield train_step_executorch(name)
    for name in MODELS:
        if wanted(f"inference_f32/{name}", only):
            yield inference_f32(name)
    for name in QUANTIZED:
        if wanted(f"inference_int8/{name}", only):
            yield inference_int8(name)
    yield from products(only)
    yield from int8_training(MODELS, BATCH, only)
    yield from targets(MODELS, only)
    if wanted("import_client_seconds", only) or wanted("import_client_rss_mb", only):
        yield from import_client()


# ------------------------------------------------------------------------------------------------------------- training


def train_step(name: str) -> Row:
    """One SGD step on 20 examples against PyTorch eager, in microseconds."""
    model, x, y = _model_and_batch(name)
    session = load(compile(model, x, batch_size=BATCH), engine="native")
    images, labels = x.numpy(), y.numpy().astype(np.int32)
    eager = peers.eager_step(model, x, y, LEARNING_RATE)
    for step in range(STEPS_COMPARED_BY_MODEL.get(name, STEPS_COMPARED)):
        expected, actual = eager(), session.train_step(images, labels, learning_rate=LEARNING_RATE).loss
        _check_loss(name, step, actual, expected)
    ours, peer = in_turns(
        lambda: session.train_step(images, labels, learning_rate=0.001),
        eager,
        seconds=12 if name in ("fedavg_cnn", "mobilenet_v2_035") else 6,
    )
    return Row(f"train_step/{name}", ours * 1e6, peer * 1e6, "us", "lower")


def train_step_executorch(name: str) -> Row:
    """The same step against ExecuTorch's training API, in microseconds.

    Only the first losses are compared: in ExecuTorch 1.5.1 the gradient of max pooling adds to memory that it never
    cleared, and models with batch norm run with fixed statistics there, see :func:`.runtime_peers.executorch_step`.
    """
    model, x, y = _model_and_batch(name)
    session = load(compile(model, x, batch_size=BATCH), engine="native")
    images, labels = x.numpy(), y.numpy().astype(np.int32)
    executorch = peers.executorch_step(model, x, y, 0.001)
    evaluated = session.evaluate(images, labels).loss  # with fixed statistics too
    _check_loss(name, 0, evaluated, executorch())
    ours, peer = in_turns(lambda: session.train_step(images, labels, learning_rate=0.001), executorch, seconds=4)
    return Row(f"train_step_executorch/{name}", ours * 1e6, peer * 1e6, "us", "lower")


def _check_loss(name: str, step: int, actual: float, expected: float) -> None:
    if abs(actual - expected) > TOLERANCE * abs(expected):
        raise AssertionError(f"{name}: our loss in step {step} is {actual}, the peer's is {expected}")


# ------------------------------------------------------------------------------------------------------------ inference


def inference_f32(name: str) -> Row:
    """One prediction for one example against the faster of ONNX Runtime and ExecuTorch/XNNPACK, in microseconds."""
    model, x, _ = _model_and_batch(name)
    model.eval()
    session = load(compile(model, x, trainable="none"), engine="native")
    one = x[:1].clone()
    array = one.numpy()
    rows = []
    for prediction in (peers.onnx_prediction(model, one), peers.executorch_prediction(model, one)):
        _check_close(name, session, array, prediction())
        ours, peer = in_turns(lambda: session.predict(array), prediction, seconds=4)
        rows.append(Row(f"inference_f32/{name}", ours * 1e6, peer * 1e6, "us", "lower"))
    return min(rows, key=lambda row: row.ratio or 0.0)


def inference_int8(name: str) -> Row:
    """One int8 prediction for one example against ONNX Runtime's static quantisation, in microseconds."""
    model, x, _ = _model_and_batch(name)
    if name == "har_cnn":
        model = PooledHarCnn()
    model.eval()
    one, calibration = x[:1].clone(), torch.randn(128, *x.shape[1:])
    array = one.numpy()
    session = load(compile(model, x, trainable="none", quantize=PostTrainingInt8(calibration)), engine="native")
    prediction = peers.onnx_prediction(model, one, calibration)
    ours, peer = in_turns(lambda: session.predict(array), prediction, seconds=4)
    return Row(f"inference_int8/{name}", ours * 1e6, peer * 1e6, "us", "lower")


def _check_close(name: str, session: Session, one: Floats, expected: Floats) -> None:
    error = float(np.abs(np.subtract(session.predict(one), expected, dtype=np.float64)).max())
    if error > 1e-4:
        raise AssertionError(f"{name}: our prediction differs from the peer's by {error}")


def _model_and_batch(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, shape, classes = MODELS[name]
    return make(), torch.randn(BATCH, *shape), torch.randint(0, classes, (BATCH,))


# --------------------------------------------------------------------------------------------------------------- import


_IMPORT = """
import json, sys, time
start = time.perf_counter()
import evensong.client
from evensong.mobile_runtime import native
native.instruction_set()
seconds = time.perf_counter() - start
heavy = sorted({"torch", "flwr", "sqlalchemy"} & set(sys.modules))
with open("/proc/self/status") as status:
    kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
print(json.dumps([seconds, kilobytes / 1024, heavy]))
"""


def import_client() -> Iterator[Row]:
    """Seconds and resident megabytes of a new process that imports the device SDK and the engine; the best of five."""
    results = []
    for _ in range(5):
        answer = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        seconds, megabytes, heavy = json.loads(answer.stdout)
        if heavy:
            raise AssertionError(f"a device import pulls in {heavy}")
        results.append((seconds, megabytes))
    yield Row("import_client_seconds", min(seconds for seconds, _ in results), None, "s", "lower")
    yield Row("import_client_rss_mb", min(megabytes for _, megabytes in results), None, "MB", "lower")
