"""A linear softmax classifier as an artifact, assembled by hand: what these tests train, without torch or compiler."""

from __future__ import annotations

import numpy as np

from evensong.wire.artifact import align, encode_artifact
from evensong.wire.program import (
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

WEIGHT, BIAS = "linear.weight", "linear.bias"


def tiny_artifact(features: int = 4, classes: int = 3, batch: int = 8, seed: int = 0) -> bytes:
    """The bytes of a model ``softmax(x w^T + b)`` with programs predict, evaluate and train (SGD)."""
    weight = np.random.default_rng(seed).normal(0, 0.1, (classes, features)).astype("<f4")
    bias_at = align(weight.nbytes)
    state = bytearray(bias_at + align(4 * classes))
    state[: weight.nbytes] = weight.tobytes()
    variables = (
        Variable(WEIGHT, DType.F32, (classes, features), (0, 1), 0, VariableFlag.TRAINABLE),
        Variable(BIAS, DType.F32, (classes,), (0,), bias_at, VariableFlag.TRAINABLE),
    )
    w = Tensor(DType.F32, Region.STATE, (classes, features), 0)
    b = Tensor(DType.F32, Region.STATE, (classes,), bias_at)
    x = Tensor(DType.F32, Region.INPUT, (batch, features), 0, batched=True)
    labels = Tensor(DType.I32, Region.INPUT, (batch,), 1, batched=True)
    loss = Tensor(DType.F32, Region.OUTPUT, (1,), 0)
    correct = Tensor(DType.I32, Region.OUTPUT, (1,), 1)
    logits_bytes = align(4 * batch * classes)
    logits = Tensor(DType.F32, Region.ARENA, (batch, classes), 0, batched=True)
    dlogits = Tensor(DType.F32, Region.ARENA, (batch, classes), logits_bytes, batched=True)
    dw = Tensor(DType.F32, Region.ARENA, (classes, features), 2 * logits_bytes)
    db = Tensor(DType.F32, Region.ARENA, (classes,), 2 * logits_bytes + align(4 * classes * features))
    arena = 2 * logits_bytes + align(4 * classes * features) + align(4 * classes)
    y = Tensor(DType.F32, Region.OUTPUT, (batch, classes), 0, batched=True)
    linear = Op("LINEAR", (0, 1, 2), (3,), (0,))
    measured = (Port("loss", 4), Port("correct", 5))
    programs = (
        _program("predict", batch, 0, (Port("x", 0),), (Port("y", 3),), (x, w, b, y), (linear,)),
        _program(
            "evaluate",
            batch,
            logits_bytes,
            (Port("x", 0), Port("target", 6)),
            measured,
            (x, w, b, logits, loss, correct, labels),
            (linear, Op("CROSS_ENTROPY", (3, 6), (4, 5))),
        ),
        _program(
            "train",
            batch,
            arena,
            (Port("x", 0), Port("target", 6)),
            measured,
            (x, w, b, logits, loss, correct, labels, dlogits, dw, db),
            (
                linear,
                Op("CROSS_ENTROPY", (3, 6), (4, 5, 7)),
                Op("LINEAR_GRAD_WEIGHT", (7, 0), (8, 9)),
                Op("SGD", (1, 8), (), (0.0, 0.0, 0)),
                Op("SGD", (2, 9), (), (0.0, 0.0, 0)),
            ),
        ),
    )
    return encode_artifact(Artifact({"name": "tiny"}, variables, programs, b"", bytes(state), 0))


def _program(
    name: str,
    batch: int,
    arena: int,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    tensors: tuple[Tensor, ...],
    ops: tuple[Op, ...],
) -> Program:
    return Program(name, batch, arena, workspace_bytes(ops, tensors), inputs, outputs, tensors, ops)


def tiny_examples(count: int, seed: int, features: int = 4, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Separable examples: ``x`` float32 [count, features], labels int64 [count]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(7).normal(0, 2.0, (classes, features))
    return (centres[labels] + rng.normal(0, 0.5, (count, features))).astype(np.float32), labels
