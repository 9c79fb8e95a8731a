"""Matrix products. Rows ``M`` of LINEAR are all leading dimensions together; a weight is ``[O, I]``."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows
from evensong.wire.program import Activation


def linear(call: Call, x: Array, w: Array, b: Array | None = None, *, activation: int) -> Array:
    y = rows(x) @ w.T
    return activate(y if b is None else y + b, activation)


def linear_grad_input(call: Call, dy: Array, w: Array) -> Array:
    return rows(dy) @ w


def linear_grad_weight(call: Call, dy: Array, x: Array) -> tuple[Array, Array]:
    return rows(dy).T @ rows(x), rows(dy).sum(axis=0)


def matmul(call: Call, a: Array, b: Array, *, transpose: int) -> Array:
    left, right = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    return (left.swapaxes(1, 2) if transpose == 1 else left) @ (right.swapaxes(1, 2) if transpose == 2 else right)


def attention(call: Call, q: Array, k: Array, v: Array, *, causal: int, scale: float) -> tuple[Array, Array]:
    scores = _scores(q, k, causal, scale)
    most = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(axis=-1, keepdims=True)
    y = np.einsum("nhts,nshe->nthe", weights / total, v)
    return y, (most + np.log(total))[..., 0].swapaxes(1, 2)


def attention_grad(
    call: Call, dy: Array, q: Array, k: Array, v: Array, lse: Array, *, causal: int, scale: float
) -> tuple[Array, Array, Array]:
    weights = np.exp(_scores(q, k, causal, scale) - lse.swapaxes(1, 2)[..., None])
    dweights = np.einsum("nthe,nshe->nhts", dy, v)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) * np.float32(scale)
    dq, dk = np.einsum("nhts,nshd->nthd", dscores, k), np.einsum("nhts,nthd->nshd", dscores, q)
    return dq, dk, np.einsum("nhts,nthe->nshe", weights, dy)


def _scores(q: Array, k: Array, causal: int, scale: float) -> Array:
    """``[N, heads, T, S]``; minus infinity where a query may not look."""
    scores = np.einsum("nthd,nshd->nhts", q, k) * np.float32(scale)
    hidden = np.triu(np.ones(scores.shape[2:], bool), 1)
    return np.where(hidden, -np.inf, scores) if causal else scores


def activate(y: Array, activation: int) -> Array:
    """The activations that LINEAR and CONV2D fuse."""
    if activation == Activation.RELU:
        return np.maximum(y, np.float32(0))
    if activation == Activation.RELU6:
        return np.clip(y, np.float32(0), np.float32(6))
    return y


KERNELS: dict[str, Kernel] = {
    "LINEAR": linear,
    "LINEAR_GRAD_INPUT": linear_grad_input,
    "LINEAR_GRAD_WEIGHT": linear_grad_weight,
    "MATMUL": matmul,
    "ATTENTION": attention,
    "ATTENTION_GRAD": attention_grad,
}
