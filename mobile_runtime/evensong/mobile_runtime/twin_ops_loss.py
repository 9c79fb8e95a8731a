"""Softmax and the losses. Every loss is a mean; its gradient comes with it."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.twin_call import Array, Call, Kernel, finite_loss, rows
from evensong.mobile_runtime.twin_ops_elementwise import sigmoid


def softmax(call: Call, x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_grad(call: Call, dy: Array, y: Array) -> Array:
    dy, y = rows(dy), rows(y)
    return y * (dy - (dy * y).sum(axis=1, keepdims=True))


def log_softmax(call: Call, x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_softmax_grad(call: Call, dy: Array, y: Array) -> Array:
    dy, y = rows(dy), rows(y)
    return dy - np.exp(y) * dy.sum(axis=1, keepdims=True)


def cross_entropy(call: Call, logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    logits, labels = rows(logits), labels.ravel()
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ExampleError(
            "a label is out of range",
            expected=f"0 to {logits.shape[1] - 1}",
            got=f"{labels.min()} to {labels.max()}",
        )
    at_label = (np.arange(len(labels)), labels)
    log_p = log_softmax(call, logits)
    dlogits = np.exp(log_p)
    dlogits[at_label] -= 1
    loss = -log_p[at_label].mean(dtype=np.float64)
    return finite_loss(loss), count(logits.argmax(axis=1) == labels), dlogits / np.float32(len(labels))


def mse(call: Call, prediction: Array, target: Array) -> tuple[Array, Array, Array]:
    error = prediction - target
    loss = np.mean(error.astype(np.float64) ** 2)
    return finite_loss(loss), np.zeros(1, np.int32), np.float32(2) * error / np.float32(error.size)


def bce_with_logits(call: Call, logits: Array, target: Array) -> tuple[Array, Array, Array]:
    losses = np.maximum(logits, 0) - logits * target + np.log1p(np.exp(-np.abs(logits)))
    right = (logits > 0) == (target > 0.5)
    dlogits = (sigmoid(logits) - target) / np.float32(logits.size)
    return finite_loss(losses.mean(dtype=np.float64)), count(right), dlogits


def count(right: Array) -> Array:
    return np.array([np.count_nonzero(right)], np.int32)


KERNELS: dict[str, Kernel] = {
    "SOFTMAX": softmax,
    "SOFTMAX_GRAD": softmax_grad,
    "LOG_SOFTMAX": log_softmax,
    "LOG_SOFTMAX_GRAD": log_softmax_grad,
    "CROSS_ENTROPY": cross_entropy,
    "MSE": mse,
    "BCE_WITH_LOGITS": bce_with_logits,
}
