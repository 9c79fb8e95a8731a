"""ATen calls that look at windows or at whole axes: pooling, mean, sum, maximum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evensong.mobile_runtime.compiler.builder import NHWC, Builder, Sizes, as_image, pair, require, single
from evensong.mobile_runtime.compiler.ir import Value
from evensong.mobile_runtime.compiler.layout import View

_INDICES = "the indices of a maximum"


def max_pool2d(
    b: Builder,
    x: View,
    kernel: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> View:
    """``torch.nn.functional.max_pool2d``: x [N, C, H, W]."""
    require(pair(dilation) == (1, 1), "max pooling with dilation")
    return _pool(b, "MAX_POOL2D", x, pair(kernel), pair(stride or kernel), pair(padding))


def max_pool1d(
    b: Builder,
    x: View,
    kernel: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> View:
    """``torch.nn.functional.max_pool1d``: x [N, C, L]."""
    size, step, pad = (1, single(kernel)), (1, single(stride or kernel)), (0, single(padding))
    return as_image(b, x, lambda picture: max_pool2d(b, picture, size, step, pad, dilation, ceil_mode))


def avg_pool2d(
    b: Builder,
    x: View,
    kernel: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> View:
    """``torch.nn.functional.avg_pool2d``: x [N, C, H, W]."""
    require(not ceil_mode and divisor_override is None, "average pooling with ceil_mode or divisor_override")
    include = int(count_include_pad and pair(padding) != (0, 0))
    return _pool(b, "AVG_POOL2D", x, pair(kernel), pair(stride or kernel), pair(padding), count_include_pad=include)


def avg_pool1d(
    b: Builder,
    x: View,
    kernel: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> View:
    """``torch.nn.functional.avg_pool1d``: x [N, C, L]."""
    size, step, pad = (1, single(kernel)), (1, single(stride or kernel)), (0, single(padding))
    return as_image(b, x, lambda picture: avg_pool2d(b, picture, size, step, pad, ceil_mode, count_include_pad))


def adaptive_avg_pool2d(b: Builder, x: View, size: Sequence[int]) -> View:
    """``adaptive_avg_pool2d`` where every window has the same size."""
    kernel = _even_window(x, b.shape)
    return _pool(b, "AVG_POOL2D", x, kernel, kernel, (0, 0), count_include_pad=0)


def adaptive_avg_pool1d(b: Builder, x: View, size: Sequence[int]) -> View:
    """``adaptive_avg_pool1d`` where every window has the same size."""
    return as_image(b, x, lambda picture: adaptive_avg_pool2d(b, picture, size))


def adaptive_max_pool2d(b: Builder, x: View, size: Sequence[int]) -> list[View | str]:
    """``adaptive_max_pool2d`` where every window has the same size; its indices are not available."""
    b.shape = (*x.shape[:2], *pair(size))
    return [_even_maxima(b, x), _INDICES]


def adaptive_max_pool1d(b: Builder, x: View, size: Sequence[int]) -> list[View | str]:
    """``adaptive_max_pool1d`` where every window has the same size; its indices are not available."""
    b.shape = (*x.shape[:2], single(size))
    return [as_image(b, x, lambda picture: _even_maxima(b, picture)), _INDICES]


def amax(b: Builder, x: View, dim: Sequence[int] | int = (), keepdim: bool = False) -> View:
    """Maximum over axes that lie side by side, as one max pooling. Ties: the first maximum takes the whole gradient."""
    r = _reduction(b, x, dim, keepdim)
    image = r.operand.reshaped((r.outer, r.size, 1, r.inner))
    result = b.emit("MAX_POOL2D", [image], (r.outer, 1, 1, r.inner), **_window((r.size, 1), (r.size, 1), (0, 0)))
    return View(result.reshaped(r.dims), b.shape, r.order)


def max_dim(b: Builder, x: View, dim: int, keepdim: bool = False) -> list[View | str]:
    """``x.max(dim)``: values only."""
    axis = x.axis(dim)
    kept = [1 if a == axis else size for a, size in enumerate(x.shape)]
    b.shape = tuple(kept) if keepdim else tuple(size for a, size in enumerate(kept) if a != axis)
    return [amax(b, x, [dim], keepdim), _INDICES]


def mean(b: Builder, x: View, dim: Sequence[int] | int | None = None, keepdim: bool = False, dtype: Any = None) -> View:
    """Mean over axes that lie side by side."""
    require(dim is not None, "a mean over everything", fix="Name the axes: x.mean(dim=(1, 2)).")
    r = _reduction(b, x, dim if dim is not None else (), keepdim)
    result = b.emit("REDUCE_MEAN", [r.operand], r.dims, axis_size=r.size, inner_size=r.inner)
    return View(result, b.shape, r.order)


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


@dataclass(frozen=True)
class _Reduction:
    """A reduction of ``operand``, seen as ``[outer, size, inner]``, over ``size``."""

    operand: Value
    dims: tuple[int, ...]  #: of the result
    order: tuple[int, ...]  #: of the result
    outer: int
    size: int
    inner: int


def _reduction(b: Builder, x: View, dim: Sequence[int] | int, keepdim: bool) -> _Reduction:
    """Brings the axes to reduce side by side; they stay where they are if they already do."""
    axes = [dim] if isinstance(dim, int) else list(dim)
    axes = [b.example_axis(x, axis, "a reduction") for axis in axes or range(1, len(x.shape))]
    order = [a for a in x.order if a not in axes or x.shape[a] == 1]
    reduced = [a for a in x.order if a in axes and x.shape[a] != 1]
    at = min((x.order.index(a) for a in reduced), default=len(order))
    before = [a for a in x.order[:at] if a in order]
    after = [a for a in order if a not in before]
    operand = b.arrange(x, [*before, *reduced, *after])
    sizes, first, last = operand.dims, len(before), len(before) + len(reduced)
    outer, size, inner = math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])
    if keepdim:
        kept = (*before, *reduced, *after)
    else:
        survivors = [a for a in range(len(x.shape)) if a not in axes]
        kept = tuple(survivors.index(a) for a in (*before, *after) if a not in axes)
    return _Reduction(operand, View(x.value, b.shape, kept).dims(kept), kept, outer, size, inner)


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
    operand = b.arrange(x, NHWC)
    _, channels, height, width = b.shape
    result = b.emit(
        op, [operand], (operand.dims[0], height, width, channels), **_window(kernel, stride, padding), **attrs
    )
    return View(result, b.shape, NHWC)


def _window(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> dict[str, int]:
    names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left")
    return dict(zip(names, (*kernel, *stride, *padding), strict=True))


def _even_maxima(b: Builder, x: View) -> View:
    kernel = _even_window(x, b.shape)
    return _pool(b, "MAX_POOL2D", x, kernel, kernel, (0, 0))


def _even_window(x: View, result: tuple[int, ...]) -> tuple[int, int]:
    sizes, targets = x.shape[2:], result[2:]
    require(
        all(size % target == 0 for size, target in zip(sizes, targets, strict=True)),
        "adaptive pooling with windows of different sizes",
        expected=f"an output size that divides {tuple(sizes)}",
        got=tuple(targets),
    )
    return sizes[0] // targets[0], sizes[1] // targets[1]


TABLE: dict[str, Callable[..., Any]] = {
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
}
