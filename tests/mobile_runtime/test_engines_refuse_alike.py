"""Mutated artifacts: both engines accept and refuse the same ones, and what both accept runs without a crash.

The checksum is always right, so that every mutation reaches the reader or the verifier.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from engines import assert_close, machine, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from make_artifact_vectors import VECTORS
from op_cases import CASES, Case

from evensong.mobile_runtime.errors import ProgramError, RuntimeFault
from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.native import NativeMachine
from evensong.wire.artifact import encode_artifact
from evensong.wire.errors import EvensongError, WireError
from evensong.wire.program import OPS, Artifact, DType, Op, Program, Region, Tensor

pytestmark = needs_native

_MOST_SCRATCH = 1 << 20  # mutants that ask for more memory are compared but not run


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_mutated_operations(name: str, data: st.DataObject) -> None:
    case = Case(data.draw, name)
    CASES[name](case)
    artifact = case.artifact()
    for _ in range(data.draw(st.integers(1, 2))):
        artifact = _mutated(data.draw, artifact)
    _compare(artifact, encode_artifact(artifact))


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.evsg")), ids=lambda path: path.stem)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_bytes(path: Any, data: st.DataObject) -> None:
    mutant = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        offset = data.draw(st.integers(64, len(mutant) - 4))
        replacement = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=1),
                st.sampled_from([0, 1, 2, 63, 64, 2**31 - 1, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
            )
        )
        mutant[offset : offset + len(replacement)] = replacement
    struct.pack_into("<I", mutant, 16, google_crc32c.value(bytes(mutant[64:])))
    _compare(None, bytes(mutant))


def _compare(artifact: Artifact | None, data: bytes) -> None:
    """Both engines answer alike, and what they accept gives the same numbers or the same fault."""
    refusals = {engine: _refusal(engine, data) for engine in ("twin", "native")}
    twin, native = refusals.values()
    if isinstance(twin, WireError):
        # Names and the manifest are for hosts: the engine does not look at them.
        if not any(word in str(twin) for word in ("share a name", "UTF-8", "manifest")):
            assert isinstance(native, EvensongError), f"only the twin refuses: {twin}"
        return
    assert (twin is None) == (native is None), f"twin: {twin}; native: {native}"
    if twin is None and artifact is not None:
        _run_both(artifact, data)


def _refusal(engine: str, data: bytes) -> EvensongError | None:
    """The engine by itself, without the reader that ``load`` puts before it."""
    try:
        if engine == "twin":
            machine("twin", data)
        else:
            NativeMachine(None, data).close()
    except EvensongError as error:
        return error
    except MemoryError:
        return ProgramError("no memory")
    return None


def _run_both(artifact: Artifact, data: bytes) -> None:
    program = artifact.programs[0]
    if program.arena_bytes + artifact.slot_bytes + sum(t.nbytes for t in program.tensors) > _MOST_SCRATCH:
        return
    rng = np.random.default_rng(len(data))
    inputs = [_values(rng, program, program.tensors[port.tensor]) for port in program.inputs]
    outcomes = []
    for engine in ("twin", "native"):
        runner = machine(engine, data)
        outputs = [np.zeros_like(_values(rng, program, program.tensors[p.tensor])) for p in program.outputs]
        outcomes.append((_fault(runner, inputs, outputs), outputs, runner.state.copy(), runner.slots.copy()))
    (twin_fault, twin_outputs, *_), (native_fault, native_outputs, *_) = outcomes
    assert twin_fault == native_fault
    if twin_fault is None:
        for a, e in zip(native_outputs, twin_outputs, strict=True):
            if np.isfinite(e).all():
                assert_close(a, e, rtol=1e-4)


def _fault(runner: Machine, inputs: list[Any], outputs: list[Any]) -> type[RuntimeFault] | None:
    try:
        runner.run(0, 1, inputs, outputs, learning_rate=0.1)
    except RuntimeFault as error:
        return type(error)
    return None


def _values(rng: np.random.Generator, program: Program, tensor: Tensor) -> Any:
    """Random content of a port for one example, with small integers that are valid labels and ids now and then."""
    dims = (tensor.dims[0] // program.max_batch, *tensor.dims[1:]) if tensor.batched else tensor.dims
    if tensor.dtype == DType.F32:
        return rng.normal(size=dims).astype(np.float32)
    return rng.integers(0, 3, size=dims).astype(tensor.dtype.numpy)


# ------------------------------------------------------------------------------------------------- mutations


def _mutated(draw: Any, artifact: Artifact) -> Artifact:
    """One declaration changed: a tensor, an operand, an attribute, a size, a variable."""
    program = artifact.programs[0]
    kind = draw(st.sampled_from(["tensor", "tensor", "tensor", "operand", "attribute", "program", "variable"]))
    if kind == "tensor":
        index = draw(st.integers(0, len(program.tensors) - 1))
        tensors = list(program.tensors)
        tensors[index] = _mutated_tensor(draw, tensors[index])
        program = replace(program, tensors=tuple(tensors))
    elif kind in ("operand", "attribute"):
        index = draw(st.integers(0, len(program.ops) - 1))
        ops = list(program.ops)
        ops[index] = _mutated_op(draw, ops[index], len(program.tensors))
        program = replace(program, ops=tuple(ops))
    elif kind == "program":
        name, value = draw(
            st.sampled_from(
                [
                    ("max_batch", program.max_batch + 1),
                    ("max_batch", 1),
                    ("workspace_bytes", 0),
                    ("workspace_bytes", program.workspace_bytes // 2),
                    ("arena_bytes", program.arena_bytes // 2),
                ]
            )
        )
        program = replace(program, **{name: value})
    elif artifact.variables:
        variable = artifact.variables[0]
        change = draw(st.sampled_from([{"flags": type(variable.flags)(3 - variable.flags)}, {"offset": 64}]))
        return replace(artifact, variables=(replace(variable, **change), *artifact.variables[1:]))
    return replace(artifact, programs=(program, *artifact.programs[1:]))


def _mutated_tensor(draw: Any, tensor: Tensor) -> Tensor:
    kind = draw(st.sampled_from(["dims", "dims", "dtype", "region", "offset", "batched", "quantisation", "rank"]))
    if kind == "dims" and tensor.dims:
        axis = draw(st.integers(0, len(tensor.dims) - 1))
        size = draw(
            st.sampled_from([1, 2, min(tensor.dims[axis] * 2, 2**32 - 1), max(1, tensor.dims[axis] - 1), 2**16, 2**31])
        )
        return replace(tensor, dims=(*tensor.dims[:axis], size, *tensor.dims[axis + 1 :]))
    if kind == "rank":
        dims = draw(st.sampled_from([(), tensor.dims[1:], (1, *tensor.dims), (*tensor.dims, 1), tensor.dims[::-1]]))
        return replace(tensor, dims=dims)
    if kind == "dtype":
        return replace(tensor, dtype=draw(st.sampled_from(DType)))
    if kind == "region":
        return replace(tensor, region=draw(st.sampled_from(Region)), offset=0)
    if kind == "offset":
        return replace(tensor, offset=draw(st.sampled_from([0, 1, 64, 128, 2**40])))
    if kind == "batched":
        return replace(tensor, batched=not tensor.batched)
    scale = draw(st.sampled_from([0.0, -1.0, 1e-38, 2.0**-128, 1e38, float("inf"), float("nan")]))
    return replace(tensor, scale=scale, zero_point=draw(st.sampled_from([-129, -128, 0, 127, 128, 2**31 - 1])))


def _mutated_op(draw: Any, op: Op, tensors: int) -> Op:
    attrs = OPS[op.name].attrs
    if attrs and draw(st.booleans()):
        index = draw(st.integers(0, len(attrs) - 1))
        values: st.SearchStrategy[float]
        if attrs[index].endswith(":f"):
            values = st.sampled_from([0.0, -1.0, 1.0, 2.0, 1e30, float("inf"), float("nan")])
        else:
            values = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 8, 9, 100, 128, 32768, 32769, 2**31 - 1])
        return replace(op, attrs=(*op.attrs[:index], draw(values), *op.attrs[index + 1 :]))
    operands = [*op.inputs, *op.outputs]
    if not operands:
        return op
    index = draw(st.integers(0, len(operands) - 1))
    operands[index] = draw(st.integers(0, tensors))  # one past the end, too
    return replace(op, inputs=tuple(operands[: len(op.inputs)]), outputs=tuple(operands[len(op.inputs) :]))
