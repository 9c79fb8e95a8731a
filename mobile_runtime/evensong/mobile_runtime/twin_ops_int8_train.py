"""Int8 training, bit-exact everywhere: int32 sums that wrap, float32 steps that are each rounded by themselves.

Gradients are int8 with a scale in ``grads[index, 0]``; ``grads[index, 1]`` is the scale that the last step proposes for
the next. docs/artifact.md has the formulas, and says what *stochastic rounding* draws.
"""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.errors import DivergedError
from evensong.mobile_runtime.philox import philox
from evensong.mobile_runtime.twin_call import Array, Call, Clock, Kernel, rows
from evensong.mobile_runtime.twin_ops_conv import patches, split_groups, weights
from evensong.mobile_runtime.twin_ops_int8 import centred, to_int8
from evensong.mobile_runtime.twin_ops_pool import max_pool2d_grad
from evensong.mobile_runtime.twin_windows import conv_windows

MOST = np.float32(127)
MOST_BIAS = np.float32(1 << 30)
LEAST_SCALE = np.float32(1e-30)
HEADROOM = np.float32(1.25) / MOST  #: of a delayed scale over the largest value of the step before
DECAY = np.float32(0.5)  #: the least share of its scale that a gradient keeps from step to step
_HALF = np.float32(0.5)


# ------------------------------------------------------------------------------------------------------------- forward


def prepare(
    call: Call, w: Array, w_scale: Array, scales: Array, b: Array | None = None, *, x: int, y: int, zero_point: int
) -> tuple[Array, Array]:
    unit = w_scale * scales[x]  # of one unit of the sum
    start = np.zeros(len(w), np.int64)
    if b is not None:
        start = _integers(_bounded(b / unit, MOST_BIAS))
    sums = w.astype(np.int64).sum(axis=1)
    return (start - zero_point * sums).astype(np.int32), unit / scales[y]


def observe(call: Call, x: Array, peaks: Array, *, index: int, limit: int) -> None:
    largest = np.abs(x.astype(np.int32) - call.inputs[0].zero_point).max()
    peaks[index] = max(peaks[index], np.float32(largest) / np.float32(limit))


def adapt(call: Call, scales: Array, peaks: Array, *, grow: float, shrink: float) -> None:
    factor = np.where(peaks >= 1, np.float32(grow), np.maximum(peaks, np.float32(shrink)))
    scales[...] = np.where(peaks > 0, scales * factor, scales)
    peaks[...] = 0


def quantize(call: Call, x: Array, scales: Array, *, index: int) -> Array:
    return to_int8(x * (np.float32(1) / scales[index]), call.outputs[0].zero_point)


def dequantize(call: Call, x: Array, scales: Array, *, index: int) -> Array:
    return centred(x, call.inputs[0].zero_point) * scales[index]


def add(call: Call, left: Array, right: Array, scales: Array, *, a: int, b: int, y: int, lo: int, hi: int) -> Array:
    scaled_left = centred(left, call.inputs[0].zero_point) * (scales[a] / scales[y])
    scaled_right = centred(right, call.inputs[1].zero_point) * (scales[b] / scales[y])
    return to_int8(scaled_left + scaled_right, call.outputs[0].zero_point, lo, hi)


# ----------------------------------------------------------------------------------------------------------- gradients


def quantize_gradient(call: Call, dy: Array, grads: Array, *, index: int, stream: int) -> Array:
    grads[2 * index], g = _on_own_scale(call, dy, stream)
    return g


def dequantize_gradient(call: Call, g: Array, grads: Array, *, index: int) -> Array:
    return g.astype(np.float32) * grads[2 * index]


def mask(call: Call, g: Array, y: Array, *, lo: int, hi: int) -> Array:
    return np.where((y > lo) & (y < hi), g, np.int8(0))


def scale(call: Call, g: Array, w_scale: Array, grads: Array, *, stream: int, **index: int) -> Array:
    values = (g.reshape(-1, len(w_scale)).astype(np.float32) * w_scale).reshape(-1)
    own, result = _on_own_scale(call, values, stream)
    grads[2 * index["to"]] = grads[2 * index["from"]] * own
    return result


def add_gradients(
    call: Call, left: Array, right: Array, grads: Array, *, a: int, b: int, to: int, stream: int
) -> Array:
    values = left.astype(np.float32) * grads[2 * a] + right.astype(np.float32) * grads[2 * b]
    grads[2 * to], result = _on_own_scale(call, values, stream)
    return result


def bias_gradient(call: Call, g: Array, w_scale: Array, grads: Array, **index: int) -> Array:
    sums = rows(g).astype(np.int64).sum(axis=0).astype(np.int32)
    return sums.astype(np.float32) * (grads[2 * index["from"]] / w_scale)


def linear_input(call: Call, g: Array, w: Array, grads: Array, *, stream: int, **index: int) -> Array:
    sums = rows(g).astype(np.float64) @ w.astype(np.float64)
    return _delayed(call, sums, grads, stream, index)


def conv2d_input(call: Call, g: Array, w: Array, grads: Array, *, to: int, stream: int, **geometry: int) -> Array:
    source = geometry.pop("from")
    windows = conv_windows(call.shapes[0], w.shape, g.shape, geometry)
    groups = geometry["groups"]
    spread = split_groups(rows(g).astype(np.float64), groups) @ weights(w, groups).astype(np.float64)
    kernel_h, kernel_w, inputs = w.shape[1:]
    shaped = np.moveaxis(spread.reshape(groups, *g.shape[:3], kernel_h, kernel_w, inputs), 0, -2)
    sums = windows.scatter(shaped.reshape(*shaped.shape[:-2], groups * inputs))
    return _delayed(call, sums, grads, stream, {"from": source, "to": to})


def linear_update(
    call: Call,
    w: Array,
    g: Array,
    x: Array,
    w_scale: Array,
    scales: Array,
    grads: Array,
    residual: Array | None = None,
    *,
    weight_decay: float,
    stream: int,
    **index: int,
) -> None:
    wide = rows(x).astype(np.float64) - call.inputs[2].zero_point
    sums = rows(g).astype(np.float64).T @ wide
    _step(call, w, sums, w_scale, grads[2 * index["from"]] * scales[index["entry"]], residual, weight_decay, stream)


def conv2d_update(
    call: Call,
    w: Array,
    g: Array,
    x: Array,
    w_scale: Array,
    scales: Array,
    grads: Array,
    residual: Array | None = None,
    *,
    weight_decay: float,
    stream: int,
    **geometry: int,
) -> None:
    source, entry = geometry.pop("from"), geometry.pop("entry")
    windows = conv_windows(x.shape, w.shape, g.shape, geometry)
    groups = geometry["groups"]
    wide = x.astype(np.float64) - call.inputs[2].zero_point
    sums = split_groups(rows(g).astype(np.float64), groups).swapaxes(1, 2) @ patches(windows.gather(wide, 0.0), groups)
    _step(call, w, sums.reshape(w.shape), w_scale, grads[2 * source] * scales[entry], residual, weight_decay, stream)


def max_pool2d_gradient(call: Call, g: Array, index: Array, **geometry: int) -> Array:
    return max_pool2d_grad(call, g, index, **geometry)


# ------------------------------------------------------------------------------------------------------------- helpers


def _on_own_scale(call: Call, values: Array, stream: int) -> tuple[np.float32, Array]:
    """The scale under which the largest of ``values`` is 127, and ``values`` on it."""
    values = values.astype(np.float32)
    largest = np.float32(np.abs(np.where(np.isnan(values), np.float32(0), values)).max())
    if np.isinf(largest):
        raise DivergedError("a gradient is not finite")
    chosen = max(largest * (np.float32(1) / MOST), LEAST_SCALE)
    return chosen, _stochastic(values * (np.float32(1) / chosen), call.clock, stream, MOST).astype(np.int8)


def _delayed(call: Call, exact: Array, grads: Array, stream: int, index: dict[str, int]) -> Array:
    """``exact`` sums on the scale that the last step proposed; proposes one for the next."""
    sums = exact.astype(np.int64).astype(np.int32).astype(np.float32)
    source, to = grads[2 * index["from"]], 2 * index["to"]
    largest = np.float32(np.abs(sums).max()) * source
    proposed = grads[to + 1] if grads[to + 1] > 0 else max(largest * HEADROOM, LEAST_SCALE)
    grads[to] = proposed
    grads[to + 1] = max(largest * HEADROOM, proposed * DECAY, LEAST_SCALE)
    return _stochastic(sums * (source / proposed), call.clock, stream, MOST).astype(np.int8)


def _step(
    call: Call,
    w: Array,
    exact: Array,
    w_scale: Array,
    unit: np.float32,
    residual: Array | None,
    weight_decay: float,
    stream: int,
) -> None:
    """The step of stochastic gradient descent, in units of the weights' own grid."""
    sums = exact.astype(np.int64).astype(np.int32).astype(np.float32).reshape(len(w), -1)
    rate = np.float32(call.clock.learning_rate)
    stored = w.reshape(len(w), -1)
    steps = sums * ((rate * unit) / (w_scale * w_scale))[:, None]
    steps = steps + stored.astype(np.float32) * (rate * np.float32(weight_decay))
    if residual is None:
        moved = _stochastic(steps, call.clock, stream, np.float32(254))
        stored[...] = np.clip(stored.astype(np.int64) - moved, -127, 127)
        return
    rest = residual.reshape(stored.shape)
    whole = stored.astype(np.int64) * 256 + rest
    whole = np.clip(whole - _integers(_bounded(steps * np.float32(256), np.float32(65024))), -32640, 32639)
    stored[...] = (whole + 128) >> 8
    rest[...] = whole - 256 * stored.astype(np.int64)


def _stochastic(values: Array, clock: Clock, stream: int, most: np.float32) -> Array:
    """``clamp(values, -most, most)`` rounded to a neighbour, with a probability that keeps the mean."""
    flat = _bounded(values, most).reshape(-1)
    counter = np.array([[0, stream & 0xFFFFFFFF, clock.step & 0xFFFFFFFF, clock.step >> 32]], np.uint64)
    key = philox(counter, (clock.seed & 0xFFFFFFFF, clock.seed >> 32))[0, 0]
    words = mix(np.arange(len(flat), dtype=np.uint32), np.uint32(key))
    dither = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24) - _HALF
    return np.clip(_integers(flat + dither), -most, most).astype(np.int64).reshape(values.shape)


def mix(index: Array, key: np.uint32) -> Array:
    """A hash of 32 bits whose every bit depends on every bit of ``index * 0x9E3779B9 + key``."""
    with np.errstate(over="ignore"):
        x = index * np.uint32(0x9E3779B9) + key
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(15))


def _bounded(values: Array, most: np.float32) -> Array:
    return np.clip(np.where(np.isnan(values), np.float32(0), values), -most, most)


def _integers(values: Array) -> Array:
    return np.rint(values).astype(np.int64)


KERNELS: dict[str, Kernel] = {
    "Q_PREPARE": prepare,
    "Q_OBSERVE": observe,
    "Q_ADAPT": adapt,
    "Q_QUANTIZE": quantize,
    "Q_DEQUANTIZE": dequantize,
    "Q_ADD": add,
    "G_QUANTIZE": quantize_gradient,
    "G_DEQUANTIZE": dequantize_gradient,
    "G_MASK": mask,
    "G_SCALE": scale,
    "G_ADD": add_gradients,
    "G_BIAS": bias_gradient,
    "G_LINEAR_INPUT": linear_input,
    "G_CONV2D_INPUT": conv2d_input,
    "G_LINEAR_UPDATE": linear_update,
    "G_CONV2D_UPDATE": conv2d_update,
    "G_MAX_POOL2D": max_pool2d_gradient,
}
