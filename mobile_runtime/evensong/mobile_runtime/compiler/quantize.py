"""Int8 for the frozen part of a program: each float32 node becomes its integer twin where there is one.

Weights are symmetric with a scale for each output channel, activations asymmetric with one scale for each tensor (Jacob
et al., *Quantization and training of neural networks for efficient integer-arithmetic-only inference*, CVPR 2018).
Values are converted where integer and float32 parts meet, so that a frozen body runs in int8 under a trainable head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.bias_correction import EXAMPLES, correct_biases
from evensong.mobile_runtime.compiler.calibrate import Calibrator, Quantization
from evensong.mobile_runtime.compiler.equalize import equalize
from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Data, Graph, Node, Value, constant
from evensong.mobile_runtime.compiler.subpixel import as_subpixel_convolutions
from evensong.mobile_runtime.twin import KERNELS
from evensong.mobile_runtime.twin_call import Call, Clock
from evensong.wire.program import Activation, DType, Region, Tensor

_MOST_BIAS = float(1 << 30)  # leaves room for the products that are added to it


def quantize_frozen(graph: Graph, calibrator: Calibrator, trainable: set[Value]) -> None:
    """Rewrites the nodes of ``graph`` that nothing in ``trainable`` (root values) reaches."""
    frozen = _frozen_nodes(graph, trainable)
    _drop_frozen_dropout(graph, frozen)
    frozen = as_subpixel_convolutions(graph, frozen)
    settings = calibrator.settings
    if settings.equalize is True or (settings.equalize == "auto" and _gains_by_equalizing(graph, calibrator, frozen)):
        equalize(graph, frozen)
    ranges = calibrator.quantizations(graph, frozen)
    _share_ranges_of_joined(frozen, ranges, graph)
    _replace_weights(frozen, calibrator.weights)
    before = [replace(node) for node in frozen]
    _rewrite(graph, frozen, ranges)
    if settings.bias_correction:
        correct_biases(before, graph.nodes, _ports(graph, calibrator, EXAMPLES))


def _rewrite(graph: Graph, frozen: list[Node], ranges: Mapping[Value, Quantization]) -> None:
    work = Quantizer(graph, ranges, graph.readers())
    nodes, graph.nodes = graph.nodes, []
    convertible = set(map(id, frozen))
    for node in nodes:
        if id(node) in work.merged:
            continue
        work.place = node.place
        rule = RULES.get(node.op) if id(node) in convertible else None
        if rule is None or not rule(work, node):
            _keep(work, node)
    for name, value in graph.outputs.items():
        graph.outputs[name] = work.float_of(value)


def _replace_weights(frozen: Sequence[Node], weights: Mapping[str, Data]) -> None:
    """Puts others in the place of frozen weights, by their names."""
    for node in frozen:
        for at, value in enumerate(node.inputs):
            if value.root.region == Region.CONST and value.root.name in weights and node.op in ("LINEAR", "CONV2D"):
                node.inputs[at] = constant(weights[value.root.name], value.root.name).reshaped(value.dims)


def _ports(graph: Graph, calibrator: Calibrator, most: int) -> dict[Value, Data]:
    return dict(zip(graph.inputs.values(), calibrator.examples(most), strict=False))


def _gains_by_equalizing(graph: Graph, calibrator: Calibrator, frozen: list[Node]) -> bool:
    """Whether the quantised part then differs less from the float32 one, on calibration examples."""
    errors = []
    for with_it in (False, True):
        nodes = [replace(node, inputs=list(node.inputs), outputs=list(node.outputs)) for node in graph.nodes]
        trial = Graph(graph.name, nodes, dict(graph.inputs), dict(graph.outputs))
        part = [copied for copied, node in zip(nodes, graph.nodes, strict=True) if any(node is f for f in frozen)]
        if with_it and not equalize(trial, part):
            return False
        ranges = calibrator.quantizations(trial, part)
        _share_ranges_of_joined(part, ranges, trial)
        errors.append(_output_error(trial, part, ranges, _ports(trial, calibrator, EXAMPLES)))
    return errors[1] < errors[0]


def _output_error(
    trial: Graph, part: list[Node], ranges: Mapping[Value, Quantization], ports: Mapping[Value, Data]
) -> float:
    """Mean squared error of what the frozen part hands on, relative to its mean square."""
    made = {value.root for node in part for value in node.outputs}
    handed_on = {v.root for node in trial.nodes if node not in part for v in node.inputs if v.root in made}
    results = list(handed_on | {value.root for value in trial.outputs.values() if value.root in made})
    exact = Interpreter(ports)
    for node in part:
        exact.run(node)
    wanted = [exact.contents[value].astype(np.float64) for value in results]
    _rewrite(trial, part, ranges)
    rounded = Interpreter(ports)
    for node in trial.nodes:
        if rounded.knows(node):
            rounded.run(node)
    return sum(
        float(
            np.square(rounded.contents[value].astype(np.float64) - content).mean()
            / max(np.square(content).mean(), 1e-30)
        )
        for value, content in zip(results, wanted, strict=True)
        if value in rounded.contents
    )


@dataclass
class Quantizer:
    """The graph being rewritten. A root value of the old graph may have an int8 form, its old float32 form, or both."""

    graph: Graph
    ranges: Mapping[Value, Quantization]
    readers: Mapping[Value, list[Node]]
    place: str = ""
    merged: set[int] = field(default_factory=set)  #: ids of nodes that an earlier rule took in
    _int8: dict[Value, Value] = field(default_factory=dict)
    _float_missing: set[Value] = field(default_factory=set)

    def has_int8(self, value: Value) -> bool:
        return value.root in self._int8

    def int8_of(self, value: Value) -> Value:
        """``value`` in int8, quantised here if it is not yet."""
        root = value.root
        if root not in self._int8:
            self._int8[root] = self.fresh(root, self.ranges[root])
            self.graph.add("QUANTIZE", [root], [self._int8[root]], self.place)
        return self._int8[root].reshaped(value.dims)

    def float_of(self, value: Value) -> Value:
        """``value`` in float32, converted here if it only has an int8 form."""
        root = value.root
        if root in self._float_missing:
            self._float_missing.discard(root)
            self.graph.add("DEQUANTIZE", [self._int8[root]], [root], self.place)
        return value

    def define(self, value: Value, quantization: Quantization | None = None) -> Value:
        """The int8 form that the rule at hand is about to write for an old result."""
        root = value.root
        self._int8[root] = self.fresh(root, quantization or self.ranges[root])
        self._float_missing.add(root)
        return self._int8[root].reshaped(value.dims)

    def fresh(self, value: Value, quantization: Quantization) -> Value:
        return Value(
            value.dims,
            DType.I8,
            batched=value.batched,
            name=value.name,
            scale=quantization.scale,
            zero_point=quantization.zero_point,
        )

    def merge_activation(self, node: Node) -> tuple[Value, Activation]:
        """The result of ``node`` with a ReLU that alone reads it taken in."""
        result = node.outputs[0]
        readers = self.readers.get(result.root, [])
        if (
            len(readers) == 1
            and readers[0].op == "UNARY"
            and result.root not in map(_root, self.graph.outputs.values())
        ):
            kind = Activation(int(readers[0].attrs["kind"]))
            if kind in (Activation.RELU, Activation.RELU6) and readers[0].outputs[0].root in self.ranges:
                self.merged.add(id(readers[0]))
                return readers[0].outputs[0], kind
        return result, Activation.NONE


# --------------------------------------------------------------------------------------------------------------- rules
# A rule returns whether it made an integer node; otherwise the float32 node stays.


def _linear(q: Quantizer, node: Node) -> bool:
    return _weighted(q, node, "QLINEAR", {})


def _conv2d(q: Quantizer, node: Node) -> bool:
    return _weighted(q, node, "QCONV2D", {name: value for name, value in node.attrs.items() if name != "activation"})


def _is_quantised_layer(node: Node) -> bool:
    return node.op in ("LINEAR", "CONV2D") and all(value.root.region == Region.CONST for value in node.inputs[1:])


def _weighted(q: Quantizer, node: Node, op: str, attrs: dict[str, int | float]) -> bool:
    if not _is_quantised_layer(node):
        return False
    x = q.int8_of(node.inputs[0])
    y = q.define(node.outputs[0])
    weight = node.inputs[1].content.astype(np.float64)
    bias = node.inputs[2].content.astype(np.float64) if len(node.inputs) > 2 else np.zeros(len(weight))
    stored, offset, multiplier = quantize_weights(weight, bias, x, y)
    name = node.inputs[1].name
    operands = [x, constant(stored, name), constant(offset, f"{name} bias"), constant(multiplier, f"{name} scale")]
    lo, hi = _limits(y, Activation(int(node.attrs["activation"])))
    q.graph.add(op, operands, [y], q.place, **attrs, lo=lo, hi=hi).source = node
    return True


def quantize_weights(
    weight: npt.NDArray[np.float64], bias: npt.NDArray[np.float64], x: Value, y: Value
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """int8 weights ``[O, ...]``, the int32 bias ``[O]`` with x's zero point folded in, and the multiplier ``[O]``."""
    rows = weight.reshape(len(weight), -1)
    scale = np.abs(rows).max(axis=1) / 127
    scale = np.maximum(scale, np.abs(bias) / (_MOST_BIAS * x.scale))
    scale[scale <= 0] = 1.0
    stored = np.clip(np.rint(rows / scale[:, None]), -127, 127)
    offset = np.rint(bias / (scale * x.scale)) - x.zero_point * stored.sum(axis=1)
    multiplier = scale * x.scale / y.scale
    return (
        stored.astype(np.int8).reshape(weight.shape),
        offset.astype(np.int32),
        multiplier.astype(np.float32),
    )


def _max_pool(q: Quantizer, node: Node) -> bool:
    if not q.has_int8(node.inputs[0]):
        return False
    x = q.int8_of(node.inputs[0])
    q.graph.add("QMAX_POOL2D", [x], [q.define(node.outputs[0], _same(x))], q.place, **node.attrs)
    return True


def _avg_pool(q: Quantizer, node: Node) -> bool:
    if not q.has_int8(node.inputs[0]):
        return False
    x, y = q.int8_of(node.inputs[0]), q.define(node.outputs[0])
    q.graph.add("QAVG_POOL2D", [x], [y], q.place, **node.attrs, ratio=x.scale / y.scale)
    return True


def _reduce_mean(q: Quantizer, node: Node) -> bool:
    if not q.has_int8(node.inputs[0]):
        return False
    x, y = q.int8_of(node.inputs[0]), q.define(node.outputs[0])
    size, inner = int(node.attrs["axis_size"]), int(node.attrs["inner_size"])
    outer = x.elements // (size * inner)
    window = {"kernel_h": size, "kernel_w": 1, "stride_h": size, "stride_w": 1, "pad_top": 0, "pad_left": 0}
    image, result = x.reshaped((outer, size, 1, inner)), y.reshaped((outer, 1, 1, inner))
    q.graph.add("QAVG_POOL2D", [image], [result], q.place, **window, count_include_pad=0, ratio=x.scale / y.scale)
    return True


def _add(q: Quantizer, node: Node) -> bool:
    a, b = node.inputs
    full = a.batched == b.batched and a.elements == b.elements
    if not full or not (q.has_int8(a) and q.has_int8(b)):
        return False
    result, activation = q.merge_activation(node)
    left, right, y = q.int8_of(a), q.int8_of(b), q.define(result)
    lo, hi = _limits(y, activation)
    scales = {"scale_a": left.scale / y.scale, "scale_b": right.scale / y.scale}
    q.graph.add("QADD", [left, right], [y.reshaped(left.dims)], q.place, **scales, lo=lo, hi=hi)
    return True


def _table(q: Quantizer, node: Node) -> bool:
    """Any function of one element is a table of 256 results."""
    if not q.has_int8(node.inputs[0]):
        return False
    x, y = q.int8_of(node.inputs[0]), q.define(node.outputs[0])
    inputs = (np.arange(-128, 128, dtype=np.float64) - x.zero_point) * x.scale
    tensor = Tensor(DType.F32, Region.ARENA, (256,), 0)
    call = Call(((256,),), (tensor,), (tensor,), Clock(0.0, 1, 0))
    results = np.asarray(KERNELS[node.op](call, inputs, **node.attrs), np.float64)
    q.graph.add("QLUT", [x, _stored(results, y)], [y], q.place).source = node
    return True


def _move(q: Quantizer, node: Node) -> bool:
    readers = q.readers.get(node.outputs[0].root, [])
    wanted = bool(readers) and all(_is_quantised_layer(reader) for reader in readers)
    if not q.has_int8(node.inputs[0]) and not wanted:
        return False  # else the input is quantised first: a quarter of the bytes move
    x = q.int8_of(node.inputs[0])
    q.graph.add(node.op, [x], [q.define(node.outputs[0], _same(x))], q.place, **node.attrs)
    return True


def _concat(q: Quantizer, node: Node) -> bool:
    if not all(q.has_int8(value) for value in node.inputs):
        return False
    y = q.define(node.outputs[0])
    parts = [_requantized(q, q.int8_of(value), y) for value in node.inputs]
    q.graph.add("CONCAT", parts, [y], q.place, **node.attrs)
    return True


def _requantized(q: Quantizer, x: Value, like: Value) -> Value:
    """``x`` on the grid of ``like``."""
    if (x.scale, x.zero_point) == (like.scale, like.zero_point):
        return x
    y = q.fresh(x, _same(like))
    reals = (np.arange(-128, 128, dtype=np.float64) - x.zero_point) * x.scale
    q.graph.add("QLUT", [x, _stored(reals, y)], [y], q.place)
    return y


RULES: Mapping[str, Callable[[Quantizer, Node], bool]] = {
    "LINEAR": _linear,
    "CONV2D": _conv2d,
    "MAX_POOL2D": _max_pool,
    "AVG_POOL2D": _avg_pool,
    "REDUCE_MEAN": _reduce_mean,
    "ADD": _add,
    "UNARY": _table,
    "SCALE": _table,
    "TRANSPOSE": _move,
    "SLICE": _move,
    "COPY": _move,
    "CONCAT": _concat,
}


# ------------------------------------------------------------------------------------------------------------- helpers


def _keep(q: Quantizer, node: Node) -> None:
    """The float32 node as it was, behind conversions of its operands."""
    node.inputs = [q.float_of(value) if value.dtype == DType.F32 else value for value in node.inputs]
    q.graph.nodes.append(node)


def _frozen_nodes(graph: Graph, trainable: set[Value]) -> list[Node]:
    reached = graph.reached(trainable)
    return [node for node in graph.nodes if all(value.root not in reached for value in (*node.inputs, *node.outputs))]


def _drop_frozen_dropout(graph: Graph, frozen: list[Node]) -> None:
    """A quantised body is fixed, in training as well."""
    for node in [n for n in frozen if n.op == "DROPOUT"]:
        frozen.remove(node)
        graph.nodes.remove(node)
        graph.replace(node.outputs[0], node.inputs[0])


def _share_ranges_of_joined(frozen: list[Node], ranges: dict[Value, Quantization], graph: Graph) -> None:
    """What is joined takes the joint's grid where its maker can write any grid: no requantisation then."""
    makers = {value.root: node for node in frozen for value in node.outputs}
    readers = graph.readers()
    for node in [n for n in frozen if n.op == "CONCAT"]:
        for value in node.inputs:
            maker = makers.get(value.root)
            scales = maker is not None and maker.op in ("LINEAR", "CONV2D", "AVG_POOL2D", "REDUCE_MEAN", "ADD", "UNARY")
            if scales and len(readers[value.root]) == 1:
                ranges[value.root] = ranges[node.outputs[0].root]


def _limits(y: Value, activation: Activation) -> tuple[int, int]:
    """The clamp that does what ``activation`` does."""
    lo = y.zero_point if activation in (Activation.RELU, Activation.RELU6) else -128
    hi = round(6 / y.scale) + y.zero_point if activation == Activation.RELU6 else 127
    return lo, min(hi, 127)


def _stored(reals: npt.NDArray[np.float64], y: Value) -> Value:
    known = np.nan_to_num(reals / y.scale)  # a function may not be defined for all inputs that a byte can tell
    table = np.clip(np.rint(known) + y.zero_point, -128, 127).astype(np.int8)
    return constant(table, "table")


def _same(value: Value) -> Quantization:
    return Quantization(value.scale, value.zero_point)


def _root(value: Value) -> Value:
    return value.root
