"""Training in int8: which layers, what they keep beside the model, and the forward pass in integers.

Weights are int8 without a float32 master, activations and gradients int8 with scales that the program moves (Lin et
al., *On-device training under 256KB memory*, NeurIPS 2022; docs/artifact.md has the arithmetic). The backward pass is
in ``int8_backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from evensong.mobile_runtime.compiler.calibrate import Calibrator, PostTrainingInt8, quantization
from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Data, Graph, Node, Value
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.scaled import quantize_weight
from evensong.wire.program import Activation, DType, Region, VariableFlag

SCALES = "quantization.scales"  #: the variable that holds the scales of all activations
_MOST_PRODUCTS = 1 << 16
_EXAMPLES = 256  #: calibration examples that the first scales come from
_RELU = (Activation.RELU, Activation.RELU6)


@dataclass(frozen=True)
class Int8Training:
    """Linear layers and convolutions train in int8: for ``compile(quantize=...)``.

    What is frozen runs in int8 as with :class:`PostTrainingInt8`; what is trainable and not among ``layers``, or has no
    integer form, trains in float32 between conversions. Batch norms are folded into the layers before them and trained
    as part of these.

    Args:
        calibration: examples like those the model will see, as for :class:`PostTrainingInt8`; they give the first
            scales of activations, which training then moves.
        layers: patterns of the names of weights to train in int8; all by default.
        rounding: ``"compensated"`` keeps eight more bits of each weight, so that no small step is lost;
            ``"stochastic"`` keeps none, and rounds each step up or down at random with the right mean.
        grow: factor of a scale whose range was full in a step.
        shrink: the least factor of a scale whose range was not.
    """

    calibration: Any
    layers: Sequence[str] = ("*",)
    rounding: Literal["compensated", "stochastic"] = "compensated"
    grow: float = 1.25
    shrink: float = 0.99

    def __post_init__(self) -> None:
        if self.rounding not in ("compensated", "stochastic"):
            raise CompileError("unknown rounding", expected="compensated or stochastic", got=self.rounding)
        if not (self.grow > 1 and 0 < self.shrink <= 1):
            raise CompileError("scales cannot move like that", expected="grow > 1 and 0 < shrink <= 1", got=self)

    def calibrator(self, inputs: Sequence[Value]) -> Calibrator:
        """For ``compile``: the frozen part is quantised after training, by these examples."""
        return PostTrainingInt8(self.calibration).calibrator(inputs)


@dataclass(frozen=True)
class Layer:
    """A layer that trains in int8: its weight and scales, and the residual of compensated steps."""

    weight: Value
    scale: Value
    residual: Value | None
    bias: Value | None = None


@dataclass
class Int8State:
    """What all programs of one artifact share."""

    settings: Int8Training
    weights: Weights
    chosen: dict[Value, Layer] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  #: of values by what they are, on examples
    entries: dict[str, int] = field(default_factory=dict)  #: places in the table of scales
    first_scales: list[float] = field(default_factory=list)
    layers: dict[Node, Layer] = field(default_factory=dict)  #: of quantised nodes
    scales: Value = field(default_factory=lambda: Value((1,), region=Region.STATE, name=SCALES))
    peaks: Value = field(default_factory=lambda: Value((1,), region=Region.SLOTS, name="peaks of activations"))
    gradients: Value = field(default_factory=lambda: Value((1, 2), region=Region.SLOTS, name="scales of gradients"))
    _gradients: int = 0
    _streams: int = 1 << 16  # dropout counts from 0

    def entry(self, key: str, limit: int, fixed: float | None = None) -> int:
        """The place of the scale of ``key``, which is made at its first use."""
        if key not in self.entries:
            low, high = self.ranges[key]
            largest = max(abs(low), abs(high)) if limit == 127 else max(high, 0.0)
            self.entries[key] = len(self.entries)
            self.first_scales.append(fixed or max(largest, 1e-6) / limit)
        return self.entries[key]

    def next_gradient(self) -> int:
        self._gradients += 1
        return self._gradients - 1

    def next_stream(self) -> int:
        self._streams += 1
        return self._streams

    def finish(self) -> None:
        """Once all programs are made: the tables get their sizes."""
        count = max(1, len(self.first_scales))
        self.scales.dims = self.peaks.dims = (count,)
        self.scales.data = np.array(self.first_scales or [1.0], np.float32)
        self.gradients.dims = (max(1, self._gradients), 2)


def prepare_int8(settings: Int8Training, weights: Weights, graph: Graph, calibrator: Calibrator) -> Int8State:
    """Chooses the layers, measures all ranges on the simplified float32 inference ``graph``, and stores the chosen
    weights in int8, for every program.

    Raises :class:`CompileError` if nothing is left to train in int8.
    """
    state = Int8State(settings, weights)
    run = Interpreter(dict(zip(graph.inputs.values(), calibrator.examples(_EXAMPLES), strict=True)))
    for node in graph.nodes:
        run.run(node)
    readers = graph.readers()
    for port, value in graph.inputs.items():
        state.ranges[f"port {port}"] = _range(run.contents[value])
    for key, value in _named_values(graph):
        state.ranges[key] = _range(run.content(value))
    for node in graph.nodes:
        if node.op not in ("LINEAR", "CONV2D"):
            continue
        weight = node.inputs[1].root
        wanted = any(fnmatchcase(weight.name, pattern) for pattern in settings.layers)
        if wanted and weight.region == Region.STATE and readers[weight] == [node] and _fits(node):
            state.chosen[weight] = _stored_in_int8(state, weight)
    if not state.chosen:
        raise CompileError(
            "no layer is left to train in int8", expected="a trainable linear layer or convolution", got=settings.layers
        )
    weights.add(state.scales, VariableFlag.BUFFER)
    return state


def train_in_int8(graph: Graph, state: Int8State, *, training: bool, batch: int) -> None:
    """Rewrites the forward pass of one program: chosen layers and what lies between them in integers."""
    _Converter(graph, state, training, batch).run()


# --------------------------------------------------------------------------------------------------------------- choice


def _fits(node: Node) -> bool:
    weight = node.inputs[1]
    depth, taps = weight.elements // weight.dims[0], int(np.prod(weight.dims[1:-1]))
    return max(depth, weight.dims[0] * taps) <= _MOST_PRODUCTS and weight.dims[0] == weight.root.dims[0]


def _stored_in_int8(state: Int8State, weight: Value) -> Layer:
    stored, scale, _ = quantize_weight(np.asarray(weight.content, np.float32))
    weight.data, weight.dtype = stored, DType.I8
    scales = Value(scale.shape, region=Region.STATE, name=f"{weight.name}.scale", data=scale)
    state.weights.add(scales, VariableFlag.BUFFER | VariableFlag.SCALE)
    residual = None
    if state.settings.rounding == "compensated":
        residual = Value(weight.dims, DType.I8, Region.SLOTS, name=f"{weight.name} residual")
    return Layer(weight, scales, residual)


def _range(content: Data) -> tuple[float, float]:
    return float(content.min()), float(content.max())


def _named_values(graph: Graph) -> list[tuple[str, Value]]:
    """What may need a scale, by names that are the same in every program of the model."""
    found = []
    sums = 0
    for node in graph.nodes:
        if node.op in ("LINEAR", "CONV2D"):
            name = node.inputs[1].root.name
            found += [(name, node.outputs[0]), (f"input of {name}", node.inputs[0])]
        elif node.op == "ADD":
            found.append((f"sum {sums}", node.outputs[0]))
            sums += 1
    return found


# -------------------------------------------------------------------------------------------------------------- forward


class _Converter:
    """One graph being rewritten. A root value of the old graph has its float32 form, an int8 form, or both."""

    def __init__(self, graph: Graph, state: Int8State, training: bool, batch: int) -> None:
        self.graph, self.state, self.training, self.batch = graph, state, training, batch
        self.readers = graph.readers()
        self.place = ""
        self._int8: dict[Value, Value] = {}
        self._float_missing: set[Value] = set()
        self._merged: dict[Node, Value] = {}  # activations that a layer before them does -> the value that it bounds
        self._sums = 0
        self.ports = {value: name for name, value in graph.inputs.items()}
        self._outputs = {value.root for value in graph.outputs.values()}

    def run(self) -> None:
        nodes, self.graph.nodes = self.graph.nodes, []
        for node in nodes:
            self.place = node.place
            rule = _RULES.get(node.op)
            if node.op == "DEQUANTIZE":
                self._take_frozen(node)
            if rule is None or not rule(self, node):
                node.inputs = [self.float_of(value) for value in node.inputs]
                self.graph.nodes.append(node)
            if node.op == "ADD":
                self._sums += 1
        for name, value in self.graph.outputs.items():
            self.graph.outputs[name] = self.float_of(value)

    def has_int8(self, value: Value) -> bool:
        return value.root in self._int8

    def int8_of(self, value: Value, key: str) -> Value:
        """``value`` in int8; where it is float32 it is quantised here, under the scale of ``key``."""
        root = value.root
        if root not in self._int8:
            port = self.ports.get(root)
            if port is None:
                made = self.fresh(root, key, zero_point=0)
            else:  # its range is that of the examples: it does not move with training
                low, high = self.state.ranges[f"port {port}"]
                grid = quantization(low, high)
                made = self.fresh(root, f"port {port}", zero_point=grid.zero_point, fixed=grid.scale)
            self.add("Q_QUANTIZE", [self.float_of(root), self.state.scales], [made], index=made.entry)
            if port is None:
                self.observe(made)
            self._int8[root] = made
        return self._int8[root].reshaped(value.dims)

    def float_of(self, value: Value) -> Value:
        root = value.root
        if root in self._float_missing:
            self._float_missing.discard(root)
            stored = self._int8[root]
            self.add("Q_DEQUANTIZE", [stored, self.state.scales], [root], index=stored.entry)
        return value

    def define(self, value: Value, stored: Value) -> None:
        """``stored`` is the int8 form of an old result."""
        self._int8[value.root] = stored
        self._float_missing.add(value.root)

    def fresh(self, like: Value, key: str, *, zero_point: int, fixed: float | None = None) -> Value:
        value = Value(like.dims, DType.I8, batched=like.batched, name=like.name, zero_point=zero_point)
        value.entry = self.state.entry(key, 255 if zero_point else 127, fixed)
        return value

    def observe(self, value: Value) -> None:
        if self.training:
            limit = 255 if value.zero_point else 127
            self.add("Q_OBSERVE", [value, self.state.peaks], [], index=value.entry, limit=limit)

    def add(self, op: str, inputs: Sequence[Value], outputs: Sequence[Value], **attrs: int | float) -> Node:
        return self.graph.add(op, inputs, outputs, self.place, **attrs)

    def following_activation(self, node: Node) -> tuple[Node | None, Node | None]:
        """The ReLU that alone reads ``node``, maybe through one max pooling, and that pooling."""
        pool: Node | None = None
        while True:
            result = node.outputs[0].root
            readers = self.readers.get(result, [])
            if len(readers) != 1 or result in self._outputs:
                return None, None
            node = readers[0]
            if node.op == "UNARY" and node.attrs["kind"] in _RELU:
                return node, pool
            if node.op != "MAX_POOL2D" or pool is not None or not self.takes_pool(node):
                return None, None
            pool = node

    def takes_pool(self, node: Node) -> bool:
        apart = all(node.attrs[f"stride_{axis}"] >= node.attrs[f"kernel_{axis}"] for axis in "hw")
        return apart or not self.training

    def merge(self, activation: Node, bounded: Value) -> None:
        self._merged[activation] = bounded

    def merged(self, activation: Node) -> bool:
        return activation in self._merged

    def _take_frozen(self, node: Node) -> None:
        """What a frozen int8 part hands over keeps its grid, as a scale that does not move."""
        stored, root = node.inputs[0].root, node.outputs[0].root
        key = f"frozen {stored.name} {stored.scale} {stored.zero_point}"
        self.state.ranges[key] = (0.0, 0.0)
        stored.entry = self.state.entry(key, 127, stored.scale)
        self._int8[root] = stored


# --------------------------------------------------------------------------------------------------------------- rules
# A rule returns whether it made integer nodes; otherwise the float32 node stays.


def _layer(c: _Converter, node: Node) -> bool:
    weight = node.inputs[1]
    chosen = c.state.chosen.get(weight.root)
    if chosen is None:
        return False
    x = c.int8_of(node.inputs[0], f"input of {weight.name}")
    _check_rows(c, node, weight.name)
    activation, pool = Activation(int(node.attrs["activation"])), None
    if activation == Activation.NONE:
        unary, pool = c.following_activation(node)
        if unary is not None:
            activation = Activation(int(unary.attrs["kind"]))
            c.merge(unary, node.outputs[0])
    zero_point = -128 if activation in _RELU else 0
    fixed = 6 / 255 if activation == Activation.RELU6 else None
    y = c.fresh(node.outputs[0], weight.name, zero_point=zero_point, fixed=fixed)
    if zero_point and pool is None:
        y.bounds = _bounds(activation)
    outputs = weight.dims[0]
    layer = Layer(chosen.weight, chosen.scale, chosen.residual, node.inputs[2] if len(node.inputs) > 2 else None)
    bias, multiplier = Value((outputs,), DType.I32, name=c.place), Value((outputs,), name=c.place)
    rows = weight.reshaped((outputs, weight.elements // outputs))
    operands = [rows, chosen.scale, c.state.scales, *node.inputs[2:]]
    c.add("Q_PREPARE", operands, [bias, multiplier], x=x.root.entry, y=y.entry, zero_point=x.root.zero_point)
    geometry = {name: value for name, value in node.attrs.items() if name != "activation"}
    limits = {"lo": -128 if zero_point else -127, "hi": 127}
    made = c.add(f"Q{node.op}", [x, weight, bias, multiplier], [y], **geometry, **limits)
    c.state.layers[made] = layer
    if fixed is None:
        c.observe(y)
    c.define(node.outputs[0], y)
    return True


def _check_rows(c: _Converter, node: Node, name: str) -> None:
    y = node.outputs[0]
    rows = y.elements // y.dims[-1] * (c.batch if y.batched else 1)
    if c.training and rows > _MOST_PRODUCTS:
        raise CompileError(
            f"a batch is too large to train {name!r} in int8: its gradient adds up {rows:,} products",
            expected=f"at most {_MOST_PRODUCTS:,}",
            got=f"batch_size={c.batch}",
            fix=f"Use batch_size={c.batch * _MOST_PRODUCTS // rows} or less, or train that layer in float32.",
        )


def _bounds(activation: Activation) -> tuple[int, int]:
    return (-128, 127) if activation == Activation.RELU6 else (-128, 128)


def _max_pool(c: _Converter, node: Node) -> bool:
    if not c.has_int8(node.inputs[0]) or not c.takes_pool(node):
        return False
    x = c.int8_of(node.inputs[0], "")
    y = _like(node.outputs[0], x)
    readers = c.readers.get(node.outputs[0].root, [])
    if len(readers) == 1 and c.merged(readers[0]):
        y.bounds = _bounds(Activation(int(readers[0].attrs["kind"])))
    c.add("QMAX_POOL2D", [x], [y], **node.attrs)
    c.define(node.outputs[0], y)
    return True


def _unary(c: _Converter, node: Node) -> bool:
    if not c.merged(node):
        return False
    c.define(node.outputs[0], c.int8_of(node.inputs[0], "").root)
    return True


def _add(c: _Converter, node: Node) -> bool:
    a, b = node.inputs
    full = a.batched == b.batched and a.elements == b.elements
    if not full or not (c.has_int8(a) and c.has_int8(b)):
        return False
    unary, pool = c.following_activation(node)
    merges = unary is not None and pool is None and unary.attrs["kind"] == Activation.RELU
    y = c.fresh(node.outputs[0], f"sum {c._sums}", zero_point=-128 if merges else 0)
    if merges and unary is not None:
        y.bounds = _bounds(Activation.RELU)
        c.merge(unary, node.outputs[0])
    left, right = c.int8_of(a, ""), c.int8_of(b, "")
    entries = {"a": left.root.entry, "b": right.root.entry, "y": y.entry}
    lo = -128 if merges else -127
    c.add("Q_ADD", [left, right.reshaped(left.dims), c.state.scales], [y.reshaped(left.dims)], **entries, lo=lo, hi=127)
    c.observe(y)
    c.define(node.outputs[0], y)
    return True


def _move(c: _Converter, node: Node) -> bool:
    readers = c.readers.get(node.outputs[0].root, [])
    feeds_layers = bool(readers) and all(
        reader.inputs[1].root in c.state.chosen for reader in readers if reader.inputs[1:]
    )
    is_port = node.inputs[0].root in c.ports and all(len(reader.inputs) > 1 for reader in readers)
    if not c.has_int8(node.inputs[0]) and not (is_port and feeds_layers):
        return False  # else the input is quantised first: a quarter of the bytes move
    x = c.int8_of(node.inputs[0], "")
    y = _like(node.outputs[0], x)
    c.add(node.op, [x], [y], **node.attrs)
    c.define(node.outputs[0], y)
    return True


def _like(value: Value, x: Value) -> Value:
    made = Value(value.dims, DType.I8, batched=value.batched, name=value.name, zero_point=x.root.zero_point)
    made.entry = x.root.entry
    return made


_RULES: Mapping[str, Callable[[_Converter, Node], bool]] = {
    "LINEAR": _layer,
    "CONV2D": _layer,
    "MAX_POOL2D": _max_pool,
    "UNARY": _unary,
    "ADD": _add,
    "TRANSPOSE": _move,
    "COPY": _move,
    "SLICE": _move,
}
