"""The NumPy twin: every operation as its formula says, over exactly the memory that the artifact plans.

It is the reference that the compiled engine is tested against and the fallback where that cannot be built. Arena, state
and optimiser slots are real byte buffers and tensors are views at their declared offsets, so that a mistake of the
memory planner gives wrong numbers here as it would on a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evensong.mobile_runtime import (
    twin_ops_conv,
    twin_ops_elementwise,
    twin_ops_int8,
    twin_ops_linear,
    twin_ops_loss,
    twin_ops_move,
    twin_ops_norm,
    twin_ops_optimizer,
    twin_ops_pool,
)
from evensong.mobile_runtime.twin_call import Array, Call, Kernel
from evensong.mobile_runtime.verify import verify
from evensong.wire.program import OPS, Artifact, Op, Program, Region, Tensor

KERNELS: dict[str, Kernel] = {
    **twin_ops_linear.KERNELS,
    **twin_ops_conv.KERNELS,
    **twin_ops_pool.KERNELS,
    **twin_ops_norm.KERNELS,
    **twin_ops_elementwise.KERNELS,
    **twin_ops_move.KERNELS,
    **twin_ops_loss.KERNELS,
    **twin_ops_optimizer.KERNELS,
    **twin_ops_int8.KERNELS,
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
        self._frozen: frozenset[int] = frozenset()  # offsets in STATE

    def freeze(self, variables: Sequence[int]) -> None:
        self._frozen = frozenset(self._artifact.variables[index].offset for index in variables)

    def close(self) -> None:
        self._memory.clear()

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
        with np.errstate(all="ignore"):  # what is not finite is caught where it matters: at the loss and at the weights
            for op in code.ops:
                if not self._is_frozen(op, code):
                    _execute(op, code, tensors, learning_rate, step, seed)

    def _view(
        self, tensor: Tensor, program: Program, batch: int, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Array:
        """The live part of ``tensor``: the first ``dims[0] * batch / max_batch`` rows if it is batched."""
        shape = tensor.dims
        if tensor.batched:
            shape = (shape[0] // program.max_batch * batch, *shape[1:])
        if tensor.region == Region.INPUT:
            return inputs[tensor.offset].reshape(shape)
        if tensor.region == Region.OUTPUT:
            return outputs[tensor.offset].reshape(shape)
        span = self._memory[tensor.region][tensor.offset : tensor.offset + tensor.nbytes]
        whole: Array = span.view(tensor.dtype.numpy).reshape(tensor.dims)
        return whole[: shape[0]] if tensor.batched else whole

    def _is_frozen(self, op: Op, program: Program) -> bool:
        if op.name not in twin_ops_optimizer.KERNELS:
            return False
        weight = program.tensors[op.inputs[0]]
        return weight.region == Region.STATE and weight.offset in self._frozen


def _execute(op: Op, program: Program, tensors: Sequence[Array], learning_rate: float, step: int, seed: int) -> None:
    outputs = [tensors[index] for index in op.outputs]
    call = Call(
        shapes=tuple(output.shape for output in outputs),
        inputs=tuple(program.tensors[index] for index in op.inputs),
        outputs=tuple(program.tensors[index] for index in op.outputs),
        learning_rate=learning_rate,
        step=step,
        seed=seed,
    )
    names = (attr.partition(":")[0] for attr in OPS[op.name].attrs)
    attributes = dict(zip(names, op.attrs, strict=True))
    results = KERNELS[op.name](call, *(tensors[index] for index in op.inputs), **attributes)
    if results is None:
        return
    if not isinstance(results, tuple):
        results = (results,)
    for output, result in zip(outputs, results, strict=False):  # results of absent optional outputs fall away
        output[...] = result.reshape(output.shape)
