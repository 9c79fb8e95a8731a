"""The runtime against PyTorch eager (training) and ONNX Runtime (inference), one thread each, and its size on a device.

Losses are compared on the way: a fast step that computes something else counts for nothing.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from benchmarks.harness import Row, in_turns, wanted
from evensong.mobile_runtime import Session, compile, load
from evensong.mobile_runtime.compiler import PostTrainingInt8, zoo
from evensong.mobile_runtime.native import library_path

BATCH = 20
LEARNING_RATE = 0.05
STEPS_COMPARED = 8
TOLERANCE = 1e-5  #: relative, between our losses and torch's

TRAINED = ("mlp", "small_cnn", "fedavg_cnn")
PREDICTED = ("mlp", "small_cnn", "har_cnn")


class PooledHarCnn(zoo.HarCnn):
    """The same network with its reductions written as pools, which the peer can quantise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        pooled = torch.cat([nn.functional.avg_pool1d(features, 12), nn.functional.max_pool1d(features, 12)], dim=1)
        return self.head(pooled.flatten(1))  # type: ignore[no-any-return]


#: Model, shape of one example, classes.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (zoo.mlp, (784,), 10),
    "small_cnn": (zoo.small_cnn, (1, 28, 28), 10),
    "fedavg_cnn": (zoo.fedavg_cnn, (1, 28, 28), 10),
    "har_cnn": (PooledHarCnn, (9, 128), 6),
}

Floats = npt.NDArray[np.float32]


def run(only: str) -> Iterator[Row]:
    """Yields the rows that ``only`` asks for; see ``benchmarks/README.md`` for what each means."""
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports what other packages are not installed
    for name in TRAINED:
        if wanted(f"train_step/{name}", only):
            yield train_step(name)
    for name in PREDICTED:
        if wanted(f"inference_f32/{name}", only):
            yield inference(name, int8=False)
    for name in PREDICTED:
        if wanted(f"inference_int8/{name}", only):
            yield inference(name, int8=True)
    if wanted("engine_library_kb", only):
        yield Row("engine_library_kb", library_path().stat().st_size / 1024, None, "KB", "lower")
    if wanted("import_client_seconds", only) or wanted("import_client_rss_mb", only):
        yield from import_client()


# ------------------------------------------------------------------------------------------------------------- training


def train_step(name: str) -> Row:
    """One SGD step on 20 examples against PyTorch eager, in microseconds."""
    model, x, y = _model_and_batch(name)
    session = load(compile(model, x, batch_size=BATCH), engine="native")
    images, labels = x.numpy(), y.numpy().astype(np.int32)
    eager = _eager_step(model, x, y)
    for step in range(STEPS_COMPARED):
        expected, actual = eager(), session.train_step(images, labels, learning_rate=LEARNING_RATE).loss
        if abs(actual - expected) > TOLERANCE * abs(expected):
            raise AssertionError(f"{name}: our loss in step {step} is {actual}, torch's is {expected}")
    ours, peer = in_turns(
        lambda: session.train_step(images, labels, learning_rate=0.001),
        eager,
        seconds=12 if name == "fedavg_cnn" else 6,
    )
    return Row(f"train_step/{name}", ours * 1e6, peer * 1e6, "us", "lower")


def _eager_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


# ------------------------------------------------------------------------------------------------------------ inference


def inference(name: str, *, int8: bool) -> Row:
    """One prediction for one example against ONNX Runtime, in microseconds."""
    model, x, _ = _model_and_batch(name)
    model.eval()
    calibration = torch.randn(128, *x.shape[1:])
    one = x[:1].numpy().copy()
    if int8:
        session = load(compile(model, x, trainable="none", quantize=PostTrainingInt8(calibration)), engine="native")
    else:
        session = load(compile(model, x, trainable="none"), engine="native")
    with tempfile.TemporaryDirectory() as folder:
        peer_session = _onnx_session(model, calibration, Path(folder), int8=int8)
    feed_name = peer_session.get_inputs()[0].name
    if not int8:
        _check_close(name, session, one, peer_session.run(None, {feed_name: one})[0])
    ours, peer = in_turns(lambda: session.predict(one), lambda: peer_session.run(None, {feed_name: one}), seconds=4)
    return Row(f"inference_{'int8' if int8 else 'f32'}/{name}", ours * 1e6, peer * 1e6, "us", "lower")


def _check_close(name: str, session: Session, one: Floats, expected: Floats) -> None:
    error = float(np.abs(np.subtract(session.predict(one), expected, dtype=np.float64)).max())
    if error > 1e-4:
        raise AssertionError(f"{name}: our prediction differs from ONNX Runtime's by {error}")


def _onnx_session(model: nn.Module, calibration: torch.Tensor, folder: Path, *, int8: bool) -> Any:
    path = folder / "model.onnx"
    torch.onnx.export(model, (calibration[:1],), str(path), dynamo=True, verbose=False)
    if int8:
        prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
        quant_pre_process(str(path), str(prepared))
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(prepared, calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        path = quantized
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibration examples to ONNX Runtime's quantiser, one at a time."""

    def __init__(self, model: Path, calibration: torch.Tensor) -> None:
        name = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_inputs()[0].name
        self._feeds = iter([{name: example[None].numpy()} for example in calibration])

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._feeds, None)


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
