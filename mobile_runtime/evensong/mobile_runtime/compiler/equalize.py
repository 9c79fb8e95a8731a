"""Cross-layer equalisation: what a layer's output channel is divided by, the next layer's weights are multiplied by
(Nagel et al., *Data-free quantization through weight equalization and bias correction*, ICCV 2019).

Between two layers with nothing but a ReLU and what moves or pools elements, the model computes the same; channels that
were small for both grids are small for neither afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.compiler.ir import Graph, Node, Value, constant
from evensong.wire.program import Activation, Region

_SWEEPS = 20
_CONVERGED = 1e-3
_CHANNELS_STAY_LAST = ("MAX_POOL2D", "AVG_POOL2D", "REDUCE_MEAN", "UNARY")
_MOST_FACTOR = 1e3

Factors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Pair:
    first: Node
    second: Node


def equalize(graph: Graph, frozen: Sequence[Node]) -> bool:
    """Rewrites the frozen weights of ``graph``; returns whether there was anything to do."""
    pairs = _pairs(graph, frozen)
    for _ in range(_SWEEPS if pairs else 0):
        moved = max(_equalize_pair(pair) for pair in pairs)
        if moved < _CONVERGED:
            break
    return bool(pairs)


def _pairs(graph: Graph, frozen: Sequence[Node]) -> list[_Pair]:
    readers, allowed = graph.readers(), set(map(id, frozen))
    outputs = {value.root for value in graph.outputs.values()}
    found = []
    for first in frozen:
        if not _is_layer(first) or first.attrs["activation"] not in (Activation.NONE, Activation.RELU):
            continue
        value: Value = first.outputs[0]
        while True:
            following = readers.get(value.root, [])
            if len(following) != 1 or value.root in outputs or id(following[0]) not in allowed:
                break
            node = following[0]
            if _is_layer(node):
                if node.inputs[0].root is value.root and _columns(first, node) is not None:
                    found.append(_Pair(first, node))
                break
            if node.op not in _CHANNELS_STAY_LAST or not _keeps_channels(first, node):
                break
            value = node.outputs[0]
    return found


def _is_layer(node: Node) -> bool:
    return node.op in ("LINEAR", "CONV2D") and all(value.root.region == Region.CONST for value in node.inputs[1:])


def _keeps_channels(first: Node, node: Node) -> bool:
    channels = len(first.inputs[1].content)
    if node.op == "UNARY":
        return int(node.attrs["kind"]) == Activation.RELU
    if node.op == "REDUCE_MEAN":
        return int(node.attrs["inner_size"]) == channels
    return node.outputs[0].dims[-1] == channels


def _columns(first: Node, second: Node) -> int | None:
    """How often the first layer's channels repeat among the second's inputs; None where they cannot be told."""
    channels = len(first.inputs[1].content)
    weight = second.inputs[1].content
    if second.op == "LINEAR":
        return weight.shape[1] // channels if weight.shape[1] % channels == 0 else None
    if second.attrs["groups"] == 1:
        return 1 if weight.shape[-1] == channels else None
    return 1 if weight.shape[-1] == 1 and weight.shape[0] == channels == second.attrs["groups"] else None


def _equalize_pair(pair: _Pair) -> float:
    """Scales one pair; returns the largest change of a channel, as a share."""
    first, second = pair.first.inputs[1].content.astype(np.float64), pair.second.inputs[1].content.astype(np.float64)
    channels = len(first)
    is_depthwise = pair.second.op == "CONV2D" and pair.second.attrs["groups"] != 1
    inputs = second if is_depthwise else np.moveaxis(second.reshape(-1, channels), 1, 0)
    outgoing = np.abs(first.reshape(channels, -1)).max(axis=1)
    incoming = np.abs(inputs.reshape(channels, -1)).max(axis=1)
    alive = (outgoing > 0) & (incoming > 0)
    factors = np.ones(channels)
    factors[alive] = np.clip(np.sqrt(incoming[alive] / outgoing[alive]), 1 / _MOST_FACTOR, _MOST_FACTOR)
    _scale_outputs(pair.first, factors)
    if is_depthwise:
        scaled = second / factors.reshape((-1,) + (1,) * (second.ndim - 1))
    else:
        scaled = (second.reshape(-1, channels) / factors).reshape(second.shape)
    pair.second.inputs[1] = constant(scaled.astype(np.float32), pair.second.inputs[1].name)
    return float(np.abs(factors - 1).max())


def _scale_outputs(layer: Node, factors: Factors) -> None:
    weight = layer.inputs[1].content.astype(np.float64)
    scaled = weight * factors.reshape((-1,) + (1,) * (weight.ndim - 1))
    layer.inputs[1] = constant(scaled.astype(np.float32), layer.inputs[1].name)
    if len(layer.inputs) > 2:
        bias = layer.inputs[2].content.astype(np.float64) * factors
        layer.inputs[2] = constant(bias.astype(np.float32), layer.inputs[2].name)
