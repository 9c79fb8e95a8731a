"""The backward pass, derived ahead of time: one rule for each operation, gradients only where something is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from evensong.mobile_runtime.compiler import int8_backward
from evensong.mobile_runtime.compiler.int8_training import Int8State
from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, constant
from evensong.mobile_runtime.errors import CompileError
from evensong.wire.program import Activation, DType, Region


def differentiate(
    graph: Graph,
    gradient_of_output: Mapping[Value, Value],
    trainable: set[Value],
    int8: Int8State | None = None,
    weight_decay: float = 0.0,
) -> dict[Value, Value]:
    """Appends the backward pass to ``graph``; weights that train in int8 are also updated by it, with ``weight_decay``.

    ``gradient_of_output`` maps a value to its known gradient (what a loss operation wrote); ``trainable`` holds root
    values. Returns the gradient of each trainable value that has one.
    """
    backward = Backward(graph, graph.reached(trainable), int8, weight_decay)
    for value, gradient in gradient_of_output.items():
        backward.accumulate(value, gradient)
    for node in reversed(list(graph.nodes)):
        rule = RULES.get(node.op)
        if rule is not None and any(backward.has(output) for output in node.outputs) and backward.any_wanted(node):
            backward.place = node.place
            rule(backward, node)
    return {value: backward.of(value) for value in trainable if backward.has(value)}


@dataclass
class Backward:
    """The gradients known so far, by root value, while nodes are visited last to first."""

    graph: Graph
    wanted: set[Value]
    int8: Int8State | None = None
    weight_decay: float = 0.0
    gradients: dict[Value, Value] = field(default_factory=dict)
    parts: dict[Value, list[tuple[Node, Value]]] = field(default_factory=dict)  #: slices of a value, each with its own
    place: str = ""

    def has(self, value: Value) -> bool:
        return value.root in self.gradients or value.root in self.parts

    def wants(self, value: Value) -> bool:
        """Whether something trainable lies behind ``value``."""
        return value.root in self.wanted

    def any_wanted(self, node: Node) -> bool:
        return any(self.wants(value) for value in node.inputs)

    def of(self, value: Value) -> Value:
        """The complete gradient of ``value``, in its shape."""
        self._join_parts(value.root)
        return self.gradients[value.root].reshaped(value.dims)

    def accumulate(self, value: Value, gradient: Value) -> None:
        """Adds one contribution; a value that fans out gets their sum."""
        root = value.root
        gradient = gradient.reshaped(root.dims)
        if root in self.gradients and gradient.dtype == DType.I8:
            gradient = int8_backward.sum_of(self, self.gradients[root], gradient)
        elif root in self.gradients:
            total = self.fresh(root)
            self.graph.add("ADD", [self.gradients[root], gradient], [total], self.place)
            gradient = total
        self.gradients[root] = gradient

    def _join_parts(self, root: Value) -> None:
        """Slices that together are the whole give its gradient by one CONCAT; others are widened and added."""
        parts = sorted(self.parts.pop(root, []), key=lambda part: part[0].attrs["start"])
        if len(parts) > 1 and _are_whole([node for node, _ in parts]):
            whole = parts[0][0].inputs[0]
            gradients = [gradient for _, gradient in parts]
            self.accumulate(whole, self.emit("CONCAT", gradients, whole, axis=parts[0][0].attrs["axis"]))
            return
        for node, gradient in parts:
            whole = node.inputs[0]
            self.accumulate(whole, self.emit("SLICE_GRAD", [gradient], whole, **node.attrs))

    def fresh(self, value: Value) -> Value:
        """A value to hold the gradient of ``value``."""
        dtype = DType.I8 if value.dtype == DType.I8 else DType.F32
        return Value(value.dims, dtype, batched=value.batched, name=f"gradient of {value.name}")

    def emit(self, op: str, inputs: list[Value], like: Value, **attrs: int | float) -> Value:
        """Adds a node whose one result has the shape of ``like``."""
        result = self.fresh(like)
        result.entry = inputs[0].root.entry
        self.graph.add(op, inputs, [result], self.place, **attrs)
        return result


def _are_whole(slices: list[Node]) -> bool:
    """Whether slices, by their starts, follow each other along one axis from its first to its last place."""
    axis, whole = int(slices[0].attrs["axis"]), slices[0].inputs[0].dims
    at = 0
    for node in slices:
        if (node.attrs["axis"], node.attrs["start"]) != (axis, at) or node.inputs[0].dims != whole:
            return False
        at += node.outputs[0].dims[axis]
    return at == whole[axis]


# --------------------------------------------------------------------------------------------------------------- rules


def _linear(g: Backward, node: Node) -> None:
    _weighted(g, node, "LINEAR", {})


def _conv2d(g: Backward, node: Node) -> None:
    _weighted(g, node, "CONV2D", {name: value for name, value in node.attrs.items() if name != "activation"})


def _weighted(g: Backward, node: Node, op: str, attrs: dict[str, int | float]) -> None:
    x, w, *bias = node.inputs
    (y,) = node.outputs
    dy = g.of(y)
    activation = Activation(int(node.attrs["activation"]))
    if activation != Activation.NONE:
        dy = g.emit("UNARY_GRAD", [dy, y], y, kind=activation)
    b = bias[0] if bias and g.wants(bias[0]) else None
    if g.wants(w):
        outputs = [g.fresh(w)] + ([g.fresh(b)] if b is not None else [])
        g.graph.add(f"{op}_GRAD_WEIGHT", [dy, x], outputs, g.place, **attrs)
        g.accumulate(w, outputs[0])
        if b is not None:
            g.accumulate(b, outputs[1])
    elif b is not None:
        g.accumulate(b, g.emit("SUM_ROWS", [dy], b))
    if g.wants(x):
        g.accumulate(x, g.emit(f"{op}_GRAD_INPUT", [dy, w], x, **attrs))


def _matmul(g: Backward, node: Node) -> None:
    (a, b), dy = node.inputs, g.of(node.outputs[0])
    transpose = int(node.attrs["transpose"])
    if g.wants(a):
        left, right, how = {0: (dy, b, 2), 1: (b, dy, 2), 2: (dy, b, 0)}[transpose]
        g.accumulate(a, g.emit("MATMUL", [left, right], a, transpose=how))
    if g.wants(b):
        left, right, how = {0: (a, dy, 1), 1: (a, dy, 0), 2: (dy, a, 1)}[transpose]
        g.accumulate(b, g.emit("MATMUL", [left, right], b, transpose=how))


def _attention(g: Backward, node: Node) -> None:
    y = node.outputs[0]
    if len(node.outputs) == 1:
        node.outputs.append(y.like(y.dims[:3], name=f"sums of {node.place}"))
    outputs = [g.fresh(value) for value in node.inputs]
    g.graph.add("ATTENTION_GRAD", [g.of(y), *node.inputs, node.outputs[1]], outputs, g.place, **node.attrs)
    _accumulate_wanted(g, node.inputs, outputs)


def _conv2d_transposed(g: Backward, node: Node) -> None:
    """CONV2D_GRAD_INPUT in a forward pass: what was its gradient is its input, and the other way round."""
    x, w = node.inputs
    dy = g.of(node.outputs[0])
    if g.wants(w):
        g.accumulate(w, g.emit("CONV2D_GRAD_WEIGHT", [x, dy], w, **node.attrs))
    if g.wants(x):
        g.accumulate(x, g.emit("CONV2D", [dy, w], x, **node.attrs, activation=Activation.NONE))


def _max_pool(g: Backward, node: Node) -> None:
    (x,), y = node.inputs, node.outputs[0]
    if len(node.outputs) == 1:
        window = int(node.attrs["kernel_h"] * node.attrs["kernel_w"])
        index = Value(
            y.dims, DType.U8 if window <= 256 else DType.I32, batched=y.batched, name=f"index of {node.place}"
        )
        node.outputs.append(index)
    g.accumulate(x, g.emit("MAX_POOL2D_GRAD", [g.of(y), node.outputs[1]], x, **node.attrs))


def _avg_pool(g: Backward, node: Node) -> None:
    g.accumulate(node.inputs[0], g.emit("AVG_POOL2D_GRAD", [g.of(node.outputs[0])], node.inputs[0], **node.attrs))


def _batch_norm_train(g: Backward, node: Node) -> None:
    x, gamma, beta, _, _ = node.inputs
    y, mean, rstd = node.outputs
    outputs = [g.fresh(x), g.fresh(gamma), g.fresh(beta)]
    g.graph.add("BATCH_NORM_GRAD", [g.of(y), x, gamma, mean, rstd], outputs, g.place)
    _accumulate_wanted(g, [x, gamma, beta], outputs)


def _batch_norm_eval(g: Backward, node: Node) -> None:
    x, gamma, beta, mean, var = node.inputs
    if gamma.region == var.region == Region.CONST:  # a fixed factor: nothing of the forward pass is kept
        dy = g.of(node.outputs[0])
        if g.wants(beta):
            g.accumulate(beta, g.emit("SUM_ROWS", [dy], beta))
        if g.wants(x):
            factor = np.divide(gamma.content, np.sqrt(np.add(var.content, node.attrs["eps"])))
            g.accumulate(x, g.emit("MUL", [dy, constant(factor, f"factor of {node.place}")], x))
        return
    outputs = [g.fresh(x)]
    if g.wants(gamma) or g.wants(beta):
        outputs += [g.fresh(gamma), g.fresh(beta)]
    g.graph.add("BATCH_NORM_EVAL_GRAD", [g.of(node.outputs[0]), x, gamma, mean, var], outputs, g.place, **node.attrs)
    _accumulate_wanted(g, [x, gamma, beta], outputs)


def _norm(g: Backward, node: Node) -> None:
    """Layer, group and RMS norm: the gradient reads the statistics that the forward pass has written."""
    x, gamma, *_ = node.inputs
    y, *statistics = node.outputs
    outputs = [g.fresh(value) for value in node.inputs]
    g.graph.add(f"{node.op}_GRAD", [g.of(y), x, gamma, *statistics], outputs, g.place)
    _accumulate_wanted(g, node.inputs, outputs)


def _recurrent(g: Backward, node: Node) -> None:
    gx, w, bias = node.inputs
    gates, y = node.outputs
    saved = [gates, y, w, bias] if node.op == "GRU" else [gates, y, w]
    outputs = [g.fresh(gx), y.like(name=f"scratch of {node.place}")]
    if g.wants(w) or g.wants(bias):
        outputs += [g.fresh(w), g.fresh(bias)]
    g.graph.add(f"{node.op}_GRAD", [g.of(y), *saved], outputs, g.place, **node.attrs)
    _accumulate_wanted(g, [gx], outputs[:1])
    _accumulate_wanted(g, [w, bias], outputs[2:])


def _accumulate_wanted(g: Backward, values: list[Value], gradients: list[Value]) -> None:
    for value, gradient in zip(values, gradients, strict=False):
        if g.wants(value):
            g.accumulate(value, gradient)


def _unary(g: Backward, node: Node) -> None:
    (x,), (y,) = node.inputs, node.outputs
    saved = y if Activation(int(node.attrs["kind"])).gradient_reads_output else x
    g.accumulate(x, g.emit("UNARY_GRAD", [g.of(y), saved], x, kind=node.attrs["kind"]))


def _add(g: Backward, node: Node) -> None:
    a, b = node.inputs
    dy = g.of(node.outputs[0])
    if g.wants(a):
        g.accumulate(a, dy)
    if g.wants(b):
        g.accumulate(b, _to_row(g, dy, b))


def _sub(g: Backward, node: Node) -> None:
    a, b = node.inputs
    dy = g.of(node.outputs[0])
    if g.wants(a):
        g.accumulate(a, dy)
    if g.wants(b):
        row = _to_row(g, dy, b)
        g.accumulate(b, g.emit("SCALE", [row], row, alpha=-1.0, beta=0.0))


def _mul(g: Backward, node: Node) -> None:
    a, b = node.inputs
    dy = g.of(node.outputs[0])
    if g.wants(a):
        g.accumulate(a, g.emit("MUL", [dy, b], a))
    if g.wants(b):
        g.accumulate(b, _to_row(g, g.emit("MUL", [dy, a], a), b))


def _extremum(g: Backward, node: Node) -> None:
    """The gradient goes to the operand that was chosen; to half to each where both are equal, but wholly to one that is
    compared with a constant (``clamp``)."""
    a, b = node.inputs
    dy = g.of(node.outputs[0])
    share = (1.0 + g.wants(a) - g.wants(b)) / 2  # of a, where both are equal
    largest = node.op == "MAXIMUM"
    is_larger = g.emit("STEP", [a, b], a, at_equal=share if largest else 1 - share)
    is_other = g.emit("SCALE", [is_larger], a, alpha=-1.0, beta=1.0)
    if g.wants(a):
        g.accumulate(a, g.emit("MUL", [dy, is_larger if largest else is_other], a))
    if g.wants(b):
        g.accumulate(b, _to_row(g, g.emit("MUL", [dy, is_other if largest else is_larger], a), b))


def _to_row(g: Backward, gradient: Value, operand: Value) -> Value:
    """The gradient of a second operand, which may be a row that every row of the first used."""
    if operand.batched == gradient.batched and operand.elements == gradient.elements:
        return gradient
    return g.emit("SUM_ROWS", [gradient], operand)


def _scale(g: Backward, node: Node) -> None:
    dy = g.of(node.outputs[0])
    x = node.inputs[0]
    alpha = node.attrs["alpha"]
    g.accumulate(x, dy if alpha == 1 else g.emit("SCALE", [dy], x, alpha=alpha, beta=0.0))


def _reduce_mean(g: Backward, node: Node) -> None:
    g.accumulate(node.inputs[0], g.emit("REDUCE_MEAN_GRAD", [g.of(node.outputs[0])], node.inputs[0], **node.attrs))


def _spread(g: Backward, node: Node) -> None:
    """REDUCE_MEAN_GRAD in a forward pass spreads a value: its gradient is the mean."""
    g.accumulate(node.inputs[0], g.emit("REDUCE_MEAN", [g.of(node.outputs[0])], node.inputs[0], **node.attrs))


def _dropout(g: Backward, node: Node) -> None:
    y, mask = node.outputs
    g.accumulate(node.inputs[0], g.emit("DROPOUT_GRAD", [g.of(y), mask], node.inputs[0], p=node.attrs["p"]))


def _transpose(g: Backward, node: Node) -> None:
    perm = [int(axis) for axis in node.attrs.values() if axis >= 0]
    inverse = [perm.index(axis) if axis < len(perm) else -1 for axis in range(len(node.attrs))]
    attrs = {f"perm{i}": axis for i, axis in enumerate(inverse)}
    g.accumulate(node.inputs[0], g.emit("TRANSPOSE", [g.of(node.outputs[0])], node.inputs[0], **attrs))


def _concat(g: Backward, node: Node) -> None:
    dy = g.of(node.outputs[0])
    axis, start = int(node.attrs["axis"]), 0
    for value in node.inputs:
        if g.wants(value):
            g.accumulate(value, g.emit("SLICE", [dy], value, axis=axis, start=start))
        start += value.dims[axis]


def _slice(g: Backward, node: Node) -> None:
    g.parts.setdefault(node.inputs[0].root, []).append((node, g.of(node.outputs[0])))


def _widen(g: Backward, node: Node) -> None:
    """SLICE_GRAD in a forward pass puts zeros around a value."""
    g.accumulate(node.inputs[0], g.emit("SLICE", [g.of(node.outputs[0])], node.inputs[0], **node.attrs))


def _copy(g: Backward, node: Node) -> None:
    g.accumulate(node.inputs[0], g.of(node.outputs[0]).reshaped(node.inputs[0].dims))


def _embedding(g: Backward, node: Node) -> None:
    ids, table = node.inputs
    g.accumulate(table, g.emit("EMBEDDING_GRAD", [g.of(node.outputs[0]), ids], table))


def _softmax(g: Backward, node: Node) -> None:
    (x,), (y,) = node.inputs, node.outputs
    g.accumulate(x, g.emit(f"{node.op}_GRAD", [g.of(y), y], x))


def _resize(g: Backward, node: Node) -> None:
    x = node.inputs[0]
    g.accumulate(x, g.emit("RESIZE2D_GRAD", [g.of(node.outputs[0])], x, **node.attrs))


def _crop(g: Backward, node: Node) -> None:
    raise CompileError(
        f"a crop or flip behind something trainable ({node.place}) has no gradient",
        fix="Put it before the first trainable layer.",
    )


#: Operations without a rule (losses, those of a frozen int8 part, those with integer results) end the backward pass.
RULES: Mapping[str, Callable[[Backward, Node], None]] = {
    "LINEAR": _linear,
    "MATMUL": _matmul,
    "ATTENTION": _attention,
    "CONV2D": _conv2d,
    "CONV2D_GRAD_INPUT": _conv2d_transposed,
    "MAX_POOL2D": _max_pool,
    "AVG_POOL2D": _avg_pool,
    "BATCH_NORM_TRAIN": _batch_norm_train,
    "BATCH_NORM_EVAL": _batch_norm_eval,
    "LAYER_NORM": _norm,
    "GROUP_NORM": _norm,
    "RMS_NORM": _norm,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "UNARY": _unary,
    "ADD": _add,
    "SUB": _sub,
    "MUL": _mul,
    "MAXIMUM": _extremum,
    "MINIMUM": _extremum,
    "SCALE": _scale,
    "REDUCE_MEAN": _reduce_mean,
    "REDUCE_MEAN_GRAD": _spread,
    "DROPOUT": _dropout,
    "TRANSPOSE": _transpose,
    "CONCAT": _concat,
    "SLICE": _slice,
    "SLICE_GRAD": _widen,
    "COPY": _copy,
    "EMBEDDING": _embedding,
    "RESIZE2D": _resize,
    "CROP2D": _crop,
    "SOFTMAX": _softmax,
    "LOG_SOFTMAX": _softmax,
    "QLINEAR": int8_backward.layer,
    "QCONV2D": int8_backward.layer,
    "QMAX_POOL2D": int8_backward.max_pool,
    "Q_ADD": int8_backward.add,
    "Q_QUANTIZE": int8_backward.quantize,
    "Q_DEQUANTIZE": int8_backward.dequantize,
}
