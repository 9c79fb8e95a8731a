"""Float32 matrix products of the engine as a share of what the core can multiply and add at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, in_turns, wanted
from evensong.mobile_runtime.native import NativeMachine, instruction_set
from evensong.wire.artifact import encode_artifact
from evensong.wire.program import Artifact, DType, Op, Port, Program, Region, Tensor
from evensong.wire.workspace import workspace_bytes

#: Rows x depth x columns of C = A B, as convolutions and layers of small models have them.
SHAPES = ((20, 784, 200), (64, 800, 5760), (64, 64, 4096), (256, 256, 256), (784, 288, 64), (512, 512, 512))

_PEAK_FLAGS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2", "-mfma"], "sse2": []}
_PEAK_SOURCE = """
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHAINS 12 /* independent sums: more than the units times their latency */
typedef float Floats __attribute__((vector_size(LANES * 4)));

/* Multiplies and adds on registers alone; the result is only there to be used. */
float multiply_add(long rounds, float factor) {
    const Floats a = factor - (Floats){};
    Floats sums[CHAINS];
    for (int j = 0; j < CHAINS; ++j) sums[j] = a * (float)j;
    for (long i = 0; i < rounds; ++i) {
        _Pragma("GCC unroll 12") for (int j = 0; j < CHAINS; ++j) sums[j] = sums[j] * a + a;
    }
    Floats sum = {};
    _Pragma("GCC unroll 12") for (int j = 0; j < CHAINS; ++j) sum += sums[j];
    return sum[0];
}

long operations(long rounds) { return rounds * 2 * CHAINS * LANES; }
"""


def products(only: str) -> Iterator[Row]:
    """``gemm_f32/ROWSxDEPTHxCOLUMNS`` and ``gemm_f32/transposed_1x784x200`` in GFLOP/s; the peer is the core's peak.

    Skipped where no C compiler can build the loop that measures the peak.
    """
    cases = {"x".join(map(str, shape)): (_product, shape) for shape in SHAPES}
    cases["transposed_1x784x200"] = (_transposed_product, (1, 784, 200))
    chosen = {name: case for name, case in cases.items() if wanted(f"gemm_f32/{name}", only)}
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        peak = _peak(Path(folder))
        if peak is None:
            return
        loop, operations = peak
        for name, (make, (rows, depth, columns)) in chosen.items():
            ours, peer = in_turns(make(rows, depth, columns), loop, seconds=2)
            flops = 2.0 * rows * depth * columns
            yield Row(f"gemm_f32/{name}", flops / ours / 1e9, operations / peer / 1e9, "GFLOP/s", "higher")


def _product(rows: int, depth: int, columns: int) -> Callable[[], None]:
    """One call of LINEAR_GRAD_INPUT, the plain product: dx[rows, columns] = dy[rows, depth] w[depth, columns]."""
    return _one_call("LINEAR_GRAD_INPUT", (rows, depth), (depth, columns), (rows, columns))


def _transposed_product(rows: int, depth: int, columns: int) -> Callable[[], None]:
    """One call of LINEAR: y[rows, columns] = x[rows, depth] w[columns, depth]^T."""
    return _one_call("LINEAR", (rows, depth), (columns, depth), (rows, columns), 0)


def _one_call(
    op: str, left: tuple[int, int], right: tuple[int, int], out: tuple[int, int], *attrs: int
) -> Callable[[], None]:
    tensors = (
        Tensor(DType.F32, Region.INPUT, left, 0),
        Tensor(DType.F32, Region.INPUT, right, 1),
        Tensor(DType.F32, Region.OUTPUT, out, 0),
    )
    ops = (Op(op, (0, 1), (2,), attrs),)
    ports = (Port("left", 0), Port("right", 1)), (Port("out", 2),)
    program = Program("one", 1, 0, workspace_bytes(ops, tensors), *ports, tensors, ops)
    artifact = Artifact({}, (), (program,), b"", b"", 0)
    machine = NativeMachine(artifact, encode_artifact(artifact))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(dims).astype(np.float32) for dims in (left, right)]
    outputs = [np.empty(out, np.float32)]
    machine.run(0, 1, inputs, outputs)
    np.testing.assert_allclose(
        outputs[0], inputs[0] @ (inputs[1].T if op == "LINEAR" else inputs[1]), rtol=1e-3, atol=1e-3
    )
    return lambda: machine.run(0, 1, inputs, outputs)


def _peak(folder: Path) -> tuple[Callable[[], object], int] | None:
    """A call that does nothing but multiply and add, and its number of operations; None without a compiler."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        return None
    source, library = folder / "peak.c", folder / "peak.so"
    source.write_text(_PEAK_SOURCE)
    flags = ["-O2", "-ffp-contract=fast", "-shared", "-fPIC", *_PEAK_FLAGS.get(instruction_set(), [])]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.multiply_add.restype = ctypes.c_float
    loaded.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float]
    rounds = 100_000
    return lambda: loaded.multiply_add(rounds, 0.25), int(loaded.operations(ctypes.c_long(rounds)))
