"""ATen calls that normalise each example by itself (group, instance and RMS norm), and the statistics for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.aten_arithmetic import mul, sub
from evensong.mobile_runtime.compiler.aten_pointwise import scale, unary
from evensong.mobile_runtime.compiler.aten_windows import mean, sum_dim
from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import Value, constant
from evensong.mobile_runtime.compiler.layout import View, last
from evensong.wire.program import Activation


def group_norm(
    b: Builder,
    x: View,
    groups: int,
    gamma: View | None = None,
    beta: View | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = False,
) -> View:
    """Group norm over axis 1 in ``groups`` parts and over all axes behind it."""
    order = last(x, b.example_axis(x, 1, "group norm"))
    operand = b.arrange(x, order)
    channels = x.shape[1]
    lines = operand.reshaped((operand.dims[0], operand.elements // (operand.dims[0] * channels), channels))
    statistics = (lines.dims[0], groups)
    operands = [lines, _affine(b, gamma, 1.0, channels), _affine(b, beta, 0.0, channels)]
    result, _, _ = b.emit_all("GROUP_NORM", operands, [lines.dims, statistics, statistics], eps=eps)
    return View(result.reshaped(operand.dims), b.shape, order)


def instance_norm(
    b: Builder,
    x: View,
    gamma: View | None,
    beta: View | None,
    running_mean: View | None,
    running_var: View | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> View:
    """Instance norm: a group norm whose groups are single channels."""
    require(use_input_stats, "instance norm with running statistics", fix="Use track_running_stats=False.")
    return group_norm(b, x, x.shape[1], gamma, beta, eps)


def rms_norm(
    b: Builder, x: View, normalized_shape: Sequence[int], gamma: View | None = None, eps: float | None = None
) -> View:
    """RMS norm over the last ``len(normalized_shape)`` axes."""
    rank = len(x.shape)
    axes = [b.example_axis(x, axis, "RMS norm") for axis in range(rank - len(normalized_shape), rank)]
    order = (*(a for a in x.order if a not in axes), *axes)
    operand = b.arrange(x, order)
    size = math.prod(normalized_shape)
    rows = operand.reshaped((operand.elements // size, size))
    chosen = float(np.finfo(np.float32).eps) if eps is None else eps  # as torch chooses it
    result, _ = b.emit_all("RMS_NORM", [rows, _affine(b, gamma, 1.0, size)], [rows.dims, rows.dims[:1]], eps=chosen)
    return View(result.reshaped(operand.dims), b.shape, order)


def variance(
    b: Builder,
    x: View,
    dim: Sequence[int] | int | None = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> View:
    """Variance over axes: the mean of squared distances from the mean, by ``size / (size - correction)``."""
    require(dim is not None, "a variance over everything", fix="Name the axes: x.var(dim=(1, 2)).")
    axes = [x.axis(axis) for axis in ([dim] if isinstance(dim, int) else dim or ())]
    shape = b.shape
    b.shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    distance = sub(b, x, mean(b, x, axes, keepdim=True))
    b.shape = shape
    average = mean(b, mul(b, distance, distance), axes, keepdim)
    size = math.prod(x.shape[axis] for axis in axes)
    lost = int(unbiased) if correction is None else correction
    require(size > lost, "a variance of fewer elements than its correction", expected=f"more than {lost}", got=size)
    return scale(b, average, size / (size - lost), 0.0)


def deviation(b: Builder, *arguments: Any, **options: Any) -> View:
    """Standard deviation over axes."""
    return unary(b, variance(b, *arguments, **options), Activation.SQRT)


def vector_norm(
    b: Builder, x: View, order: float = 2, dim: Sequence[int] | int | None = None, keepdim: bool = False
) -> View:
    """Euclidean norm over axes."""
    require(order == 2, "a norm other than the Euclidean", got=order)
    return unary(b, sum_dim(b, mul(b, x, x), dim, keepdim), Activation.SQRT)


def _affine(b: Builder, view: View | None, neutral: float, size: int) -> Value:
    if view is None:
        return constant(np.full(size, neutral, np.float32))
    return b.arrange(view, range(len(view.shape))).reshaped((size,))


TABLE: dict[str, Callable[..., Any]] = {
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.var.dim": variance,
    "aten.var.correction": variance,
    "aten.std.dim": deviation,
    "aten.std.correction": deviation,
    "aten.linalg_vector_norm.default": vector_norm,
}
