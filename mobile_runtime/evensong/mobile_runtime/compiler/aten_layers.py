"""ATen calls with weights: linear, convolution, normalisation, embedding; and dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.aten_windows import mean, sum_dim
from evensong.mobile_runtime.compiler.builder import NHWC, Builder, Sizes, as_image, as_picture, pair, require, single
from evensong.mobile_runtime.compiler.ir import Value, constant
from evensong.mobile_runtime.compiler.layout import View, last, reshaped
from evensong.wire.program import Activation, DType, Region

# ------------------------------------------------------------------------------------------------- linear, convolution


def linear(b: Builder, x: View, weight: View, bias: View | None = None) -> View:
    """``torch.nn.functional.linear``: x [..., I], weight [O, I]."""
    require(not weight.value.batched, "a linear layer whose weight is computed from the examples")
    feature = b.example_axis(x, -1, "a linear layer")
    operand = b.arrange(x, last(x, feature))
    operands = [operand, b.arrange(weight, (0, 1))]
    if bias is not None:
        operands.append(b.arrange(bias, (0,)))
    result = b.emit("LINEAR", operands, (*operand.dims[:-1], weight.shape[0]), activation=Activation.NONE)
    return View(result, b.shape, last(x, feature))


def addmm(b: Builder, bias: View, x: View, weight: View, *, beta: float = 1, alpha: float = 1) -> View:
    """``bias + x @ weight``."""
    require(beta == 1 and alpha == 1 and len(bias.shape) == 1, "addmm with factors or with a matrix to add")
    transposed = View(weight.value, weight.shape[::-1], tuple(1 - axis for axis in weight.order))
    return linear(b, x, transposed, bias)


def conv2d(
    b: Builder,
    x: View,
    weight: View,
    bias: View | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> View:
    """``torch.nn.functional.conv2d``: x [N, C, H, W], weight [O, C / groups, KH, KW]."""
    require(len(x.shape) == 4, "a convolution without a batch axis", expected="4 axes", got=len(x.shape))
    require(not weight.value.batched, "a convolution whose weight is computed from the examples")
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride), pair(dilation)
    kernel = weight.shape[2:]
    pad_top, pad_left = _padding(padding, kernel, (dilation_h, dilation_w))
    operands = [b.arrange(x, NHWC), b.arrange(weight, NHWC)]
    if bias is not None:
        operands.append(b.arrange(bias, (0,)))
    _, channels, height, width = b.shape
    result = b.emit(
        "CONV2D",
        operands,
        (operands[0].dims[0], height, width, channels),
        stride_h=stride_h,
        stride_w=stride_w,
        pad_top=pad_top,
        pad_left=pad_left,
        dilation_h=dilation_h,
        dilation_w=dilation_w,
        groups=groups,
        activation=Activation.NONE,
    )
    return View(result, b.shape, NHWC)


def conv1d(
    b: Builder,
    x: View,
    weight: View,
    bias: View | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> View:
    """``torch.nn.functional.conv1d``: x [N, C, L], weight [O, C / groups, K]; run as an image of height 1."""
    require(len(x.shape) == 3, "a convolution without a batch axis", expected="3 axes", got=len(x.shape))
    line = padding if isinstance(padding, str) else (0, single(padding))
    steps, gaps = (1, single(stride)), (1, single(dilation))
    return as_image(b, x, lambda picture: conv2d(b, picture, as_picture(b, weight), bias, steps, line, gaps, groups))


def conv_transpose2d(
    b: Builder,
    x: View,
    weight: View,
    bias: View | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> View:
    """``torch.nn.functional.conv_transpose2d``, the gradient of a convolution: x [N, I, H, W], weight [I, O / groups,
    KH, KW]. ``output_padding`` shows in the shape of the result only.
    """
    require(len(x.shape) == 4, "a convolution without a batch axis", expected="4 axes", got=len(x.shape))
    require(not weight.value.batched, "a convolution whose weight is computed from the examples")
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride), pair(dilation)
    pad_top, pad_left = pair(padding)
    operands = [b.arrange(x, NHWC), b.arrange(weight, NHWC)]
    _, channels, height, width = b.shape
    result = b.emit(
        "CONV2D_GRAD_INPUT",
        operands,
        (operands[0].dims[0], height, width, channels),
        stride_h=stride_h,
        stride_w=stride_w,
        pad_top=pad_top,
        pad_left=pad_left,
        dilation_h=dilation_h,
        dilation_w=dilation_w,
        groups=groups,
    )
    if bias is not None:
        result = b.emit("ADD", [result, b.arrange(bias, (0,))], result.dims)
    return View(result, b.shape, NHWC)


def conv_transpose1d(
    b: Builder,
    x: View,
    weight: View,
    bias: View | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> View:
    """``torch.nn.functional.conv_transpose1d``: x [N, I, L], weight [I, O / groups, K]; an image of height 1."""
    require(len(x.shape) == 3, "a convolution without a batch axis", expected="3 axes", got=len(x.shape))
    steps, pads, gaps = (1, single(stride)), (0, single(padding)), (1, single(dilation))
    return as_image(
        b, x, lambda picture: conv_transpose2d(b, picture, as_picture(b, weight), bias, steps, pads, 0, groups, gaps)
    )


# ----------------------------------------------------------------------------------- normalisation, dropout, embedding


def batch_norm(
    b: Builder,
    x: View,
    gamma: View | None,
    beta: View | None,
    running_mean: View | None,
    running_var: View | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> View:
    """Batch norm over axis 1. Unless its scale is trained, it uses its running statistics in every program."""
    if running_mean is None or running_var is None:
        require(False, "batch norm without running statistics", fix="Use track_running_stats=True.")
        raise AssertionError
    order = last(x, b.example_axis(x, 1, "batch norm"))
    operand = b.arrange(x, order)
    trained = gamma.value.region == Region.STATE if gamma is not None else bool(b.weights.trainable)
    if trained:
        b.weights.make_buffer(running_mean.value.name)
        b.weights.make_buffer(running_var.value.name)
    channels = x.shape[1]
    scale = gamma.value if gamma is not None else constant(np.ones(channels, np.float32))
    shift = beta.value if beta is not None else constant(np.zeros(channels, np.float32))
    operands = [operand, scale, shift, running_mean.value, running_var.value]
    if not (trained and training):
        return View(b.emit("BATCH_NORM_EVAL", operands, operand.dims, eps=eps), b.shape, order)
    require(momentum is not None, "batch norm with a cumulative average", fix="Give momentum a number.")
    outputs = [operand.like(name=b.place), *(Value((channels,), name=b.place) for _ in range(2))]
    b.graph.add("BATCH_NORM_TRAIN", operands, outputs, b.place, eps=eps, momentum=momentum)
    return View(outputs[0], b.shape, order)


def layer_norm(
    b: Builder,
    x: View,
    normalized_shape: Sequence[int],
    gamma: View | None = None,
    beta: View | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> View:
    """Layer norm over the last ``len(normalized_shape)`` axes."""
    rank, count = len(x.shape), len(normalized_shape)
    axes = [b.example_axis(x, axis, "layer norm") for axis in range(rank - count, rank)]
    order = (*(a for a in x.order if a not in axes), *axes)
    operand = b.arrange(x, order)
    size = int(np.prod(normalized_shape))
    scale = _row(b, gamma, size) if gamma is not None else constant(np.ones(size, np.float32))
    shift = _row(b, beta, size) if beta is not None else constant(np.zeros(size, np.float32))
    rows = operand.reshaped((operand.elements // size, size))
    result, _, _ = b.emit_all("LAYER_NORM", [rows, scale, shift], [rows.dims, rows.dims[:1], rows.dims[:1]], eps=eps)
    return View(result.reshaped(operand.dims), b.shape, order)


def dropout(b: Builder, x: View, p: float, train: bool) -> View:
    """Inverted dropout, in training only; each call site has its own stream of random numbers."""
    if not train or p == 0:
        return x
    require(p < 1, "dropout that drops everything", expected="p below 1", got=p)
    result = x.value.like(name=b.place)
    mask = Value(x.value.dims, DType.U8, batched=x.value.batched, name=b.place)
    b.graph.add("DROPOUT", [x.value], [result, mask], b.place, p=p, stream=b.stream())
    return View(result, x.shape, x.order)


def embedding(
    b: Builder,
    table: View,
    ids: View,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> View:
    """``torch.nn.functional.embedding``: ids [...], table [V, D]."""
    require(not scale_grad_by_freq, "an embedding with scale_grad_by_freq")
    frozen_row = padding_idx >= 0 and table.value.region == Region.STATE
    require(not frozen_row, "a trainable embedding with padding_idx", fix="Drop padding_idx, or freeze the table.")
    _check_ids(ids)
    rows = b.arrange(ids, ids.order)
    result = b.emit("EMBEDDING", [rows, b.arrange(table, (0, 1))], (*rows.dims, table.shape[1]))
    return View(result, b.shape, (*ids.order, len(ids.shape)))


def embedding_bag(
    b: Builder,
    table: View,
    ids: View,
    offsets: View,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: View | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[View | str]:
    """``EmbeddingBag`` over rows of equal length (ids [n, L], no offsets), sum or mean."""
    require(mode in (0, 1), "an embedding bag with mode='max'")
    starts = offsets.value.root.data
    count = offsets.shape[0]
    length = ids.shape[0] // count
    even = starts is not None and bool(np.array_equal(starts, np.arange(count) * length))
    require(even, "an embedding bag with offsets", expected="ids of shape [n, L] and no offsets")
    require(per_sample_weights is None and padding_idx in (None, -1), "an embedding bag with weights or padding_idx")
    _check_ids(ids)
    bags = reshaped(b.graph, ids, (count, length), b.place)
    b.shape = (*bags.shape, table.shape[1])
    rows = embedding(b, table, bags, scale_grad_by_freq=scale_grad_by_freq)
    b.shape = (count, table.shape[1])
    return [(mean if mode == 1 else sum_dim)(b, rows, [1]), *["the offsets of an embedding bag"] * 3]


# ------------------------------------------------------------------------------------------------------------- helpers


def _padding(padding: Sizes | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":  # torch pads the odd element at the end
        top, left = (gap * (size - 1) // 2 for gap, size in zip(dilation, kernel, strict=True))
        return top, left
    require(not isinstance(padding, str), f"padding {padding!r}")
    return pair(padding) if not isinstance(padding, str) else (0, 0)


def _row(b: Builder, view: View, size: int) -> Value:
    return b.arrange(view, range(len(view.shape))).reshaped((size,))


def _check_ids(ids: View) -> None:
    require(ids.value.dtype == DType.I32, "an embedding whose ids are not integers")


TABLE: dict[str, Callable[..., Any]] = {
    "aten.conv1d.default": conv1d,
    "aten.conv1d.padding": conv1d,
    "aten.conv2d.default": conv2d,
    "aten.conv2d.padding": conv2d,
    "aten.conv_transpose1d.default": conv_transpose1d,
    "aten.conv_transpose2d.input": conv_transpose2d,
    "aten.batch_norm.default": batch_norm,
    "aten.layer_norm.default": layer_norm,
    "aten.dropout.default": dropout,
    "aten.embedding.default": embedding,
    "aten.embedding_bag.padding_idx": embedding_bag,
    "aten.embedding_bag.default": embedding_bag,
}
