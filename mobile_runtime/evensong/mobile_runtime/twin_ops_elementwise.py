"""Element-wise operations, small reductions and dropout."""

from __future__ import annotations

import math

import numpy as np

from evensong.mobile_runtime.philox import uniform
from evensong.mobile_runtime.twin_call import Array, Call, Kernel
from evensong.wire.program import Activation

erf = np.vectorize(math.erf, otypes=[np.float64])


def unary(call: Call, x: Array, *, kind: int) -> Array:
    match kind:
        case Activation.RELU:
            return np.maximum(x, np.float32(0))
        case Activation.RELU6:
            return np.clip(x, np.float32(0), np.float32(6))
        case Activation.HARDSWISH:
            return x * np.clip(x + np.float32(3), 0, 6) / np.float32(6)
        case Activation.GELU:
            return x * normal_cdf(x)
        case Activation.GELU_TANH:
            return x * (1 + np.tanh(gelu_argument(x))) / 2
        case Activation.SIGMOID:
            return sigmoid(x)
        case Activation.TANH:
            return np.tanh(x)
        case Activation.SILU:
            return x * sigmoid(x)
        case Activation.EXP:
            return np.exp(x)
        case Activation.LOG:
            return np.log(x)
        case Activation.SQRT:
            return np.sqrt(x)
        case Activation.RECIPROCAL:
            return 1 / x
    raise AssertionError(kind)  # the verifier refuses every other kind


def unary_grad(call: Call, dy: Array, s: Array, *, kind: int) -> Array:
    """``s`` is the forward output where ``Activation.gradient_reads_output``, else the forward input."""
    match kind:
        case Activation.RELU:
            return np.where(s > 0, dy, np.float32(0))
        case Activation.RELU6:
            return np.where((s > 0) & (s < 6), dy, np.float32(0))
        case Activation.HARDSWISH:
            inner = s / np.float32(3) + np.float32(0.5)
            return dy * np.where(s < -3, np.float32(0), np.where(s <= 3, inner, np.float32(1)))
        case Activation.GELU:
            density = np.exp(-(s.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
            return dy * (normal_cdf(s) + s * density)
        case Activation.GELU_TANH:
            t = np.tanh(gelu_argument(s))
            slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * s.astype(np.float64) ** 2)
            return dy * ((1 + t) / 2 + s * (1 - t**2) * slope / 2)
        case Activation.SIGMOID:
            return dy * s * (1 - s)
        case Activation.TANH:
            return dy * (1 - s * s)
        case Activation.SILU:
            p = sigmoid(s)
            return dy * p * (1 + s * (1 - p))
        case Activation.EXP:
            return dy * s
        case Activation.LOG:
            return dy / s
        case Activation.SQRT:
            return dy / (2 * s)
        case Activation.RECIPROCAL:
            return -dy * s * s
    raise AssertionError(kind)


def normal_cdf(x: Array) -> Array:
    return (1 + erf(x / math.sqrt(2))) / 2


def gelu_argument(x: Array) -> Array:
    x = x.astype(np.float64)
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def sigmoid(x: Array) -> Array:
    """Without overflow: ``exp`` only ever sees arguments <= 0."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def add(call: Call, a: Array, b: Array) -> Array:
    return a + row(b, a)


def sub(call: Call, a: Array, b: Array) -> Array:
    return a - row(b, a)


def mul(call: Call, a: Array, b: Array) -> Array:
    return a * row(b, a)


def maximum(call: Call, a: Array, b: Array) -> Array:
    return np.maximum(a, row(b, a))


def minimum(call: Call, a: Array, b: Array) -> Array:
    return np.minimum(a, row(b, a))


def step(call: Call, a: Array, b: Array, *, at_equal: float) -> Array:
    return np.select([a > row(b, a), a == row(b, a)], [np.float32(1), np.float32(at_equal)], np.float32(0))


def row(b: Array, a: Array) -> Array:
    """``b`` repeated to the shape of ``a``: element ``i`` is ``b[i % len(b)]``."""
    return np.resize(b, a.shape)


def scale(call: Call, x: Array, *, alpha: float, beta: float) -> Array:
    return np.float32(alpha) * x + np.float32(beta)


def sum_rows(call: Call, x: Array) -> Array:
    return x.reshape(-1, math.prod(call.shapes[0])).sum(axis=0)


def reduce_mean(call: Call, x: Array, *, axis_size: int, inner_size: int) -> Array:
    return x.reshape(-1, axis_size, inner_size).mean(axis=1)


def reduce_mean_grad(call: Call, dy: Array, *, axis_size: int, inner_size: int) -> Array:
    share = dy.reshape(-1, 1, inner_size) / np.float32(axis_size)
    return np.repeat(share, axis_size, axis=1)


def dropout(call: Call, x: Array, *, p: float, stream: int) -> tuple[Array, Array]:
    keep = uniform(x.size, call.clock.seed, call.clock.step, stream).reshape(x.shape) >= np.float32(p)
    return np.where(keep, x / keep_probability(p), np.float32(0)), keep.astype(np.uint8)


def dropout_grad(call: Call, dy: Array, mask: Array, *, p: float) -> Array:
    return np.where(mask != 0, dy / keep_probability(p), np.float32(0))


def activation_mask(call: Call, y: Array, *, kind: int) -> Array:
    passes = (y > 0) & (y < 6) if kind == Activation.RELU6 else y > 0
    return np.packbits(passes, axis=-1, bitorder="little")


def mask_grad(call: Call, dy: Array, mask: Array) -> Array:
    bits = np.unpackbits(mask.reshape(-1, mask.shape[-1]), axis=-1, count=dy.shape[-1], bitorder="little")
    return np.where(bits.reshape(dy.shape), dy, np.float32(0))


def keep_probability(p: float) -> np.float32:
    return np.float32(1) - np.float32(p)


def fill(call: Call, *, value: float) -> Array:
    return np.full(call.shapes[0], value, np.float32)


KERNELS: dict[str, Kernel] = {
    "UNARY": unary,
    "UNARY_GRAD": unary_grad,
    "ADD": add,
    "SUB": sub,
    "MUL": mul,
    "MAXIMUM": maximum,
    "MINIMUM": minimum,
    "STEP": step,
    "SCALE": scale,
    "SUM_ROWS": sum_rows,
    "REDUCE_MEAN": reduce_mean,
    "REDUCE_MEAN_GRAD": reduce_mean_grad,
    "DROPOUT": dropout,
    "DROPOUT_GRAD": dropout_grad,
    "ACTIVATION_MASK": activation_mask,
    "MASK_GRAD": mask_grad,
    "FILL": fill,
}
