"""Frozen transposed convolutions as ordinary ones, which have an integer form (Shi et al., *Real-time single image and
video super-resolution using an efficient sub-pixel convolutional neural network*, CVPR 2016).

Along one axis with stride ``s``, output ``q s + a - padding`` is ``sum over j of w[a + s j] x[q - j]``: for each phase
``a`` an ordinary convolution over the small image, with every ``s``-th tap. One convolution computes all phases side by
side as channels; moving those between the pixels gives the large image.
"""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.compiler.ir import Data, Graph, Node, constant
from evensong.mobile_runtime.compiler.layout import transpose_attrs
from evensong.wire.program import Activation, Region


def as_subpixel_convolutions(graph: Graph, frozen: list[Node]) -> list[Node]:
    """Rewrites the transposed convolutions among ``frozen``, with the bias and the ReLU behind them.

    Returns ``frozen`` as it is then. Those with dilation or with several channels a group stay as they are.
    """
    for node in [node for node in frozen if _has_form(node)]:
        chain = _with_bias_and_relu(graph, node)
        made = _subpixel(chain)
        for nodes in (graph.nodes, frozen):
            at = nodes.index(node)
            nodes[at : at + 1] = made
            for merged in chain[1:]:
                nodes.remove(merged)
    return frozen


def _has_form(node: Node) -> bool:
    if node.op != "CONV2D_GRAD_INPUT" or node.inputs[1].root.region != Region.CONST:
        return False
    inputs, *_, outputs = node.inputs[1].dims
    groups, dilation = node.attrs["groups"], (node.attrs["dilation_h"], node.attrs["dilation_w"])
    return dilation == (1, 1) and (groups == 1 or (groups, outputs) == (inputs, 1))


def _with_bias_and_relu(graph: Graph, node: Node) -> list[Node]:
    chain = [node]
    for follows in (_adds_bias, _is_relu):
        following = _only_reader(graph, chain[-1])
        if following is not None and follows(following):
            chain.append(following)
    return chain


def _adds_bias(node: Node) -> bool:
    image, bias = node.inputs[0], node.inputs[-1]
    return node.op == "ADD" and bias.root.region == Region.CONST and bias.elements == image.dims[-1]


def _is_relu(node: Node) -> bool:
    return node.op == "UNARY" and node.attrs["kind"] in (Activation.RELU, Activation.RELU6)


def _only_reader(graph: Graph, node: Node) -> Node | None:
    made = node.outputs[0].root
    readers = graph.readers().get(made, [])
    is_result = made in {value.root for value in graph.outputs.values()}
    return readers[0] if len(readers) == 1 and not is_result else None


def _subpixel(chain: list[Node]) -> list[Node]:
    """The nodes that compute what ``chain`` computes."""
    node, place = chain[0], chain[0].place
    x, y = node.inputs[0], node.outputs[0]
    stride = int(node.attrs["stride_h"]), int(node.attrs["stride_w"])
    padding = int(node.attrs["pad_top"]), int(node.attrs["pad_left"])
    depthwise = node.attrs["groups"] > 1
    weight = _phases(node.inputs[1].content, stride, depthwise)
    operands = [x, constant(weight, f"{node.inputs[1].name} phases")]
    channels, phases = y.dims[3], stride[0] * stride[1]
    for following in chain[1:]:
        if following.op == "ADD":
            bias = following.inputs[1].content.reshape(-1)
            spread = np.repeat(bias, phases) if depthwise else np.tile(bias, phases)
            operands.append(constant(spread, f"{following.inputs[1].name} phases"))
    grid = [-(-(y.dims[1 + axis] + padding[axis]) // stride[axis]) for axis in (0, 1)]
    attrs = {
        "stride_h": 1,
        "stride_w": 1,
        "pad_top": weight.shape[1] - 1,
        "pad_left": weight.shape[2] - 1,
        "dilation_h": 1,
        "dilation_w": 1,
        "groups": node.attrs["groups"],
        "activation": chain[-1].attrs["kind"] if chain[-1].op == "UNARY" else Activation.NONE,
    }
    rows = x.dims[0]
    value = y.like((rows, *grid, phases * channels))
    nodes = [Node("CONV2D", operands, [value], attrs, place)]
    if stride[0] > 1 or stride[1] > 1:
        split = (rows, *grid, channels, *stride) if depthwise else (rows, *grid, *stride, channels)
        perm = (0, 1, 4, 2, 5, 3) if depthwise else (0, 1, 3, 2, 4, 5)
        moved = y.like(tuple(split[axis] for axis in perm))
        nodes.append(Node("TRANSPOSE", [value.reshaped(split)], [moved], transpose_attrs(perm), place))
        value = moved
    value = value.reshaped((rows, grid[0] * stride[0], grid[1] * stride[1], channels))
    for axis in (1, 2):
        if value.dims[axis] != y.dims[axis]:
            dims = (*value.dims[:axis], y.dims[axis], *value.dims[axis + 1 :])
            part = y.like(dims)
            nodes.append(Node("SLICE", [value], [part], {"axis": axis, "start": padding[axis - 1]}, place))
            value = part
    nodes[-1].outputs = [chain[-1].outputs[0].reshaped(nodes[-1].outputs[0].dims)]
    return nodes


def _phases(weight: Data, stride: tuple[int, int], depthwise: bool) -> Data:
    """``[I, KH, KW, O]`` as the weight of a convolution over the small image, ``[phases O, taps, taps, I]``."""
    inputs, *kernel, outputs = weight.shape
    taps = [-(-size // step) for size, step in zip(kernel, stride, strict=True)]
    whole = np.zeros((inputs, taps[0] * stride[0], taps[1] * stride[1], outputs), np.float32)
    whole[:, : kernel[0], : kernel[1]] = weight
    split = whole.reshape(inputs, taps[0], stride[0], taps[1], stride[1], outputs)[:, ::-1, :, ::-1]
    if depthwise:
        return split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, *taps, 1)
    return split.transpose(2, 4, 5, 1, 3, 0).reshape(-1, *taps, inputs)
