"""ATen calls with weights or windows: linear, convolution, pooling, normalisation, embedding, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import Value, constant
from evensong.mobile_runtime.compiler.layout import View, last, reshaped, squeezed
from evensong.wire.program import Activation, DType, Region

_NHWC = (0, 2, 3, 1)
_Sizes = Sequence[int] | int

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


def matmul(b: Builder, x: View, weight: View) -> View:
    """``x [..., I] @ weight [I, O]`` with a weight that no example changes."""
    require(len(weight.shape) == 2 and not weight.value.batched, "a matrix product of two computed tensors")
    return linear(b, x, View(weight.value, weight.shape[::-1], tuple(1 - axis for axis in weight.order)))


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
    stride: _Sizes = 1,
    padding: _Sizes | str = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> View:
    """``torch.nn.functional.conv2d``: x [N, C, H, W], weight [O, C / groups, KH, KW]."""
    require(len(x.shape) == 4, "a convolution without a batch axis", expected="4 axes", got=len(x.shape))
    require(not weight.value.batched, "a convolution whose weight is computed from the examples")
    (stride_h, stride_w), (dilation_h, dilation_w) = _pair(stride), _pair(dilation)
    kernel = weight.shape[2:]
    pad_top, pad_left = _padding(padding, kernel, (dilation_h, dilation_w))
    operands = [b.arrange(x, _NHWC), b.arrange(weight, _NHWC)]
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
    return View(result, b.shape, _NHWC)


def conv1d(
    b: Builder,
    x: View,
    weight: View,
    bias: View | None = None,
    stride: _Sizes = 1,
    padding: _Sizes | str = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> View:
    """``torch.nn.functional.conv1d``: x [N, C, L], weight [O, C / groups, K]; run as an image of height 1."""
    require(len(x.shape) == 3, "a convolution without a batch axis", expected="3 axes", got=len(x.shape))
    line = padding if isinstance(padding, str) else (0, _single(padding))
    steps, gaps = (1, _single(stride)), (1, _single(dilation))
    return _as_image(b, x, lambda image: conv2d(b, image, _image(b, weight), bias, steps, line, gaps, groups))


# ------------------------------------------------------------------------------------------------------------- pooling


def max_pool2d(
    b: Builder,
    x: View,
    kernel: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    dilation: _Sizes = 1,
    ceil_mode: bool = False,
) -> View:
    """``torch.nn.functional.max_pool2d``: x [N, C, H, W]."""
    require(_pair(dilation) == (1, 1), "max pooling with dilation")
    return _pool(b, "MAX_POOL2D", x, _pair(kernel), _pair(stride or kernel), _pair(padding))


def max_pool1d(
    b: Builder,
    x: View,
    kernel: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    dilation: _Sizes = 1,
    ceil_mode: bool = False,
) -> View:
    """``torch.nn.functional.max_pool1d``: x [N, C, L]."""
    size, step, pad = (1, _single(kernel)), (1, _single(stride or kernel)), (0, _single(padding))
    return _as_image(b, x, lambda image: max_pool2d(b, image, size, step, pad, dilation, ceil_mode))


def avg_pool2d(
    b: Builder,
    x: View,
    kernel: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> View:
    """``torch.nn.functional.avg_pool2d``: x [N, C, H, W]."""
    require(not ceil_mode and divisor_override is None, "average pooling with ceil_mode or divisor_override")
    include = int(count_include_pad and _pair(padding) != (0, 0))
    return _pool(b, "AVG_POOL2D", x, _pair(kernel), _pair(stride or kernel), _pair(padding), count_include_pad=include)


def avg_pool1d(
    b: Builder,
    x: View,
    kernel: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> View:
    """``torch.nn.functional.avg_pool1d``: x [N, C, L]."""
    size, step, pad = (1, _single(kernel)), (1, _single(stride or kernel)), (0, _single(padding))
    return _as_image(b, x, lambda image: avg_pool2d(b, image, size, step, pad, ceil_mode, count_include_pad))


def adaptive_avg_pool2d(b: Builder, x: View, size: Sequence[int]) -> View:
    """``adaptive_avg_pool2d`` where every window has the same size."""
    kernel = _even_window(x, b.shape)
    return _pool(b, "AVG_POOL2D", x, kernel, kernel, (0, 0), count_include_pad=0)


def adaptive_avg_pool1d(b: Builder, x: View, size: Sequence[int]) -> View:
    """``adaptive_avg_pool1d`` where every window has the same size."""
    return _as_image(b, x, lambda image: adaptive_avg_pool2d(b, image, size))


def adaptive_max_pool2d(b: Builder, x: View, size: Sequence[int]) -> list[View | None]:
    """``adaptive_max_pool2d`` where every window has the same size; its indices are not available."""
    b.shape = (*x.shape[:2], *_pair(size))
    kernel = _even_window(x, b.shape)
    return [_pool(b, "MAX_POOL2D", x, kernel, kernel, (0, 0)), None]


def adaptive_max_pool1d(b: Builder, x: View, size: Sequence[int]) -> list[View | None]:
    """``adaptive_max_pool1d`` where every window has the same size; its indices are not available."""
    b.shape = (*x.shape[:2], _single(size))
    return [_as_image(b, x, lambda image: adaptive_max_pool2d(b, image, (1, _single(size)))[0]), None]


def amax(b: Builder, x: View, dim: Sequence[int] | int = (), keepdim: bool = False) -> View:
    """Maximum over axes that lie side by side, as one max pooling. Ties: the first maximum takes the whole gradient."""
    operand, kept, order, (outer, size, inner) = reduction(b, x, dim, keepdim)
    image = operand.reshaped((outer, size, 1, inner))
    result = b.emit("MAX_POOL2D", [image], (outer, 1, 1, inner), **_window((size, 1), (size, 1), (0, 0)))
    return View(result.reshaped(kept), b.shape, order)


def max_dim(b: Builder, x: View, dim: int, keepdim: bool = False) -> list[View | None]:
    """``x.max(dim)``: values only."""
    axis = x.axis(dim)
    kept = [1 if a == axis else size for a, size in enumerate(x.shape)]
    b.shape = tuple(kept) if keepdim else tuple(size for a, size in enumerate(kept) if a != axis)
    return [amax(b, x, [dim], keepdim), None]


def mean(b: Builder, x: View, dim: Sequence[int] | int | None = None, keepdim: bool = False, dtype: Any = None) -> View:
    """Mean over axes that lie side by side."""
    require(dim is not None, "a mean over everything", fix="Name the axes: x.mean(dim=(1, 2)).")
    operand, kept, order, (_, size, inner) = reduction(b, x, dim if dim is not None else (), keepdim)
    result = b.emit("REDUCE_MEAN", [operand], kept, axis_size=size, inner_size=inner)
    return View(result, b.shape, order)


def sum_dim(
    b: Builder, x: View, dim: Sequence[int] | int | None = None, keepdim: bool = False, dtype: Any = None
) -> View:
    """Sum over axes, as the mean times their size."""
    require(dim is not None, "a sum over everything", fix="Name the axes: x.sum(dim=(1, 2)).")
    average = mean(b, x, dim, keepdim)
    size = x.value.elements // average.value.elements
    return View(
        b.emit("SCALE", [average.value], average.value.dims, alpha=float(size), beta=0.0), b.shape, average.order
    )


def reduction(
    b: Builder, x: View, dim: Sequence[int] | int, keepdim: bool
) -> tuple[Value, tuple[int, ...], tuple[int, ...], tuple[int, int, int]]:
    """Prepares a reduction: operand, dimensions and order of the result, and the sizes (outer, reduced, inner)."""
    axes = [dim] if isinstance(dim, int) else list(dim)
    axes = [b.example_axis(x, axis, "a reduction") for axis in axes or range(1, len(x.shape))]
    order = [a for a in x.order if a not in axes or x.shape[a] == 1]
    reduced = [a for a in x.order if a in axes and x.shape[a] != 1]
    at = min((x.order.index(a) for a in reduced), default=len(order))
    before = [a for a in x.order[:at] if a in order]
    after = [a for a in order if a not in before]
    operand = b.arrange(x, [*before, *reduced, *after])
    sizes = x.dims([*before, *reduced, *after])
    outer = int(np.prod(sizes[: len(before)]))
    size = int(np.prod(sizes[len(before) : len(before) + len(reduced)]))
    inner = int(np.prod(sizes[len(before) + len(reduced) :]))
    if keepdim:
        kept = (*before, *reduced, *after)
    else:
        survivors = [a for a in range(len(x.shape)) if a not in axes]
        kept = tuple(survivors.index(a) for a in (*before, *after) if a not in axes)
    dims = View(x.value, b.shape, kept).dims(kept)
    return operand, dims, kept, (outer, size, inner)


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
    """Batch norm over axis 1. Frozen (no trainable gamma or beta) it uses its running statistics in every program."""
    if running_mean is None or running_var is None:
        require(False, "batch norm without running statistics", fix="Use track_running_stats=True.")
        raise AssertionError
    order = last(x, b.example_axis(x, 1, "batch norm"))
    operand = b.arrange(x, order)
    affine = [p.value for p in (gamma, beta) if p is not None]
    trained = any(p.region == Region.STATE for p in affine) if affine else bool(b.weights.trainable)
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
    b.graph.add("DROPOUT", [x.value], [result, mask], b.place, p=p, stream=b.dropouts)
    b.dropouts += 1
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
) -> list[View | None]:
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
    return [(mean if mode == 1 else sum_dim)(b, rows, [1]), None, None, None]


# ------------------------------------------------------------------------------------------------------------- helpers


def _pool(
    b: Builder,
    op: str,
    x: View,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    **attrs: int,
) -> View:
    require(len(x.shape) == 4, "pooling without a batch axis", expected="a batch of images or signals")
    operand = b.arrange(x, _NHWC)
    _, channels, height, width = b.shape
    result = b.emit(
        op, [operand], (operand.dims[0], height, width, channels), **_window(kernel, stride, padding), **attrs
    )
    return View(result, b.shape, _NHWC)


def _window(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> dict[str, int]:
    names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")
    return dict(zip(names, (*kernel, *stride, *padding), strict=True))


def _as_image(b: Builder, x: View, layer: Any) -> View:
    """Runs a 2-D layer on a signal [N, C, L] seen as an image [N, C, 1, L]."""
    require(len(x.shape) == 3, "a signal without a batch axis", expected="3 axes", got=len(x.shape))
    shape = b.shape
    b.shape = (shape[0], shape[1], 1, shape[2])
    result = squeezed(layer(_image(b, x)), [2])
    b.shape = shape
    return result


def _image(b: Builder, signal: View) -> View:
    first, second, length = signal.shape
    return reshaped(b.graph, signal, (first, second, 1, length), b.place)


def _even_window(x: View, result: tuple[int, ...]) -> tuple[int, int]:
    sizes, targets = x.shape[2:], result[2:]
    require(
        all(size % target == 0 for size, target in zip(sizes, targets, strict=True)),
        "adaptive pooling with windows of different sizes",
        expected=f"an output size that divides {tuple(sizes)}",
        got=tuple(targets),
    )
    return sizes[0] // targets[0], sizes[1] // targets[1]


def _padding(padding: _Sizes | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":  # torch pads the odd element at the end
        top, left = (gap * (size - 1) // 2 for gap, size in zip(dilation, kernel, strict=True))
        return top, left
    require(not isinstance(padding, str), f"padding {padding!r}")
    return _pair(padding) if not isinstance(padding, str) else (0, 0)


def _row(b: Builder, view: View, size: int) -> Value:
    return b.arrange(view, range(len(view.shape))).reshaped((size,))


def _check_ids(ids: View) -> None:
    require(ids.value.dtype == DType.I32, "an embedding whose ids are not integers")


def _pair(sizes: _Sizes) -> tuple[int, int]:
    if isinstance(sizes, int):
        return sizes, sizes
    return (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _single(sizes: _Sizes) -> int:
    return sizes if isinstance(sizes, int) else sizes[0]


TABLE: dict[str, Callable[..., Any]] = {
    "aten.linear.default": linear,
    "aten.matmul.default": matmul,
    "aten.mm.default": matmul,
    "aten.addmm.default": addmm,
    "aten.conv1d.default": conv1d,
    "aten.conv1d.padding": conv1d,
    "aten.conv2d.default": conv2d,
    "aten.conv2d.padding": conv2d,
    "aten.max_pool1d.default": max_pool1d,
    "aten.max_pool2d.default": max_pool2d,
    "aten.avg_pool1d.default": avg_pool1d,
    "aten.avg_pool2d.default": avg_pool2d,
    "aten.adaptive_avg_pool1d.default": adaptive_avg_pool1d,
    "aten.adaptive_avg_pool2d.default": adaptive_avg_pool2d,
    "aten.adaptive_max_pool1d.default": adaptive_max_pool1d,
    "aten.adaptive_max_pool2d.default": adaptive_max_pool2d,
    "aten.amax.default": amax,
    "aten.max.dim": max_dim,
    "aten.mean.dim": mean,
    "aten.sum.dim_IntList": sum_dim,
    "aten.batch_norm.default": batch_norm,
    "aten.layer_norm.default": layer_norm,
    "aten.dropout.default": dropout,
    "aten.embedding.default": embedding,
    "aten.embedding_bag.padding_idx": embedding_bag,
    "aten.embedding_bag.default": embedding_bag,
}
