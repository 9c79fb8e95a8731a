"""Builds small programs by hand, tensor by tensor, for tests that need an artifact without the compiler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.wire.artifact import align
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

Array = npt.NDArray[Any]

_DTYPES = {
    np.dtype("float32"): DType.F32,
    np.dtype("int8"): DType.I8,
    np.dtype("uint8"): DType.U8,
    np.dtype("int32"): DType.I32,
}


@dataclass
class Memory:
    """The persistent regions that the programs of one artifact share."""

    const: bytearray = field(default_factory=bytearray)
    state: bytearray = field(default_factory=bytearray)
    slot_bytes: int = 0
    variables: list[Variable] = field(default_factory=list)


class ProgramBuilder:
    """One program; every scratch tensor has a place of its own. Methods return the index of the tensor they add."""

    def __init__(self, name: str = "predict", max_batch: int = 1, memory: Memory | None = None) -> None:
        self.name = name
        self.max_batch = max_batch
        self.memory = memory or Memory()
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.arena_bytes = 0

    def input(
        self, name: str, dims: tuple[int, ...], dtype: DType = DType.F32, *, batched: bool = False, **quantised: Any
    ) -> int:
        self.inputs.append(Port(name, len(self.tensors)))
        return self._add(Tensor(dtype, Region.INPUT, dims, len(self.inputs) - 1, batched, **quantised))

    def output(
        self, name: str, dims: tuple[int, ...], dtype: DType = DType.F32, *, batched: bool = False, **quantised: Any
    ) -> int:
        self.outputs.append(Port(name, len(self.tensors)))
        return self._add(Tensor(dtype, Region.OUTPUT, dims, len(self.outputs) - 1, batched, **quantised))

    def scratch(
        self, dims: tuple[int, ...], dtype: DType = DType.F32, *, batched: bool = False, **quantised: Any
    ) -> int:
        index = self._add(Tensor(dtype, Region.ARENA, dims, self.arena_bytes, batched, **quantised))
        self.arena_bytes += align(self.tensors[index].nbytes)
        return index

    def const(self, value: Array, **quantised: Any) -> int:
        offset = _append(self.memory.const, value)
        return self._add(Tensor(_DTYPES[value.dtype], Region.CONST, value.shape, offset, False, **quantised))

    def variable(
        self, name: str, value: Array, flag: VariableFlag = VariableFlag.TRAINABLE, perm: tuple[int, ...] = ()
    ) -> int:
        """A tensor of STATE; a name that another program of the same memory has declared is found again."""
        found = next((v for v in self.memory.variables if v.name == name), None)
        if found is None:
            offset = _append(self.memory.state, value)
            found = Variable(name, _DTYPES[value.dtype], value.shape, perm or tuple(range(value.ndim)), offset, flag)
            self.memory.variables.append(found)
        return self._add(Tensor(found.dtype, Region.STATE, found.dims, found.offset))

    def slot(self, dims: tuple[int, ...], dtype: DType = DType.F32) -> int:
        index = self._add(Tensor(dtype, Region.SLOTS, dims, self.memory.slot_bytes))
        self.memory.slot_bytes += align(self.tensors[index].nbytes)
        return index

    def op(self, name: str, inputs: list[int], outputs: list[int], **attrs: float) -> None:
        """Attributes that are left out are 0, or -1 for a permutation."""
        names = [attr.partition(":")[0] for attr in OPS[name].attrs]
        assert attrs.keys() <= set(names), (name, attrs)
        values = tuple(attrs.get(n, -1 if n.startswith("perm") else 0) for n in names)
        self.ops.append(Op(name, tuple(inputs), tuple(outputs), values))

    def program(self) -> Program:
        return Program(
            self.name,
            self.max_batch,
            self.arena_bytes,
            workspace_bytes(self.ops, self.tensors),
            tuple(self.inputs),
            tuple(self.outputs),
            tuple(self.tensors),
            tuple(self.ops),
        )

    def artifact(self, *others: ProgramBuilder) -> Artifact:
        """This program and ``others``, which share its memory."""
        return Artifact(
            {},
            tuple(self.memory.variables),
            tuple(builder.program() for builder in (self, *others)),
            bytes(self.memory.const),
            bytes(self.memory.state),
            self.memory.slot_bytes,
        )

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def classifier(max_batch: int = 8, features: int = 4, classes: int = 3) -> Artifact:
    """predict, evaluate and train of a linear layer with softmax cross-entropy and SGD with momentum."""
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(classes, features)).astype(np.float32)
    memory = Memory()

    def forward(builder: ProgramBuilder, y: int) -> tuple[int, int, int]:
        x = next(port.tensor for port in builder.inputs if port.name == "x")
        w = builder.variable("linear.weight", weight)
        b = builder.variable("linear.bias", np.zeros(classes, np.float32))
        builder.op("LINEAR", [x, w, b], [y])
        return x, w, b

    def losses(builder: ProgramBuilder) -> tuple[int, int, int]:
        builder.input("x", (max_batch, features), batched=True)
        target = builder.input("target", (max_batch,), DType.I32, batched=True)
        return target, builder.output("loss", (1,)), builder.output("correct", (1,), DType.I32)

    predict = ProgramBuilder("predict", max_batch, memory)
    predict.input("x", (max_batch, features), batched=True)
    forward(predict, predict.output("logits", (max_batch, classes), batched=True))

    evaluate = ProgramBuilder("evaluate", max_batch, memory)
    target, loss, correct = losses(evaluate)
    logits = evaluate.scratch((max_batch, classes), batched=True)
    forward(evaluate, logits)
    evaluate.op("CROSS_ENTROPY", [logits, target], [loss, correct])

    train = ProgramBuilder("train", max_batch, memory)
    target, loss, correct = losses(train)
    logits, dlogits = (train.scratch((max_batch, classes), batched=True) for _ in range(2))
    x, w, b = forward(train, logits)
    dw, db = train.scratch((classes, features)), train.scratch((classes,))
    train.op("CROSS_ENTROPY", [logits, target], [loss, correct, dlogits])
    train.op("LINEAR_GRAD_WEIGHT", [dlogits, x], [dw, db])
    train.op("SGD", [w, dw, train.slot((classes, features))], [], momentum=0.5)
    train.op("SGD", [b, db, train.slot((classes,))], [], momentum=0.5)
    return predict.artifact(evaluate, train)


def _append(region: bytearray, value: Array) -> int:
    offset = align(len(region))
    region += bytes(offset - len(region)) + value.tobytes()
    return offset
