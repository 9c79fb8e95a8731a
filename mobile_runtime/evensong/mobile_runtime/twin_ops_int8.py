"""Quantised operations, bit-exact everywhere: integer sums wrap at 32 bits, every float32 step is rounded by itself."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows
from evensong.mobile_runtime.twin_ops_conv import join_groups, patches, weights
from evensong.mobile_runtime.twin_ops_pool import counts, flat
from evensong.mobile_runtime.twin_windows import conv_windows, pool_windows


def quantize(call: Call, x: Array) -> Array:
    y = call.outputs[0]
    return to_int8(x * (np.float32(1) / np.float32(y.scale)), y.zero_point)


def dequantize(call: Call, x: Array) -> Array:
    source = call.inputs[0]
    return centred(x, source.zero_point) * np.float32(source.scale)


def qlinear(call: Call, x: Array, w: Array, bias: Array, multiplier: Array, *, lo: int, hi: int) -> Array:
    sums = rows(x).astype(np.float64) @ w.T.astype(np.float64)  # exact: far below 2^53
    return requantize(call, sums, bias, multiplier, lo, hi)


def qconv2d(
    call: Call, x: Array, w: Array, bias: Array, multiplier: Array, *, lo: int, hi: int, **geometry: int
) -> Array:
    windows = conv_windows(x.shape, w.shape, call.shapes[0], geometry)
    groups = geometry["groups"]
    gathered = patches(windows.gather(x, call.inputs[0].zero_point), groups).astype(np.float64)
    sums = join_groups(gathered @ weights(w, groups).swapaxes(1, 2).astype(np.float64))
    return requantize(call, sums, bias, multiplier, lo, hi)


def requantize(call: Call, sums: Array, bias: Array, multiplier: Array, lo: int, hi: int) -> Array:
    accumulator = (sums.astype(np.int64) + bias).astype(np.int32)  # wraps at 32 bits
    return to_int8(accumulator.astype(np.float32) * multiplier, call.outputs[0].zero_point, lo, hi)


def qadd(call: Call, a: Array, b: Array, *, scale_a: float, scale_b: float, lo: int, hi: int) -> Array:
    scaled_a = centred(a, call.inputs[0].zero_point) * np.float32(scale_a)
    scaled_b = centred(b, call.inputs[1].zero_point) * np.float32(scale_b)
    return to_int8(scaled_a + scaled_b, call.outputs[0].zero_point, lo, hi)


def qmax_pool2d(call: Call, x: Array, **geometry: int) -> tuple[Array, Array]:
    windows = flat(pool_windows(x.shape, call.shapes[0], geometry).gather(x.astype(np.int16), -129))
    return windows.max(axis=3), windows.argmax(axis=3)  # padding never wins; argmax takes the first of equals


def qavg_pool2d(call: Call, x: Array, *, count_include_pad: int, ratio: float, **geometry: int) -> Array:
    windows = pool_windows(x.shape, call.shapes[0], geometry)
    zero_point = call.inputs[0].zero_point
    sums = flat(windows.gather(x.astype(np.int32) - zero_point, 0)).sum(axis=3)
    factor = np.float32(ratio) / counts(windows, count_include_pad)
    return to_int8(sums.astype(np.float32) * factor, call.outputs[0].zero_point)


def qlut(call: Call, x: Array, table: Array) -> Array:
    return table[x.astype(np.int32) + 128]


def centred(x: Array, zero_point: int) -> Array:
    return (x.astype(np.int32) - zero_point).astype(np.float32)


def to_int8(values: Array, zero_point: int, lo: int = -128, hi: int = 127) -> Array:
    """``clamp(rne(values) + zero_point, lo, hi)``; NaN counts as 0."""
    rounded = np.rint(np.where(np.isnan(values), np.float32(0), values)).astype(np.float64)
    return np.clip(rounded + zero_point, lo, hi).astype(np.int8)


KERNELS: dict[str, Kernel] = {
    "QUANTIZE": quantize,
    "DEQUANTIZE": dequantize,
    "QLINEAR": qlinear,
    "QCONV2D": qconv2d,
    "QADD": qadd,
    "QMAX_POOL2D": qmax_pool2d,
    "QAVG_POOL2D": qavg_pool2d,
    "QLUT": qlut,
}
