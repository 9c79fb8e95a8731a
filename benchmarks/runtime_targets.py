"""How large the engine is, how soon it gives a first prediction, and WebAssembly against native code."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Row, wanted
from evensong.mobile_runtime import compile, load
from evensong.mobile_runtime.native import library_path

REPOSITORY = Path(__file__).parents[1]
ENGINE = REPOSITORY / "mobile_runtime" / "engine"
BATCH = 20
WASM_MODELS = ("mlp", "small_cnn", "fedavg_cnn")
FIRST = "ds_cnn"  #: its artifact has about 100 KB
RELAXED = "--experimental-wasm-relaxed-simd"  #: for Node 20

#: Model, shape of one example, classes.
Models = Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]


def targets(models: Models, only: str) -> Iterator[Row]:
    """The rows of this module."""
    if wanted("engine_library_kb", only):
        yield Row("engine_library_kb", library_path().stat().st_size / 1024, None, "KB", "lower")
    with tempfile.TemporaryDirectory() as folder:
        yield from _first_prediction(models, only, Path(folder))
        names = ["engine_wasm_kb", "engine_wasm_kb_gzip", "first_prediction_wasm_ms"]
        names += [f"wasm_{kind}/{name}" for kind in ("step", "relaxed_step") for name in WASM_MODELS]
        if any(wanted(name, only) for name in names):
            yield from _wasm(models, only, Path(folder))


def _first_prediction(models: Models, only: str, folder: Path) -> Iterator[Row]:
    """Milliseconds from ``main`` and from before the process exists, in C; of ``load`` and ``predict`` in Python."""
    artifact, x = _artifact(models, FIRST, folder)
    if wanted("first_prediction_ms", only) or wanted("first_prediction_with_process_ms", only):
        library, program = library_path(), folder / "first_prediction"
        source = Path(__file__).with_name("first_prediction.c")
        linked = [str(library), f"-Wl,-rpath,{library.parent}"]
        subprocess.run(["cc", "-O2", f"-I{ENGINE / 'include'}", str(source), *linked, "-o", str(program)], check=True)
        answer = subprocess.run([program, artifact, "50"], capture_output=True, text=True, check=True)
        inside, outside = map(float, answer.stdout.split())
        yield Row("first_prediction_ms", inside, None, "ms", "lower")
        yield Row("first_prediction_with_process_ms", outside, None, "ms", "lower")
    if wanted("first_prediction_python_ms", only):
        data, least = artifact.read_bytes(), float("inf")
        for _ in range(50):
            start = time.perf_counter()
            load(data, engine="native").predict(x[:1])
            least = min(least, time.perf_counter() - start)
        yield Row("first_prediction_python_ms", least * 1e3, None, "ms", "lower")


def _wasm(models: Models, only: str, folder: Path) -> Iterator[Row]:
    if shutil.which("node") is None:
        raise FileNotFoundError("node was not found; Debian: apt install nodejs")
    simd128, relaxed = _build_script().build_modules(folder)
    if wanted("engine_wasm_kb", only):
        yield Row("engine_wasm_kb", simd128.stat().st_size / 1024, None, "KB", "lower")
    if wanted("engine_wasm_kb_gzip", only):
        yield Row("engine_wasm_kb_gzip", len(gzip.compress(simd128.read_bytes(), 9)) / 1024, None, "KB", "lower")
    if wanted("first_prediction_wasm_ms", only):
        artifact, x = _artifact(models, FIRST, folder)
        job = {"name": FIRST, "artifact": str(artifact), "inputs": x[0].size}
        yield Row("first_prediction_wasm_ms", _node(simd128, [job], folder)[FIRST], None, "ms", "lower")
    for kind, module, flags in (("step", simd128, []), ("relaxed_step", relaxed, [RELAXED])):
        for name in WASM_MODELS:
            if wanted(f"wasm_{kind}/{name}", only):
                yield _wasm_step(f"wasm_{kind}/{name}", models, name, module, flags, folder)


def _wasm_step(row: str, models: Models, name: str, module: Path, flags: list[str], folder: Path) -> Row:
    """A training step in Node against the same step of the compiled engine, in turns; the best of each counts."""
    artifact, x = _artifact(models, name, folder)
    classes = models[name][2]
    job = {"name": name, "artifact": str(artifact), "inputs": x[0].size, "classes": classes, "batch": BATCH}
    session, labels = load(artifact, engine="native"), (np.arange(BATCH) % classes).astype(np.int32)
    ours = peer = float("inf")
    for _ in range(3):
        ours = min(ours, _node(module, [{**job, "seconds": 2}], folder, flags)[name] * 1e3)
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.train_step(x, labels, learning_rate=0.001)
            peer = min(peer, (time.perf_counter() - start) * 1e6)
    return Row(row, ours, peer, "us", "lower")


def _node(module: Path, jobs: list[dict[str, Any]], folder: Path, flags: list[str] | None = None) -> dict[str, float]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("wasm_steps.mjs")
    command = ["node", *(flags or []), str(script), str(module), str(folder / "jobs.json")]
    answer: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer


def _artifact(models: Models, name: str, folder: Path) -> tuple[Path, np.ndarray[Any, np.dtype[np.float32]]]:
    """The compiled model, and a batch of examples."""
    torch.manual_seed(0)
    make, shape, _ = models[name]
    x = torch.randn(BATCH, *shape)
    path = folder / f"{name}.evsg"
    if not path.exists():
        compile(make(), x, batch_size=BATCH).save(path)
    return path, x.numpy()


def _build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_build", ENGINE / "build.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["engine_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
