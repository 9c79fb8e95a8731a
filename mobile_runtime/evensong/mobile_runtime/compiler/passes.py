"""Rewrites that make a forward pass smaller or faster before its gradient is derived. Each takes a graph and edits
it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.bytes_first import move_bytes_first
from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, constant
from evensong.wire.program import OPS, Activation, Region

_WEIGHTED = ("LINEAR", "CONV2D")
_MONOTONE = (Activation.RELU, Activation.RELU6)


def simplify(graph: Graph, trained: Callable[[Value], bool]) -> None:
    """All rewrites. ``trained(value)`` tells whether the backward pass will go through ``value``."""
    fold_frozen_batch_norm(graph)
    fold_transposes(graph)
    fold_padding(graph)
    move_bytes_first(graph)
    pool_before_activation(graph, trained)
    fuse_activations(graph)
    remove_dead(graph)


def fold_frozen_batch_norm(graph: Graph) -> None:
    """A frozen batch norm behind a frozen convolution or linear layer becomes part of its weights; a shift that is
    trained stays, as a row to add."""
    readers, producers = graph.readers(), graph.producers()
    for node in [n for n in graph.nodes if n.op == "BATCH_NORM_EVAL"]:
        x, *statistics = node.inputs
        layer = producers.get(x.root)
        gamma, beta, mean, var = statistics
        frozen = all(value.region == Region.CONST for value in (gamma, mean, var))
        if layer is None or layer.op not in _WEIGHTED or not frozen or len(readers[x.root]) != 1:
            continue
        if layer.attrs["activation"] != Activation.NONE or any(v.region != Region.CONST for v in layer.inputs[1:]):
            continue
        factor = _wide(gamma) / np.sqrt(_wide(var) + node.attrs["eps"])
        weight = _wide(layer.inputs[1])
        bias = _wide(layer.inputs[2]) if len(layer.inputs) > 2 else 0.0
        shift = _wide(beta) if beta.region == Region.CONST else 0.0
        scaled = weight * factor.reshape((-1,) + (1,) * (weight.ndim - 1))
        layer.inputs[1:] = [
            constant(scaled.astype(np.float32), layer.inputs[1].name),
            constant(((bias - _wide(mean)) * factor + shift).astype(np.float32), f"{layer.inputs[1].name} bias"),
        ]
        if beta.region == Region.CONST:
            graph.nodes.remove(node)
            graph.replace(node.outputs[0], layer.outputs[0])
        else:
            graph.nodes[graph.nodes.index(node)] = Node("ADD", [x, beta], node.outputs, {}, node.place)


def fold_transposes(graph: Graph) -> None:
    """A transpose that only feeds frozen linear layers (the flatten behind a convolution) moves into their weights."""
    for node in [n for n in graph.nodes if n.op == "TRANSPOSE" and n.outputs[0].batched]:
        readers = graph.readers().get(node.outputs[0].root, [])
        source, result = node.inputs[0], node.outputs[0]
        rows, features = result.dims[0], result.elements // result.dims[0]
        if not readers or not all(_takes_flat(reader, result, rows, features) for reader in readers):
            continue
        perm = [int(axis) for axis in node.attrs.values() if axis >= 0]
        for reader in readers:
            weight = reader.inputs[1].content
            spatial = weight.reshape(weight.shape[0], *result.dims[1:])
            moved = spatial.transpose(0, *(perm.index(axis) for axis in range(1, len(perm))))
            reader.inputs[0] = source.reshaped((rows, features))
            reader.inputs[1] = constant(moved.reshape(weight.shape), reader.inputs[1].name)
        graph.nodes.remove(node)


def fold_padding(graph: Graph) -> None:
    """Zeros put around an image that only a convolution reads become its own padding."""
    for node in [n for n in graph.nodes if n.op == "CONV2D"]:
        while True:
            x = node.inputs[0]
            pad = graph.producers().get(x.root)
            if pad is None or pad.op != "SLICE_GRAD" or pad.attrs["axis"] not in (1, 2) or x.dims != x.root.dims:
                break
            if len(x.dims) != 4 or len(graph.readers()[x.root]) != 1:
                break
            side = "pad_top" if pad.attrs["axis"] == 1 else "pad_left"
            node.attrs = {**node.attrs, side: node.attrs[side] + pad.attrs["start"]}
            node.inputs[0] = pad.inputs[0]
            graph.nodes.remove(pad)


def pool_before_activation(graph: Graph, trained: Callable[[Value], bool]) -> None:
    """``pool(relu(x))`` is ``relu(pool(x))`` for max pooling: in training the activation and its gradient then touch
    fewer elements and the layer's full result need not be kept. In inference a fused activation is cheaper still."""
    readers = graph.readers()
    for pool in [n for n in graph.nodes if n.op == "MAX_POOL2D"]:
        activation = graph.producers().get(pool.inputs[0].root)
        if activation is None or activation.op != "UNARY" or activation.attrs["kind"] not in _MONOTONE:
            continue
        x, y = activation.inputs[0], pool.outputs[0]
        if len(readers[pool.inputs[0].root]) != 1 or len(readers[x.root]) != 1 or not trained(x):
            continue
        pool.inputs[0] = x.reshaped(pool.inputs[0].dims)
        pooled = y.like(name=pool.place)
        graph.nodes.remove(activation)
        at = graph.nodes.index(pool) + 1
        pool.outputs[0] = pooled
        graph.nodes.insert(at, Node("UNARY", [pooled], [y], activation.attrs, activation.place))


def fuse_activations(graph: Graph) -> None:
    """ReLU and ReLU6 behind a linear layer or a convolution become its ``activation``."""
    readers, producers = graph.readers(), graph.producers()
    for node in [n for n in graph.nodes if n.op == "UNARY" and n.attrs["kind"] in _MONOTONE]:
        layer = producers.get(node.inputs[0].root)
        if layer is None or layer.op not in _WEIGHTED or len(readers[node.inputs[0].root]) != 1:
            continue
        if layer.attrs["activation"] != Activation.NONE:
            continue
        layer.attrs = {**layer.attrs, "activation": node.attrs["kind"]}
        graph.nodes.remove(node)
        graph.replace(node.outputs[0], layer.outputs[0])


def pointwise_as_linear(graph: Graph) -> None:
    """A float32 convolution of single pixels is a linear layer over them: that needs no patches, hence less workspace
    and time, and its weight can be updated without its gradient being stored."""
    for node in graph.nodes:
        if node.op != "CONV2D":
            continue
        w = node.inputs[1]
        moved = [node.attrs[name] for name in ("pad_top", "pad_left")]
        if w.dims[1:3] != (1, 1) or any(moved) or any(node.attrs[n] != 1 for n in ("stride_h", "stride_w", "groups")):
            continue
        node.op, node.attrs = "LINEAR", {"activation": node.attrs["activation"]}
        node.inputs[1] = w.reshaped((w.dims[0], w.dims[3]))


def remove_dead(graph: Graph) -> None:
    """Drops nodes whose results nobody reads and that update nothing."""
    live = {value.root for value in graph.outputs.values()}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if OPS[node.op].updates or any(value.root in live for value in node.outputs):
            kept.append(node)
            live |= {value.root for value in node.inputs}
    graph.nodes = kept[::-1]


def _wide(value: Value) -> npt.NDArray[np.float64]:
    return value.content.astype(np.float64)


def _takes_flat(reader: Node, result: Value, rows: int, features: int) -> bool:
    return (
        reader.op == "LINEAR"
        and reader.inputs[0].root is result.root
        and reader.inputs[0].dims == (rows, features)
        and reader.inputs[1].region == Region.CONST
    )
