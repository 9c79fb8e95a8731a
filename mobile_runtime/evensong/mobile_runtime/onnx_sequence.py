"""ONNX forms of what runs over sequences: recurrent layers, products of two tensors, attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evensong.wire.program import Op

if TYPE_CHECKING:
    from evensong.mobile_runtime.onnx_export import Exporter, Rule

_FAR = float(np.finfo(np.float32).min) / 4

#: Where ONNX has torch's gates: r z n, and i f g o.
_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def _recurrent(g: Exporter, op: Op, a: Mapping[str, Any]) -> None:
    """The inputs' part of the gates is there already: the layer's own weight for it only puts gates in ONNX's order."""
    gx, w, b = op.inputs
    _, steps, gates = g.program.tensors[gx].dims
    hidden = g.program.tensors[w].dims[1]
    places = np.arange(gates).reshape(-1, hidden)[list(_GATES[op.name])].reshape(-1)
    weight, bias = g.array(w), g.array(b)
    if weight is None or bias is None:
        raise AssertionError(f"{op.name} with weights that are computed")
    more = {"linear_before_reset": 1} if op.name == "GRU" else {}
    states = g.node(
        op.name,
        g.node("Transpose", g.read(gx), perm=[1, 0, 2]),
        g.constant(np.eye(gates)[places][None]),
        g.constant(weight[places][None]),
        g.constant(np.concatenate([np.zeros(gates), bias[places]])[None]),
        hidden_size=hidden,
        direction="reverse" if a["reverse"] else "forward",
        **more,
    )
    g.write(op.outputs[1], g.node("Transpose", g.reshaped(states, [steps, -1, hidden]), perm=[1, 0, 2]))


def _matmul(g: Exporter, op: Op, a: Mapping[str, Any]) -> None:
    operands = []
    for number, index in enumerate(op.inputs, start=1):
        rank = len(g.program.tensors[index].dims)
        operand = g.read(index)
        if a["transpose"] == number:
            operand = g.node("Transpose", operand, perm=[*range(rank - 2), rank - 1, rank - 2])
        operands.append(operand)
    g.write(op.outputs[0], g.node("MatMul", *operands))


def _attention(g: Exporter, op: Op, a: Mapping[str, Any]) -> None:
    q, k, v = (g.node("Transpose", g.read(index), perm=[0, 2, 1, 3]) for index in op.inputs)
    scaled = g.node("Mul", q, g.constant(a["scale"]))
    scores = g.node("MatMul", scaled, g.node("Transpose", k, perm=[0, 1, 3, 2]))
    if a["causal"]:
        steps = [g.program.tensors[index].dims[1] for index in op.inputs[:2]]
        scores = g.node("Add", scores, g.constant(np.triu(np.full(steps, _FAR), 1)))
    result = g.node("MatMul", g.node("Softmax", scores, axis=-1), v)
    g.write(op.outputs[0], g.node("Transpose", result, perm=[0, 2, 1, 3]))


RULES: Mapping[str, Rule] = {"GRU": _recurrent, "LSTM": _recurrent, "MATMUL": _matmul, "ATTENTION": _attention}
