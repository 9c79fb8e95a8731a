"""LINEAR and its gradients. Rows ``M`` are all leading dimensions together; a weight is ``[O, I]``."""

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
}
