"""Does each operation fit its operands? After this, kernels need no bounds checks on shapes.

``engine/src/verify.cpp`` has the same rules, ``docs/artifact.md`` states them for both, and a test holds the two equal
on mutated artifacts. Values in memory (labels, ids, pooling indices) are checked by the kernels that use them.
"""

from __future__ import annotations

from collections.abc import Sequence

from evensong.mobile_runtime.errors import ProgramError
from evensong.mobile_runtime.verify_rules import LOSSES, OPTIMIZERS, RULES, OpView, amount_of_work, match_operands
from evensong.wire.program import OPS, Artifact, Program, Region, Tensor, Variable, VariableFlag
from evensong.wire.workspace import workspace_bytes

#: What int8 training keeps beside a model: the largest values of a step, and the scales of gradients.
STATISTICS_IN_SLOTS = frozenset(
    {"Q_OBSERVE", "Q_ADAPT", "G_QUANTIZE", "G_SCALE", "G_ADD", "G_LINEAR_INPUT", "G_CONV2D_INPUT"}
)

MOST_WORK = 1 << 42  #: multiply-adds of one run: minutes on a phone


def verify(artifact: Artifact) -> None:
    """Raises :class:`ProgramError` unless every program of ``artifact`` can be run without leaving its memory.

    ``artifact`` keeps the structural rules of :func:`evensong.wire.artifact.decode_artifact` already.
    """
    for program in artifact.programs:
        work, updated = 0, False
        for index, op in enumerate(program.ops):
            view = OpView(program, op)
            wrong = (
                match_operands(view)
                or (RULES[op.name](view) if op.name in RULES else None)
                or _check_memory(view)
                or _check_updates(view, artifact.variables)
                or ("a loss stands after an update" if updated and op.name in LOSSES else None)
            )
            if wrong:
                raise ProgramError(f"{op.name} (operation {index} of {program.name!r}): {wrong}")
            updated = updated or op.name in OPTIMIZERS
            work += amount_of_work(view)
        _check_totals(program, work)


def _check_totals(program: Program, work: int) -> None:
    if work > MOST_WORK:
        raise ProgramError(f"{program.name!r} takes too long to run", expected=f"at most {MOST_WORK} steps", got=work)
    needed = workspace_bytes(program.ops, program.tensors)
    if program.workspace_bytes < needed:
        raise ProgramError(
            f"the workspace of {program.name!r} is too small", expected=f"{needed} bytes", got=program.workspace_bytes
        )


def _check_memory(view: OpView) -> str | None:
    """Writes go to the arena, to outputs, and by ``updates`` to persistent memory; nothing is overwritten that is read.

    Only the (input, output) pairs of ``OpSpec.inplace`` may share memory, and then exactly.
    """
    spec, count = OPS[view.op.name], len(view.inputs)
    operands = [*view.inputs, *view.outputs]
    for position, written in enumerate(operands):
        is_output, is_update = position >= count, position in spec.updates
        if is_output and written.region not in (Region.ARENA, Region.OUTPUT):
            return f"output {position - count} is written outside the arena and the output ports"
        if is_update and not is_output and written.region not in (Region.STATE, Region.SLOTS):
            return f"input {position} is updated but not persistent"
        if not is_output and not is_update:
            continue
        for other, tensor in enumerate(operands):
            if other == position or not _overlap(written, tensor):
                continue
            if (other, position - count) not in spec.inplace or not _same_place(written, tensor):
                return f"operands {other} and {position} overlap"
    return None


def _check_updates(view: OpView, variables: Sequence[Variable]) -> str | None:
    """What an operation updates is a whole variable of the right kind, or optimiser state in SLOTS."""
    optimizer = view.op.name in OPTIMIZERS
    flag = VariableFlag.TRAINABLE if optimizer else VariableFlag.BUFFER
    for position in OPS[view.op.name].updates:
        if position >= len(view.inputs):
            continue
        tensor = view.inputs[position]
        if tensor.region == Region.SLOTS and view.op.name in STATISTICS_IN_SLOTS:
            continue
        if optimizer and position > 0:
            if tensor.region != Region.SLOTS:
                return f"input {position} is optimiser state but not in the slots"
        elif tensor.region != Region.STATE or not any(
            (v.offset, v.nbytes, v.dtype, v.flags) == (tensor.offset, tensor.nbytes, tensor.dtype, flag)
            for v in variables
        ):
            return f"input {position} is not a variable that this operation may update"
    return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.region != b.region:
        return False
    if a.region in (Region.INPUT, Region.OUTPUT):
        return a.offset == b.offset
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def _same_place(a: Tensor, b: Tensor) -> bool:
    return (a.region, a.offset, a.nbytes, a.batched) == (b.region, b.offset, b.nbytes, b.batched)
