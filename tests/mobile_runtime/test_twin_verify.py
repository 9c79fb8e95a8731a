"""Every rule of verification refuses something, in both engines, and says which operation of which program it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import ENGINES, machine
from program_builder import ProgramBuilder, classifier

from evensong.mobile_runtime import ProgramError
from evensong.wire.artifact import encode_artifact
from evensong.wire.program import Activation, Artifact, DType, Op, Region, VariableFlag

ONE = np.ones(1, np.float32)


def program(make: Callable[[ProgramBuilder], None], max_batch: int = 4) -> Artifact:
    builder = ProgramBuilder("train", max_batch)
    make(builder)
    return builder.artifact()


def op(name: str, inputs: list[Any], outputs: list[Any], **attrs: float) -> Callable[[ProgramBuilder], None]:
    """One operation over ports: an operand is ``dims``, ``(dims, dtype)`` or ``(dims, dtype, {more})``."""

    def make(b: ProgramBuilder) -> None:
        operands: list[list[int]] = [[], []]
        for side, add, described in ((0, b.input, inputs), (1, b.output, outputs)):
            for number, operand in enumerate(described):
                dims, *more = operand if operand and isinstance(operand[0], tuple) else (operand,)
                dtype = more[0] if more else DType.F32
                operands[side].append(add(f"{side}_{number}", dims, dtype, **(more[1] if len(more) > 1 else {})))
        b.op(name, operands[0], operands[1], **attrs)

    return make


ROWS = {"batched": True}
F32, I32, I8 = DType.F32, DType.I32, DType.I8
CONV = {"stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1, "groups": 1}
POOL = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2}

SIGNATURE: dict[str, Callable[[ProgramBuilder], None]] = {
    "wrong dtype": op("LINEAR", [((2, 3), I32), (4, 3)], [(2, 4)]),
    "wrong depth": op("LINEAR", [(2, 3), (4, 5)], [(2, 4)]),
    "wrong rows": op("LINEAR", [(2, 3), (4, 3)], [(3, 4)]),
    "wrong rank": op("LINEAR", [(2, 3), (4, 3, 1)], [(2, 4)]),
    "bias of another size": op("LINEAR", [(2, 3), (4, 3), (3,)], [(2, 4)]),
    "output not batched": op("LINEAR", [((4, 3), F32, ROWS), (4, 3)], [(4, 4)]),
    "batched weight": op("LINEAR", [(4, 3), ((4, 3), F32, ROWS)], [(4, 4)]),
    "unknown activation": op("LINEAR", [(2, 3), (4, 3)], [(2, 4)], activation=3),
    "unknown kind": op("UNARY", [(2,)], [(2,)], kind=max(Activation) + 1),
    "matrices that do not fit": op("MATMUL", [(2, 3, 4), (2, 5, 4)], [(2, 3, 5)]),
    "matrices of no kind": op("MATMUL", [(2, 4, 4), (2, 4, 4)], [(2, 4, 4)], transpose=3),
    "a product over the batch": op("MATMUL", [((4, 3), F32, ROWS), (3, 4)], [((4, 4), F32, ROWS)]),
    "gates of no GRU": op("GRU", [(2, 3, 8), (8, 2), (8,)], [(2, 3, 8), (2, 3, 2)]),
    "gates of no LSTM": op("LSTM", [(2, 3, 6), (6, 2), (6,)], [(2, 3, 6), (2, 3, 2)]),
    "groups of no size": op("GROUP_NORM", [(2, 3, 4), (4,), (4,)], [(2, 3, 4), (2, 3), (2, 3)]),
    "no kind": op("UNARY", [(2,)], [(2,)], kind=0),
    "flag of neither": op("ADAM", [(2,), (2,), (2,), (2,)], [], decoupled=2),
    "attribute not finite": op("SCALE", [(2,)], [(2,)], alpha=float("nan")),
    "loss of two": op("MSE", [(2,), (2,)], [(2,), ((1,), I32)]),
    "correct as a float": op("MSE", [(2,), (2,)], [(1,), (1,)]),
    "dtypes differ": op("COPY", [(4,)], [((4,), I32)]),
    "labels of another number": op("CROSS_ENTROPY", [(2, 3), ((3,), I32)], [(1,), ((1,), I32)]),
    "table of another size": op("QLUT", [((2,), I8), ((255,), I8)], [((2,), I8)]),
    "stride of zero": op("CONV2D", [(1, 4, 4, 1), (1, 1, 1, 1)], [(1, 4, 4, 1)], **{**CONV, "stride_h": 0}),
    "negative padding": op("CONV2D", [(1, 4, 4, 1), (1, 1, 1, 1)], [(1, 4, 4, 1)], **CONV, pad_top=-1),
    "int8 bound": op("QADD", [((2,), I8), ((2,), I8)], [((2,), I8)], lo=-129, hi=127),
}

BEYOND: dict[str, Callable[[ProgramBuilder], None]] = {
    "groups do not divide": op("CONV2D", [(1, 4, 4, 3), (2, 1, 1, 1)], [(1, 4, 4, 2)], **{**CONV, "groups": 2}),
    "window coordinates": op(
        "CONV2D", [(1, 1, 1, 1), (2, 32768, 1, 1)], [(1, 1, 1, 2)], **{**CONV, "dilation_h": 32768}
    ),
    "padding over half": op("MAX_POOL2D", [(1, 4, 4, 1)], [(1, 2, 2, 1)], **POOL, pad_top=2),
    "window outside": op("AVG_POOL2D", [(1, 4, 4, 1)], [(1, 3, 2, 1)], **POOL),
    "index dtype": op("MAX_POOL2D", [(1, 4, 4, 1)], [(1, 2, 2, 1), ((1, 2, 2, 1), I32)], **POOL),
    "row does not divide": op("ADD", [(6,), (4,)], [(6,)]),
    "row of the batch": op("ADD", [((4, 3), F32, ROWS), (12,)], [((4, 3), F32, ROWS)]),
    "layer norm rows": op("LAYER_NORM", [(6,), (4,), (4,)], [(6,), (1,), (1,)]),
    "reduces over the batch": op(
        "REDUCE_MEAN",
        [
            ((4, 3), F32, ROWS),
        ],
        [((4, 3), F32, ROWS)],
        axis_size=1,
        inner_size=12,
    ),
    "axis of zero": op("REDUCE_MEAN", [(6,)], [(6,)], axis_size=0, inner_size=1),
    "probability of one": op("DROPOUT", [(2,)], [(2,), ((2,), DType.U8)], p=1.0),
    "permutation repeats": op("TRANSPOSE", [(2, 2)], [(2, 2)], perm0=0, perm1=0),
    "permutation does not fit": op("TRANSPOSE", [(2, 3)], [(2, 3)], perm0=1, perm1=0),
    "moves the batch": op("TRANSPOSE", [((4, 4), F32, ROWS)], [((4, 4), F32, ROWS)], perm0=1, perm1=0),
    "joins along the batch": op("CONCAT", [((4, 2), F32, ROWS), ((4, 2), F32, ROWS)], [((8, 2), F32, ROWS)], axis=0),
    "parts do not add up": op("CONCAT", [(2, 2), (2, 2)], [(2, 5)], axis=1),
    "slice beyond the end": op("SLICE", [(2, 4)], [(2, 3)], axis=1, start=2),
    "axis beyond the rank": op("SLICE", [(2, 4)], [(2, 4)], axis=2),
    "zero point": op("QADD", [((2,), I8, {"zero_point": 128}), ((2,), I8)], [((2,), I8)]),
    "no scale": op("QUANTIZE", [(2,)], [((2,), I8)]),
    "infinite scale": op("DEQUANTIZE", [((2,), I8, {"scale": float("inf")})], [(2,)]),
    "sum too long": op("QLINEAR", [((1, 65537), I8), ((1, 65537), I8), ((1,), I32), (1,)], [((1, 1), I8)]),
}


def _writes_const(b: ProgramBuilder) -> None:
    b.op("COPY", [b.input("x", (1,))], [b.const(ONE)])


def _writes_input(b: ProgramBuilder) -> None:
    b.op("COPY", [b.input("x", (1,))], [b.input("y", (1,))])


def _writes_state(b: ProgramBuilder) -> None:
    b.op("COPY", [b.input("x", (1,))], [b.variable("w", ONE)])


def _writes_slots(b: ProgramBuilder) -> None:
    b.op("COPY", [b.input("x", (1,))], [b.slot((1,))])


def _updates_scratch(b: ProgramBuilder) -> None:
    b.op("SGD", [b.scratch((1,)), b.input("g", (1,))], [])


def _updates_a_buffer(b: ProgramBuilder) -> None:
    b.op("SGD", [b.variable("w", ONE, VariableFlag.BUFFER), b.input("g", (1,))], [])


def _updates_part_of_a_variable(b: ProgramBuilder) -> None:
    w = b.variable("w", np.ones(20, np.float32))
    b.tensors[w] = replace(b.tensors[w], dims=(4,))
    b.op("SGD", [w, b.input("g", (4,))], [])


def _momentum_in_the_state(b: ProgramBuilder) -> None:
    b.op("SGD", [b.variable("w", ONE), b.input("g", (1,)), b.variable("v", ONE)], [])


def _statistics_are_trainable(b: ProgramBuilder) -> None:
    x = b.input("x", (2, 1))
    statistics = [b.variable("m", ONE), b.variable("v", ONE)]
    outputs = [b.scratch((2, 1)), b.scratch((1,)), b.scratch((1,))]
    b.op("BATCH_NORM_TRAIN", [x, b.const(ONE), b.const(ONE), *statistics], outputs)


def _overlaps(shift: int, dims: tuple[int, ...] = (32,)) -> Callable[[ProgramBuilder], None]:
    def make(b: ProgramBuilder) -> None:
        source = b.scratch((48,))
        b.tensors[source] = replace(b.tensors[source], dims=(32,))
        target = b.scratch(dims)
        b.tensors[target] = replace(b.tensors[target], offset=shift)
        b.op("UNARY", [source], [target], kind=1)

    return make


def _overwrites_what_may_not_share(b: ProgramBuilder) -> None:
    x = b.scratch((2, 2))
    b.op("SOFTMAX", [x], [x])


def _two_outputs_in_one_place(b: ProgramBuilder) -> None:
    y = b.scratch((2, 2))
    b.op(
        "LAYER_NORM",
        [b.input("x", (2, 2)), b.const(np.ones(2, np.float32)), b.const(np.ones(2, np.float32))],
        [y, y, y],
    )


def _weight_is_its_own_gradient(b: ProgramBuilder) -> None:
    w = b.variable("w", ONE)
    b.op("SGD", [w, w], [])


def _output_port_twice(b: ProgramBuilder) -> None:
    y = b.output("y", (2, 2))
    b.tensors.append(b.tensors[y])
    b.op("SOFTMAX", [y], [len(b.tensors) - 1])


def _loss_after_update(b: ProgramBuilder) -> None:
    b.op("SGD", [b.variable("w", ONE), b.input("g", (1,))], [])
    b.op("MSE", [b.input("x", (1,)), b.input("t", (1,))], [b.output("l", (1,)), b.output("c", (1,), DType.I32)])


def _too_much_work(b: ProgramBuilder) -> None:
    """Two products of 2^42 multiply-adds; the arena is declared and never allocated."""
    side, half = 2**14, 2**30
    places = [b.scratch((1,)) for _ in range(3)]
    for index, offset in zip(places, (0, 0, half), strict=True):
        b.tensors[index] = replace(b.tensors[index], dims=(side, side), offset=offset)
    b.arena_bytes = 2 * half
    for _ in range(2):
        b.op("LINEAR", places[:2], places[2:])


WRITES = {
    "writes CONST": _writes_const,
    "writes INPUT": _writes_input,
    "writes STATE": _writes_state,
    "writes SLOTS": _writes_slots,
    "updates scratch": _updates_scratch,
    "updates a buffer": _updates_a_buffer,
    "updates part of a variable": _updates_part_of_a_variable,
    "momentum in the state": _momentum_in_the_state,
    "statistics are trainable": _statistics_are_trainable,
    "overlaps in part": _overlaps(64),
    "overlaps in place but for its size": _overlaps(0, (31,)),
    "overwrites what may not share": _overwrites_what_may_not_share,
    "two outputs in one place": _two_outputs_in_one_place,
    "weight is its own gradient": _weight_is_its_own_gradient,
    "output port twice": _output_port_twice,
    "loss after an update": _loss_after_update,
    "too much work": _too_much_work,
}

CASES = {**SIGNATURE, **BEYOND, **WRITES}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", CASES)
def test_refused(what: str, engine: str) -> None:
    with pytest.raises(ProgramError, match="'train'"):
        machine(engine, encode_artifact(program(CASES[what])))


@pytest.mark.parametrize("engine", ENGINES)
def test_too_little_workspace_is_refused(engine: str) -> None:
    artifact = classifier()
    train = artifact.programs[2]
    assert train.workspace_bytes
    short = replace(train, workspace_bytes=train.workspace_bytes - 1)
    with pytest.raises(ProgramError, match="workspace"):
        machine(engine, encode_artifact(replace(artifact, programs=(*artifact.programs[:2], short))))


@pytest.mark.parametrize("engine", ENGINES)
def test_in_place_is_allowed_where_the_table_says_so(engine: str) -> None:
    machine(engine, encode_artifact(program(_overlaps(0))))
    machine(engine, encode_artifact(program(_overlaps(128))))


def test_the_error_names_the_operation() -> None:
    artifact = classifier()
    evaluate = artifact.programs[1]
    wrong = replace(evaluate, ops=(evaluate.ops[0], Op("COPY", (0,), (0,))))
    with pytest.raises(ProgramError, match=r"COPY \(operation 1 of 'evaluate'\)"):
        machine("twin", encode_artifact(replace(artifact, programs=(artifact.programs[0], wrong))))
    assert evaluate.tensors[0].region == Region.INPUT
