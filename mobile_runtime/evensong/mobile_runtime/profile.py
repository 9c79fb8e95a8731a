"""How long each operation of a program takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evensong.mobile_runtime.native import NativeMachine
from evensong.mobile_runtime.session import Array
from evensong.wire.artifact import encode_artifact
from evensong.wire.program import Artifact, DType, Op, Port, Program, Tensor

_BLOCKS = 20


@dataclass(frozen=True)
class OperationTime:
    """One operation of a program; ``place`` is its module in the author's model."""

    op: str
    place: str
    seconds: float


def profile(
    artifact: Artifact,
    program: str = "predict",
    *,
    batch: int | None = None,
    seconds_each: float = 0.05,
    instruction_set: str | None = None,
) -> tuple[OperationTime, ...]:
    """Times each operation of one program on the compiled engine, alone and over its own memory.

    The best of some blocks of repetitions counts, less what an empty run costs. Operands hold whatever the memory
    holds at first (zeros), so that an operation whose time depends on values is told roughly only. ``batch`` is the
    number of examples (``max_batch`` by default), ``seconds_each`` how long each operation is measured.

    Raises :class:`OSError` or :class:`RuntimeFault` where there is no compiled engine, ``KeyError`` for an unknown
    program.
    """
    whole = artifact.program(program)
    names = artifact.manifest.get("places")
    places = names.get(program, []) if isinstance(names, dict) else []
    empty = _seconds(artifact, whole, (), batch, seconds_each, instruction_set)
    return tuple(
        OperationTime(
            op.name,
            str(places[index]) if index < len(places) else "",
            max(_seconds(artifact, whole, (op,), batch, seconds_each, instruction_set) - empty, 0.0),
        )
        for index, op in enumerate(whole.ops)
    )


def _seconds(
    artifact: Artifact,
    whole: Program,
    ops: tuple[Op, ...],
    batch: int | None,
    seconds: float,
    instruction_set: str | None,
) -> float:
    """Seconds of one run of a program that has ``ops`` alone."""
    alone = replace(artifact, programs=(replace(whole, ops=ops),))
    machine = NativeMachine(alone, encode_artifact(alone), instruction_set=instruction_set)
    try:
        count = batch or whole.max_batch
        inputs, outputs = _buffers(whole, whole.inputs, count), _buffers(whole, whole.outputs, count)
        run = machine.prepare(0, count, inputs, outputs)
        start = time.perf_counter()
        run(inputs, step=1)
        repetitions = max(1, int(seconds / _BLOCKS / max(time.perf_counter() - start, 1e-7)))
        best = float("inf")
        for _ in range(_BLOCKS):
            start = time.perf_counter()
            for _ in range(repetitions):
                run(inputs, step=1)
            best = min(best, (time.perf_counter() - start) / repetitions)
        return best
    finally:
        machine.close()


def _buffers(program: Program, ports: Sequence[Port], batch: int) -> list[Array]:
    return [_zeros(program.tensors[port.tensor], program.max_batch, batch) for port in ports]


def _zeros(tensor: Tensor, max_batch: int, batch: int) -> Array:
    dims = (tensor.dims[0] // max_batch * batch, *tensor.dims[1:]) if tensor.batched else tensor.dims
    return np.zeros(dims, DType(tensor.dtype).numpy)
