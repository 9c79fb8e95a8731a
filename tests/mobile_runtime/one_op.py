"""Runs one operation on an engine: a hand-made artifact around it, operands from NumPy arrays, results as NumPy arrays.

    y, = run_one("UNARY", [x], [x.shape], kind=Activation.GELU)

Output buffers stand between guard bytes, so that a kernel that writes beyond its operand is caught here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime import native
from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.verify_rules import OPTIMIZERS
from evensong.wire.artifact import align, encode_artifact
from evensong.wire.errors import EvensongError
from evensong.wire.program import (
    OPS,
    Artifact,
    DType,
    Op,
    Port,
    Program,
    Region,
    Tensor,
    Variable,
    VariableFlag,
)
from evensong.wire.workspace import workspace_bytes

Array = npt.NDArray[np.generic]

_DTYPES = {np.dtype(dtype.numpy): dtype for dtype in DType}
_GUARD = 256  # bytes on either side of an output
_CANARY = 0xA5


@dataclass(frozen=True)
class Given:
    """An input. With ``batched`` set, dimension 0 holds the live rows."""

    value: Array
    batched: bool = False
    scale: float = 0.0
    zero_point: int = 0


@dataclass(frozen=True)
class Wanted:
    """An output's live shape and dtype."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike = np.float32
    batched: bool = False
    scale: float = 0.0
    zero_point: int = 0


#: Makes a machine of an artifact: ``native_machine("avx2")``, ``TwinMachine``.
MachineFactory = Callable[[Artifact], Machine]


def native_machine(instruction_set: str | None = None) -> MachineFactory:
    """The compiled engine with the kernels of one instruction set (None: the best)."""
    return lambda artifact: native.NativeMachine(artifact, encode_artifact(artifact), instruction_set=instruction_set)


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those that this build and this CPU have, worst first."""
    empty = Artifact({}, (), (), b"", b"", 0)

    def works(name: str) -> bool:
        try:
            native_machine(name)(empty).close()
        except EvensongError:
            return False
        return True

    return tuple(name for name in ("generic", "neon", "dotprod", "sse2", "avx2", "avxvnni", "avx512") if works(name))


def run_one(
    op: str,
    inputs: Sequence[Given | Array],
    outputs: Sequence[Wanted | tuple[int, ...]],
    *,
    machine: MachineFactory | None = None,
    max_batch: int = 1,
    batch: int = 1,
    inplace: tuple[int, int] | None = None,
    learning_rate: float = 0.0,
    step: int = 1,
    seed: int = 0,
    **attributes: Any,
) -> list[Array]:
    """Runs ``op`` once and returns its outputs, then the operands that it updated, in the order of its specification.

    A plain array is an unbatched input, a plain shape an unbatched float32 output; attributes left out are 0.
    ``inplace`` is a pair of ``OpSpec.inplace``: that input and that output then share one place in the arena.
    """
    given = [x if isinstance(x, Given) else Given(np.asarray(x)) for x in inputs]
    wanted = [y if isinstance(y, Wanted) else Wanted(y) for y in outputs]
    spec = OPS[op]
    attrs = tuple(_attribute(text, attributes.pop(text.partition(":")[0], 0)) for text in spec.attrs)
    if attributes:
        raise TypeError(f"{op} has no attributes {sorted(attributes)}")
    builder = _Builder(max_batch, batch)
    sources = [builder.add_input(x, op, i) for i, x in enumerate(given)]
    targets = [builder.add_output(y) for y in wanted]
    if inplace is None:
        builder.ops.append(Op(op, tuple(sources), tuple(targets), attrs))
    else:
        shared, result = builder.add_arena(sources[inplace[0]]), targets[inplace[1]]
        builder.ops.append(Op("COPY", (sources[inplace[0]],), (shared,)))
        sources[inplace[0]] = targets[inplace[1]] = shared
        builder.ops.append(Op(op, tuple(sources), tuple(targets), attrs))
        builder.ops.append(Op("COPY", (shared,), (result,)))

    engine = (machine or native_machine())(builder.artifact())
    try:
        engine.state[:] = np.frombuffer(bytes(builder.state), np.uint8)
        engine.slots[:] = np.frombuffer(bytes(builder.slots), np.uint8)
        hosts = [np.ascontiguousarray(x.value) for i, x in enumerate(given) if i not in spec.updates]
        guarded = [_Guarded(y) for y in wanted]
        views = [g.view for g in guarded]
        engine.run(0, batch, hosts, views, learning_rate=learning_rate, step=step, seed=seed)
        for g in guarded:
            g.check(op)
        regions = {Region.STATE: engine.state, Region.SLOTS: engine.slots}
        return [*views, *(_read(builder.tensors[sources[i]], regions) for i in spec.updates if i < len(given))]
    finally:
        engine.close()


def check_everywhere(
    op: str,
    inputs: Sequence[Given | Array],
    outputs: Sequence[Wanted | tuple[int, ...]],
    expected: Sequence[npt.ArrayLike],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    **options: Any,
) -> None:
    """Compares :func:`run_one` on every instruction set with ``expected``; without tolerances bit for bit."""
    for name in instruction_sets():
        results = run_one(op, inputs, outputs, machine=native_machine(name), **options)
        assert len(results) == len(expected)
        for position, (result, right) in enumerate(zip(results, expected, strict=True)):
            right = np.asarray(right).reshape(result.shape)
            message = f"result {position} of {op} on {name}"
            np.testing.assert_allclose(result.astype(np.float64), right, rtol=rtol, atol=atol, err_msg=message)


class _Builder:
    """Collects the tensors of a program; inputs that the operation updates go to STATE and SLOTS."""

    def __init__(self, max_batch: int, batch: int) -> None:
        self.max_batch, self.batch = max_batch, batch
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.state, self.slots = bytearray(), bytearray()
        self._variables: list[Variable] = []
        self._inputs: list[Port] = []
        self._outputs: list[Port] = []
        self._arena_bytes = 0

    def add_input(self, x: Given, op: str, position: int) -> int:
        dtype, dims = _DTYPES[x.value.dtype], self._declared(x.value.shape, x.batched)
        optimizer = op in OPTIMIZERS
        if position not in OPS[op].updates:
            self._inputs.append(Port(f"in{position}", len(self.tensors)))
            tensor = Tensor(dtype, Region.INPUT, dims, len(self._inputs) - 1, x.batched, x.scale, x.zero_point)
        elif optimizer and position > 0:
            tensor = Tensor(dtype, Region.SLOTS, dims, _append(self.slots, x.value))
        else:
            tensor = Tensor(dtype, Region.STATE, dims, _append(self.state, x.value))
            flag = VariableFlag.TRAINABLE if optimizer else VariableFlag.BUFFER
            perm = tuple(range(len(dims)))
            self._variables.append(Variable(f"v{position}", dtype, dims, perm, tensor.offset, flag))
        return self._add(tensor)

    def add_output(self, y: Wanted) -> int:
        self._outputs.append(Port(f"out{len(self._outputs)}", len(self.tensors)))
        dims = self._declared(y.shape, y.batched)
        dtype = _DTYPES[np.dtype(y.dtype)]
        return self._add(Tensor(dtype, Region.OUTPUT, dims, len(self._outputs) - 1, y.batched, y.scale, y.zero_point))

    def add_arena(self, like: int) -> int:
        tensor = replace(self.tensors[like], region=Region.ARENA, offset=self._arena_bytes)
        self._arena_bytes = align(self._arena_bytes + tensor.nbytes)
        return self._add(tensor)

    def artifact(self) -> Artifact:
        program = Program(
            "one",
            self.max_batch,
            self._arena_bytes,
            workspace_bytes(self.ops, self.tensors),
            tuple(self._inputs),
            tuple(self._outputs),
            tuple(self.tensors),
            tuple(self.ops),
        )
        return Artifact({}, tuple(self._variables), (program,), b"", bytes(self.state), len(self.slots))

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _declared(self, shape: tuple[int, ...], batched: bool) -> tuple[int, ...]:
        return (shape[0] * self.max_batch // self.batch, *shape[1:]) if batched else shape


class _Guarded:
    def __init__(self, y: Wanted) -> None:
        size = int(np.prod(y.shape)) * np.dtype(y.dtype).itemsize
        self._memory = np.full(size + 2 * _GUARD, _CANARY, np.uint8)
        self._size = size
        self.view: Array = self._memory[_GUARD : _GUARD + size].view(y.dtype).reshape(y.shape)

    def check(self, op: str) -> None:
        guards = np.concatenate([self._memory[:_GUARD], self._memory[_GUARD + self._size :]])
        assert (guards == _CANARY).all(), f"{op} wrote beyond its output"


def _append(region: bytearray, value: Array) -> int:
    offset = align(len(region))
    region += bytes(offset - len(region)) + np.ascontiguousarray(value).tobytes()
    return offset


def _read(tensor: Tensor, regions: dict[Region, npt.NDArray[np.uint8]]) -> Array:
    span = regions[tensor.region][tensor.offset : tensor.offset + tensor.nbytes]
    return span.copy().view(tensor.dtype.numpy).reshape(tensor.dims)


def _attribute(text: str, value: Any) -> int | float:
    return float(value) if text.endswith(":f") else int(value)
