"""The backward rules of int8 training: gradients in int8, and steps of weights as soon as their gradients are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evensong.mobile_runtime.compiler.ir import Node, Value
from evensong.wire.program import DType

_MOST_COPIES = 200  #: parts of a CONCAT, which has at most 255 operands

if TYPE_CHECKING:
    from evensong.mobile_runtime.compiler.autodiff import Backward
    from evensong.mobile_runtime.compiler.int8_training import Int8State


def layer(g: Backward, node: Node) -> None:
    """QLINEAR and QCONV2D with a weight that trains."""
    state = _state(g)
    known = state.layers.get(node)
    if known is None:
        return  # a frozen layer: nothing trainable lies behind it
    (x, weight, _, _), (y,) = node.inputs, node.outputs
    kind = "LINEAR" if node.op == "QLINEAR" else "CONV2D"
    geometry = {name: value for name, value in node.attrs.items() if name not in ("lo", "hi")}
    scaled = _scaled(g, _masked(g, y), known.scale)
    source = scaled.root.entry
    if known.bias is not None and g.wants(known.bias):
        db = g.fresh(known.bias)
        rows = scaled.reshaped((scaled.elements // known.scale.elements, known.scale.elements))
        g.graph.add("G_BIAS", [rows, known.scale, state.gradients], [db], g.place, **{"from": source})
        g.accumulate(known.bias, db)
    if g.wants(x):
        dx = _gradient(state, x)
        attrs = {**geometry, "from": source, "to": dx.entry, "stream": state.next_stream()}
        g.graph.add(f"G_{kind}_INPUT", [scaled, weight, state.gradients], [dx], g.place, **attrs)
        g.accumulate(x, dx)
    operands = [weight, scaled, x, known.scale, state.scales, state.gradients]
    operands += [known.residual] if known.residual is not None else []
    attrs = {"from": source, "entry": x.root.entry, "weight_decay": g.weight_decay, "stream": state.next_stream()}
    g.graph.add(f"G_{kind}_UPDATE", operands, [], known.weight.name, **geometry, **attrs)


def dequantize(g: Backward, node: Node) -> None:
    """Q_DEQUANTIZE: a float32 gradient meets an int8 value."""
    x, dy = node.inputs[0], g.of(node.outputs[0])
    spread = g.graph.nodes[-1]
    if (
        spread.op == "REDUCE_MEAN_GRAD"
        and spread.outputs[0].root is dy.root
        and spread.attrs["axis_size"] <= _MOST_COPIES
    ):
        g.graph.nodes.pop()
        g.accumulate(x, _spread(g, x, spread))
    else:
        g.accumulate(x, _quantized(g, dy))


def _quantized(g: Backward, dy: Value) -> Value:
    state = _state(g)
    made = _gradient(state, dy)
    attrs = {"index": made.entry, "stream": state.next_stream()}
    g.graph.add("G_QUANTIZE", [dy, state.gradients], [made], g.place, **attrs)
    return made


def _spread(g: Backward, x: Value, node: Node) -> Value:
    """The gradient of a mean: quantised before it is copied to every place of the axis."""
    size, inner = int(node.attrs["axis_size"]), int(node.attrs["inner_size"])
    dy = node.inputs[0]
    share = g.emit("SCALE", [dy], dy, alpha=1 / size, beta=0.0)
    outer = dy.elements // inner
    one = _quantized(g, share).reshaped((outer, 1, inner))
    copies = Value((outer, size, inner), DType.I8, batched=x.batched, name=f"gradient of {x.name}")
    copies.entry = one.root.entry
    g.graph.add("CONCAT", [one] * size, [copies], g.place, axis=1)
    return copies


def quantize(g: Backward, node: Node) -> None:
    """Q_QUANTIZE: an int8 gradient meets a float32 value."""
    x, dy = node.inputs[0], g.of(node.outputs[0])
    dx = g.fresh(x)
    g.graph.add("G_DEQUANTIZE", [dy, _state(g).gradients], [dx], g.place, index=dy.root.entry)
    g.accumulate(x, dx)


def max_pool(g: Backward, node: Node) -> None:
    """QMAX_POOL2D: the gradient goes to the first maximum of each window."""
    (x,), y = node.inputs, node.outputs[0]
    if len(node.outputs) == 1:
        places = int(node.attrs["kernel_h"] * node.attrs["kernel_w"])
        dtype = DType.U8 if places <= 256 else DType.I32
        node.outputs.append(Value(y.dims, dtype, batched=y.batched, name=f"index of {node.place}"))
    dy = _masked(g, y)
    dx = _like(x, dy)
    g.graph.add("G_MAX_POOL2D", [dy, node.outputs[1]], [dx], g.place, **node.attrs)
    g.accumulate(x, dx)


def add(g: Backward, node: Node) -> None:
    """Q_ADD: both terms get the gradient of the sum."""
    dy = _masked(g, node.outputs[0])
    for term in node.inputs[:2]:
        if g.wants(term):
            g.accumulate(term, dy)


def sum_of(g: Backward, first: Value, second: Value) -> Value:
    """Two gradients of one int8 value."""
    state = _state(g)
    total = _gradient(state, first)
    entries = {"a": first.root.entry, "b": second.root.entry, "to": total.entry}
    operands = [first, second, state.gradients]
    g.graph.add("G_ADD", operands, [total], g.place, **entries, stream=state.next_stream())
    return total


def _masked(g: Backward, y: Value) -> Value:
    """The gradient of ``y`` before the activation that its layer has taken in."""
    dy, bounds = g.of(y), y.root.bounds
    if bounds is None:
        return dy
    made = _like(y, dy)
    g.graph.add("G_MASK", [dy, y], [made], g.place, lo=bounds[0], hi=bounds[1])
    return made


def _scaled(g: Backward, dy: Value, scale: Value) -> Value:
    state = _state(g)
    made = _gradient(state, dy)
    attrs = {"from": dy.root.entry, "to": made.entry, "stream": state.next_stream()}
    g.graph.add("G_SCALE", [dy, scale, state.gradients], [made], g.place, **attrs)
    return made


def _gradient(state: Int8State, like: Value) -> Value:
    made = Value(like.dims, DType.I8, batched=like.batched, name=f"gradient of {like.name}")
    made.entry = state.next_gradient()
    return made


def _like(value: Value, gradient: Value) -> Value:
    made = Value(value.dims, DType.I8, batched=value.batched, name=f"gradient of {value.name}")
    made.entry = gradient.root.entry
    return made


def _state(g: Backward) -> Int8State:
    if g.int8 is None:
        raise AssertionError("an int8 operation that trains, without its state")
    return g.int8
