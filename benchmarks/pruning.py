"""What pruning gains on a device: models without half of their channels, and whether a sparse kernel would pay."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Row, in_turns, wanted
from evensong.mobile_runtime import Session, compile, load
from evensong.mobile_runtime.compiler import CompiledArtifact, PostTrainingInt8, prune_channels, zoo

AMOUNT = 0.5
BATCH = 20

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (zoo.mlp, (784,), 10),
    "small_cnn": (zoo.small_cnn, (1, 28, 28), 10),
    "fedavg_cnn": (zoo.fedavg_cnn, (1, 28, 28), 10),
    "har_cnn": (zoo.har_cnn, (9, 128), 6),
    "ds_cnn": (zoo.ds_cnn, (1, 49, 10), 12),
    "mobilenet_v2_035": (zoo.mobilenet_v2_035, (3, 96, 96), 10),
}
SPARSITIES = (50, 80, 90, 95)
SPARSE_SHAPE = (200, 784)  #: outputs, inputs: the MLP's first layer


def run(only: str) -> Iterator[Row]:
    """Yields the rows that ``only`` asks for; ``peer`` is the whole model, or the engine's dense kernel."""
    torch.manual_seed(0)
    for name in MODELS:
        names = [f"channels_50/{what}/{name}" for what in ("step", "arena", "artifact")]
        if any(wanted(row, only) for row in names):
            yield from (row for row in channels(name) if wanted(row.name, only))
    for kernel in ("float32", "int8"):
        for percent in SPARSITIES:
            if wanted(f"sparse_linear_{percent}/dense_{kernel}", only):
                yield sparse(percent, kernel)


def channels(name: str) -> Iterator[Row]:
    """A training step, its arena and the artifact, with half of the channels and with all."""
    make, shape, classes = MODELS[name]
    x, y = torch.randn(BATCH, *shape), np.arange(BATCH, dtype=np.int32) % classes
    model = make()
    pruned = prune_channels(model, x, AMOUNT, multiple_of=8).model
    small, whole = (compile(m, x, batch_size=BATCH) for m in (pruned, model))
    steps = [_step(artifact, x.numpy(), y) for artifact in (small, whole)]
    ours, peer = in_turns(*steps, seconds=4)
    yield Row(f"channels_50/step/{name}", ours * 1e6, peer * 1e6, "us", "lower")
    arenas = [artifact.artifact.program("train").arena_bytes / 1024 for artifact in (small, whole)]
    yield Row(f"channels_50/arena/{name}", arenas[0], arenas[1], "KB", "lower")
    sizes = [len(artifact.to_bytes()) / 1024 for artifact in (small, whole)]
    yield Row(f"channels_50/artifact/{name}", sizes[0], sizes[1], "KB", "lower")


def _step(artifact: CompiledArtifact, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    session: Session = load(artifact, engine="native")
    return lambda: session.train_step(x, y, learning_rate=0.001)


def sparse(percent: int, kernel: str) -> Row:
    """A vector times a weight of which ``percent`` % is zero, sparse in AVX2, against the engine's dense kernel."""
    outputs, inputs = SPARSE_SHAPE
    rng = np.random.default_rng(percent)
    weight = rng.normal(size=SPARSE_SHAPE).astype(np.float32)
    weight[rng.random(SPARSE_SHAPE) < percent / 100] = 0
    x = rng.normal(size=(1, inputs)).astype(np.float32)
    multiply, result = _sparse_product(weight, x)
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    quantize = PostTrainingInt8(rng.normal(size=(64, inputs)).astype(np.float32)) if kernel == "int8" else None
    session = load(compile(layer, torch.zeros(1, inputs), trainable="none", quantize=quantize), engine="native")
    empty = load(compile(nn.Linear(8, 8), torch.zeros(1, 8), trainable="none"), engine="native")
    multiply()
    if np.abs(result - x @ weight.T).max() > 1e-3:
        raise AssertionError("the sparse kernel is wrong")
    small = np.zeros((1, 8), np.float32)
    ours, peer = in_turns(multiply, lambda: session.predict(x), seconds=2)
    overhead, _ = in_turns(lambda: empty.predict(small), lambda: None, seconds=1)
    return Row(f"sparse_linear_{percent}/dense_{kernel}", ours * 1e6, (peer - overhead) * 1e6, "us", "lower")


def _sparse_product(weight: np.ndarray, x: np.ndarray) -> tuple[Callable[[], object], np.ndarray]:
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("the sparse kernel needs g++ on x86-64")
    source = Path(__file__).with_name("sparse_linear.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.so"
        command = [compiler, "-O3", "-mavx2", "-mfma", "-shared", "-fPIC", str(source), "-o", str(path)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path))
    values, columns, rows = [], [], [0]
    for row in weight:
        (kept,) = np.nonzero(row)
        padding = -len(kept) % 8
        values.append(np.pad(row[kept], (0, padding)))
        columns.append(np.pad(kept, (0, padding)))
        rows.append(rows[-1] + len(kept) + padding)
    y = np.zeros((1, len(weight)), np.float32)
    arrays = [
        x,
        np.concatenate(values).astype(np.float32),
        np.concatenate(columns).astype(np.uint16),
        np.array(rows, np.uint32),
    ]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    call = library.sparse_linear
    arguments = (*pointers, ctypes.c_uint32(len(weight)), ctypes.c_void_p(y.ctypes.data))

    def multiply(_keep: object = (arrays, library)) -> None:
        call(*arguments)

    return multiply, y
