"""Optimiser steps, in place, as ``torch.optim`` defines them."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.errors import DivergedError
from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows


def sgd(
    call: Call, w: Array, g: Array, v: Array | None = None, *, momentum: float, weight_decay: float, nesterov: int
) -> None:
    g = g + np.float32(weight_decay) * w
    if v is not None:
        v[...] = np.float32(momentum) * v + g
        g = g + np.float32(momentum) * v if nesterov else v
    w -= np.float32(call.clock.learning_rate) * g
    check_finite(w)


def adam(
    call: Call,
    w: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: int,
) -> None:
    if decoupled:
        w *= np.float32(1 - call.clock.learning_rate * weight_decay)
    else:
        g = g + np.float32(weight_decay) * w
    m[...] = np.float32(beta1) * m + np.float32(1 - beta1) * g
    v[...] = np.float32(beta2) * v + np.float32(1 - beta2) * g * g
    bias1, bias2 = 1 - np.float64(beta1) ** call.clock.step, 1 - np.float64(beta2) ** call.clock.step
    step_size = call.clock.learning_rate / bias1
    root = np.sqrt(v) / np.float32(np.sqrt(bias2))
    w -= np.float32(step_size) * m / (root + np.float32(eps))
    check_finite(w)


def linear_update(call: Call, w: Array, dy: Array, x: Array, *, weight_decay: float) -> None:
    g = rows(dy).T @ rows(x) + np.float32(weight_decay) * w
    w -= np.float32(call.clock.learning_rate) * g
    check_finite(w)


def check_finite(w: Array) -> None:
    if not np.isfinite(w).all():
        raise DivergedError("a weight is not finite after its update")


KERNELS: dict[str, Kernel] = {"SGD": sgd, "ADAM": adam, "LINEAR_UPDATE": linear_update}
