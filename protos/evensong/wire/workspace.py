"""How much packing workspace a program's kernels may use: a bound that compiler and engines compute alike.

The C++ engine mirrors this file in ``workspace.hpp``; a test holds the two equal. It holds what a matrix product
repacks for speed, never a whole unfolded image: at most one block of patches and one block of packed weights at a time.

Every need grows with the number of rows, so that a bound for ``max_batch`` examples also holds for fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

from evensong.wire.program import Op, Tensor

PANEL = 32  #: columns of the widest panel that any instruction set packs
DEPTH = 256  #: rows of a panel that are packed at a time where the whole depth is not needed
DOT_ROWS = 32  #: a LINEAR with at most this many rows reads its weight in place and packs nothing
PATCH_ELEMENTS = 24 * 1024  #: elements of one block of patches, if at least LEAST_PATCHES fit
LEAST_PATCHES, MOST_PATCHES = 16, 256
WEIGHT_ELEMENTS = 256 * 1024  #: elements of one block of packed weights, if at least one panel fits
SEQUENCES = 48  #: examples that a recurrent layer takes at a time
DOT_SEQUENCES = 4  #: a recurrent layer with at most this many reads its weight in place
SPARSE_ROWS = 32  #: rows of x that a product with a sparse dy takes at a time
SPARSE_COLUMNS = 256  #: columns of x, and of dy
QUERIES = 48  #: queries that attention takes at a time
CHANNEL_SUMS = 4  #: numbers for each channel that a group norm keeps
INT8_WEIGHTS = 64 * 1024  #: weights of one packed block of an int8 product, if at least one panel fits
INT8_ROWS = 8  #: rows of patches that the int8 product takes at a time
GRADIENT_PIXELS = 64  #: pixels that a step of int8 weights sums at a time
GRADIENT_SUMS = 64 * 1024  #: sums that it holds, if one panel of all outputs fits
MOST_GRADIENT_COLUMNS = 512  #: weights of one output that it takes at a time
INT8_SLACK = 192  #: bytes that whole vectors may run over the last row

_F32 = 4


def workspace_bytes(ops: Sequence[Op], tensors: Sequence[Tensor]) -> int:
    """The largest need of any operation, in bytes; kernels run one after the other and share it."""
    return max((_need(op, tensors) for op in ops), default=0)


def _need(op: Op, tensors: Sequence[Tensor]) -> int:
    operands = [tensors[index] for index in (*op.inputs, *op.outputs)]
    match op.name:
        case "LINEAR":
            x, w = operands[0], operands[1]
            depth = w.dims[1]
            return 0 if x.elements // depth <= DOT_ROWS else _F32 * PANEL * min(depth, DEPTH)
        case "LINEAR_GRAD_INPUT":
            return _F32 * PANEL * min(operands[1].dims[0], DEPTH)
        case "LINEAR_GRAD_WEIGHT":
            dy, dw = operands[0], tensors[op.outputs[0]]
            return _F32 * _linear_grad_weight_elements(dy.elements // dw.dims[0], *dw.dims)
        case "LINEAR_UPDATE":
            w, dy = operands[:2]
            return _F32 * _linear_grad_weight_elements(dy.elements // w.dims[0], *w.dims)
        case "CONV2D":
            weight, y = operands[1], tensors[op.outputs[0]]
            if _depthwise(weight, op.attrs):
                return _F32 * _depthwise_elements(y, weight, op.attrs)
            depth, columns = prod(weight.dims[1:]), weight.dims[0] // int(op.attrs[6])
            return _F32 * (_round_up(weight_elements(depth, columns), 64) + patch_elements(depth, prod(y.dims[:3])))
        case "CONV2D_GRAD_INPUT":
            weight, dx = operands[1], tensors[op.outputs[0]]
            if _depthwise(weight, op.attrs):
                return _F32 * _depthwise_backward_elements(dx, weight, op.attrs)
            depth, columns = _phase_depth(weight, op.attrs), weight.dims[3]
            return _F32 * (_round_up(weight_elements(depth, columns), 64) + patch_elements(depth, prod(dx.dims[:3])))
        case "CONV2D_GRAD_WEIGHT":
            dy, weight = operands[0], tensors[op.outputs[0]]
            if _depthwise(weight, op.attrs):
                return _F32 * _depthwise_elements(dy, weight, op.attrs)
            return _F32 * patch_elements(prod(weight.dims[1:]), prod(dy.dims[:3]))
        case "MATMUL":
            return _F32 * _matmul_elements(operands[0], operands[2], int(op.attrs[0]))
        case "ATTENTION":
            return _F32 * _attention_elements(*operands[1].dims)
        case "ATTENTION_GRAD":
            return _F32 * _attention_grad_elements(operands[2], operands[3])
        case "GRU" | "LSTM":
            return _F32 * recurrent_elements(operands[0].dims[0], *operands[1].dims)
        case "GRU_GRAD" | "LSTM_GRAD":
            return _F32 * recurrent_grad_elements(operands[0].dims[0], *operands[3].dims)
        case "GROUP_NORM" | "GROUP_NORM_GRAD":
            return _F32 * CHANNEL_SUMS * operands[0].dims[-1]
        case "QLINEAR":
            columns, depth = operands[1].dims
            return int8_product_bytes(depth, columns)
        case "QCONV2D":
            weight = operands[1]
            if _depthwise(weight, op.attrs):
                return 4 * (weight.elements + weight.dims[0])  # a 32-bit lane for a weight and for a bias
            return int8_product_bytes(prod(weight.dims[1:]), weight.dims[0] // int(op.attrs[6]))
        case "G_LINEAR_INPUT":
            return int8_product_bytes(*operands[1].dims)
        case "G_CONV2D_INPUT":
            weight = operands[1]
            if _depthwise(weight, op.attrs):
                return 4 * weight.elements
            return int8_product_bytes(_phase_depth(weight, op.attrs), weight.dims[3])
        case "G_LINEAR_UPDATE":
            return gradient_step_bytes(*operands[0].dims)
        case "G_CONV2D_UPDATE":
            weight = operands[0]
            if _depthwise(weight, op.attrs):
                return 4 * weight.elements
            return gradient_step_bytes(weight.dims[0] // int(op.attrs[6]), prod(weight.dims[1:]))
        case _:
            return 0


def _linear_grad_weight_elements(rows: int, outputs: int, inputs: int) -> int:
    """One panel, or a block of x and the terms of a block of a sparse dy."""
    few, lists = min(rows, SPARSE_ROWS), min(outputs, SPARSE_COLUMNS)
    block = few * min(_round_up(inputs, PANEL), SPARSE_COLUMNS)
    return max(PANEL * min(rows, DEPTH), block + _round_up(lists * (2 * few + 1), 16))


def patch_elements(depth: int, pixels: int) -> int:
    """Elements of one block of patches: rows of ``depth``, padded to whole panels and an odd number of cache lines."""
    stride = _round_up(depth, PANEL) + PANEL // 2
    return stride * min(pixels, max(LEAST_PATCHES, min(MOST_PATCHES, PATCH_ELEMENTS // stride)))


def weight_elements(depth: int, columns: int) -> int:
    """Elements of one block of packed weights: whole panels of ``depth`` rows."""
    most = max(PANEL, WEIGHT_ELEMENTS // depth // PANEL * PANEL)
    return depth * min(_round_up(columns, PANEL), most)


def _matmul_elements(a: Tensor, y: Tensor, transpose: int) -> int:
    """The whole right matrix packed, if it is transposed, else one panel of it."""
    depth = a.dims[-2 if transpose == 1 else -1]
    return depth * (_round_up(y.dims[-1], PANEL) if transpose == 2 else PANEL)


def _attention_elements(examples: int, keys: int, heads: int, size: int) -> int:
    """The keys of one head packed, a block of scores, a panel of values."""
    return size * _round_up(keys, PANEL) + (QUERIES + PANEL) * keys


def _attention_grad_elements(k: Tensor, v: Tensor) -> int:
    """Keys and values packed, two blocks of scores, a panel."""
    keys = k.dims[1]
    packed = (k.dims[3] + v.dims[3]) * _round_up(keys, PANEL)
    return packed + 2 * QUERIES * keys + PANEL * max(keys, QUERIES)


def recurrent_elements(examples: int, gates: int, hidden: int) -> int:
    """A recurrent layer: packed weights, then for each example of a block its gates and a state."""
    packed = 0 if examples <= DOT_SEQUENCES else hidden * _round_up(gates, PANEL)
    return packed + min(examples, SEQUENCES) * (gates + hidden)


def recurrent_grad_elements(examples: int, gates: int, hidden: int) -> int:
    """Its gradient: first packed weights of one gate, then a panel and two gradients of states for each example of a
    block; and a state of zeros."""
    steps = PANEL * max(gates, DEPTH) + 2 * min(examples, SEQUENCES) * hidden
    return max(hidden * _round_up(hidden, PANEL), steps) + hidden


def int8_product_bytes(depth: int, columns: int) -> int:
    """Packed int8 weights (int16 where the CPU cannot multiply bytes), an int32 a column, INT8_ROWS rows of patches."""
    padded = _round_up(depth, 4)
    block = min(_round_up(columns, PANEL), max(PANEL, INT8_WEIGHTS // padded // PANEL * PANEL))
    return (2 * padded + 4) * block + _round_up((2 * INT8_ROWS + 1) * padded, 64) + INT8_SLACK


def gradient_columns(outputs: int, columns: int) -> int:
    """Weights of each output that one pass of a step of int8 weights takes: whole panels."""
    most = max(PANEL, GRADIENT_SUMS // outputs // PANEL * PANEL)
    return min(_round_up(columns, PANEL), MOST_GRADIENT_COLUMNS, most)


def gradient_step_bytes(outputs: int, columns: int) -> int:
    """Sums and what the cells' offset adds to them, totals of the gradients, a packed panel of inputs, turned
    gradients, and a group of patches.
    """
    block = gradient_columns(outputs, columns)
    sums = 4 * ((outputs + 1) * block + _round_up(outputs, 16))
    return sums + 2 * GRADIENT_PIXELS * (block + outputs + INT8_ROWS) + 4 * columns + INT8_SLACK


def _depthwise_elements(y: Tensor, weight: Tensor, attrs: Sequence[int | float]) -> int:
    """Of the forward pass, and of the gradient in the weights."""
    strides, dilations = (int(a) for a in attrs[:2]), (int(a) for a in attrs[4:6])
    axes = list(zip(y.dims[1:3], strides, weight.dims[1:3], dilations, strict=True))
    return _depthwise_grid_elements(y.dims[0], weight.dims[0], axes)


def _depthwise_backward_elements(dx: Tensor, weight: Tensor, attrs: Sequence[int | float]) -> int:
    """Of the gradient in the input, whose grid is the first phase of the stride."""
    axes = []
    for size, taps, stride, dilation in zip(dx.dims[1:3], weight.dims[1:3], attrs[:2], attrs[4:6], strict=True):
        stride, dilation = int(stride), int(dilation)
        common = gcd(stride, dilation)
        axes.append((-(-size // stride), 1, -(-taps // (stride // common)), dilation // common))
    return _depthwise_grid_elements(dx.dims[0], weight.dims[0], axes)


def _depthwise_grid_elements(images: int, channels: int, axes: Sequence[tuple[int, int, int, int]]) -> int:
    """Places of taps, packed weights, and a copy of what some pixels meet, at least one. Each axis is (positions, step
    in the source, taps, step from tap to tap)."""
    reach = [(taps - 1) * delta + 1 for _, _, taps, delta in axes]
    extent = [(positions - 1) * step + r for (positions, step, _, _), r in zip(axes, reach, strict=True)]
    one = min(prod(reach), 1 << 30) * channels
    pixels = min(images * min(prod(extent), PATCH_ELEMENTS), PATCH_ELEMENTS)
    taps = axes[0][2] * axes[1][2]
    return _round_up(taps, 16) + _round_up(taps * channels, 16) + max(one, min(pixels * channels, PATCH_ELEMENTS))


def _phase_depth(weight: Tensor, attrs: Sequence[int | float]) -> int:
    """Products of one sum of an input's gradient: pixels of one phase of the stride meet only every ``step``-th tap."""
    stride_h, stride_w, _, _, dilation_h, dilation_w, groups = (int(a) for a in attrs[:7])
    step_h, step_w = stride_h // gcd(stride_h, dilation_h), stride_w // gcd(stride_w, dilation_w)
    taps = -(-weight.dims[1] // step_h) * -(-weight.dims[2] // step_w)
    return taps * (weight.dims[0] // groups)


def _depthwise(weight: Tensor, attrs: Sequence[int | float]) -> bool:
    """One input and one output channel a group: a product per channel instead of a matrix product."""
    return weight.dims[3] == 1 and int(attrs[6]) == weight.dims[0]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
