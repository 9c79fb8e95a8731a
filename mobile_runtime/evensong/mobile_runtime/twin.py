"""The NumPy twin: every operation as its formula says, over exactly the memory that the artifact plans.

It is the reference that the compiled engine is tested against and the fallback where that cannot be built. Arena, state
and optimiser slots are real byte buffers and tensors are views at their declared offsets, so that a mistake of the
memory planner gives wrong numbers here as it would on a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np

from evensong.mobile_runtime import (  # one module a family of operations
    twin_ops_conv,
    twin_ops_elementwise,
    twin_ops_input,
    twin_ops_int8,
    twin_ops_int8_train,
    twin_ops_linear,
    twin_ops_loss,
    twin_ops_move,
    twin_ops_norm,
    twin_ops_optimizer,
    twin_ops_pool,
    twin_ops_recurrent,
)
from evensong.mobile_runtime.errors import DivergedError, ExampleError, RuntimeFault
from evensong.mobile_runtime.machine import Prepared
from evensong.mobile_runtime.signatures import signature
from evensong.mobile_runtime.twin_call import Array, Call, Clock, Kernel
from evensong.mobile_runtime.verify import verify
from evensong.mobile_runtime.verify_rules import OPTIMIZERS
from evensong.wire.program import OPS, Artifact, Op, Program, Region, Tensor, VariableFlag

KERNELS: dict[str, Kernel] = {
    **twin_ops_linear.KERNELS,
    **twin_ops_conv.KERNELS,
    **twin_ops_pool.KERNELS,
    **twin_ops_recurrent.KERNELS,
    **twin_ops_norm.KERNELS,
    **twin_ops_elementwise.KERNELS,
    **twin_ops_move.KERNELS,
    **twin_ops_loss.KERNELS,
    **twin_ops_optimizer.KERNELS,
    **twin_ops_int8.KERNELS,
    **twin_ops_int8_train.KERNELS,
    **twin_ops_input.KERNELS,
}


class TwinMachine:
    """A :class:`.machine.Machine` in NumPy; making one raises :class:`ProgramError` for what does not verify."""

    engine = "twin"

    def __init__(self, artifact: Artifact) -> None:
        verify(artifact)
        self._artifact = artifact
        self.state = np.frombuffer(artifact.state, np.uint8).copy()
        self.slots = np.zeros(artifact.slot_bytes, np.uint8)
        arena_bytes = max((program.arena_bytes for program in artifact.programs), default=0)
        self._memory = {
            Region.CONST: np.frombuffer(artifact.const, np.uint8),
            Region.STATE: self.state,
            Region.SLOTS: self.slots,
            Region.ARENA: np.zeros(arena_bytes, np.uint8),
        }
        self._statistics = [
            self.state[v.offset : v.offset + v.nbytes] for v in artifact.variables if v.flags & VariableFlag.BUFFER
        ]
        self._frozen: frozenset[int] = frozenset()  # offsets in STATE

    def run(
        self,
        program: int,
        batch: int,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        *,
        learning_rate: float = 0.0,
        step: int = 1,
        seed: int = 0,
    ) -> None:
        code = self._artifact.programs[program]
        tensors = [self._view(tensor, code, batch, inputs, outputs) for tensor in code.tensors]
        statistics = [view.copy() for view in self._statistics]  # training changes them before the loss is known
        try:
            with np.errstate(all="ignore"):  # what is not finite is caught at the loss, the gradients and the weights
                self._run_operations(code, tensors, Clock(learning_rate, step, seed))
        except RuntimeFault:
            for view, value in zip(self._statistics, statistics, strict=True):
                view[...] = value
            raise

    def trace(self, program: str, inputs: Sequence[Array]) -> Iterator[tuple[int, list[Array]]]:
        """Runs a program operation by operation; yields each one's number and copies of its results."""
        code = self._artifact.program(program)
        first = code.tensors[code.inputs[0].tensor]
        batch = len(inputs[0]) * code.max_batch // first.dims[0]
        ports = [code.tensors[port.tensor] for port in code.outputs]
        outputs = [np.zeros(_live_shape(tensor, code, batch), tensor.dtype.numpy) for tensor in ports]
        tensors = [self._view(tensor, code, batch, inputs, outputs) for tensor in code.tensors]
        for index, op in enumerate(code.ops):
            with np.errstate(all="ignore"):
                _execute(op, code, tensors, Clock(0.0, 1, 0))
            yield index, [tensors[operand].copy() for operand in op.outputs]

    def prepare(self, program: int, batch: int, inputs: Sequence[Array], outputs: Sequence[Array]) -> Prepared:
        def call(inputs: Sequence[Array], *, learning_rate: float = 0.0, step: int = 1, seed: int = 0) -> None:
            if not all(np.isfinite(array).all() for array in inputs):
                raise ExampleError("an input holds NaN or infinite values", expected="finite numbers")
            self.run(program, batch, inputs, outputs, learning_rate=learning_rate, step=step, seed=seed)

        return call

    def freeze(self, variables: Sequence[int]) -> None:
        self._frozen = frozenset(self._artifact.variables[index].offset for index in variables)

    def close(self) -> None:
        self._memory.clear()

    def _run_operations(self, program: Program, tensors: Sequence[Array], clock: Clock) -> None:
        updating = False
        for index, op in enumerate(program.ops):
            optimizer = op.name in OPTIMIZERS
            if optimizer and not updating:
                self._check_gradients(program, index, tensors)
            updating = optimizer
            if not (optimizer and self._is_frozen(op, program)):
                _execute(op, program, tensors, clock)

    def _check_gradients(self, program: Program, first: int, tensors: Sequence[Array]) -> None:
        """The gradients of all updates that follow one another, before the first of them changes anything."""
        for op in takewhile(lambda op: op.name in OPTIMIZERS, program.ops[first:]):
            gradient = tensors[op.inputs[1]]
            if op.name == "LINEAR_UPDATE" or gradient.dtype != np.float32 or self._is_frozen(op, program):
                continue
            if not np.isfinite(gradient).all():
                raise DivergedError("a gradient is not finite")

    def _view(
        self, tensor: Tensor, program: Program, batch: int, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Array:
        """The live part of ``tensor``: the first ``dims[0] * batch / max_batch`` rows if it is batched."""
        shape = _live_shape(tensor, program, batch)
        if tensor.region == Region.INPUT:
            return inputs[tensor.offset].reshape(shape)
        if tensor.region == Region.OUTPUT:
            return outputs[tensor.offset].reshape(shape)
        span = self._memory[tensor.region][tensor.offset : tensor.offset + tensor.nbytes]
        whole: Array = span.view(tensor.dtype.numpy).reshape(tensor.dims)
        return whole[: shape[0]] if tensor.batched else whole

    def _is_frozen(self, op: Op, program: Program) -> bool:
        return program.tensors[op.inputs[0]].offset in self._frozen


def _live_shape(tensor: Tensor, program: Program, batch: int) -> tuple[int, ...]:
    return (tensor.dims[0] // program.max_batch * batch, *tensor.dims[1:]) if tensor.batched else tensor.dims


def _execute(op: Op, program: Program, tensors: Sequence[Array], clock: Clock) -> None:
    outputs = [tensors[index] for index in op.outputs]
    call = Call(
        shapes=tuple(output.shape for output in outputs),
        inputs=tuple(program.tensors[index] for index in op.inputs),
        outputs=tuple(program.tensors[index] for index in op.outputs),
        clock=clock,
    )
    names = (attr.partition(":")[0] for attr in OPS[op.name].attrs)
    attributes = dict(zip(names, op.attrs, strict=True))
    results = KERNELS[op.name](call, *_operands(op, tensors), **attributes)
    if results is None:
        return
    if not isinstance(results, tuple):
        results = (results,)
    for output, result in zip(outputs, results, strict=False):  # results of absent optional outputs fall away
        output[...] = result.reshape(output.shape)


def _operands(op: Op, tensors: Sequence[Array]) -> list[Array]:
    """The inputs of ``op``; where only the number of elements counts, as a row (their dimensions may differ)."""
    inputs = [tensors[index] for index in op.inputs]
    for position, pattern in enumerate(signature(op.name).inputs):
        if pattern.product == "#" and pattern.dtype != "x" and position < len(inputs):
            inputs[position] = inputs[position].reshape(-1)
    return inputs
