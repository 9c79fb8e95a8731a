"""Batch and layer normalisation: ``x_hat = (x - mean) * rstd``, ``rstd = 1 / sqrt(biased variance + eps)``."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows


def batch_norm_train(
    call: Call,
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    *,
    eps: float,
    momentum: float,
) -> tuple[Array, Array, Array]:
    x = rows(x)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    unbiased = variance * np.float32(len(x) / max(len(x) - 1, 1))
    keep, take = np.float32(1 - momentum), np.float32(momentum)
    running_mean[...] = keep * running_mean + take * mean
    running_var[...] = keep * running_var + take * unbiased
    rstd = 1 / np.sqrt(variance + np.float32(eps))
    return (x - mean) * rstd * gamma + beta, mean, rstd


def batch_norm_grad(
    call: Call, dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    dy, x_hat = rows(dy), (rows(x) - mean) * rstd
    dgamma, dbeta = (dy * x_hat).sum(axis=0), dy.sum(axis=0)
    count = np.float32(len(dy))
    return gamma * rstd * (dy - dbeta / count - x_hat * dgamma / count), dgamma, dbeta


def batch_norm_eval(call: Call, x: Array, gamma: Array, beta: Array, mean: Array, var: Array, *, eps: float) -> Array:
    return (rows(x) - mean) / np.sqrt(var + np.float32(eps)) * gamma + beta


def batch_norm_eval_grad(
    call: Call, dy: Array, x: Array, gamma: Array, mean: Array, var: Array, *, eps: float
) -> tuple[Array, Array, Array]:
    dy = rows(dy)
    rstd = 1 / np.sqrt(var + np.float32(eps))
    return dy * gamma * rstd, (dy * (rows(x) - mean) * rstd).sum(axis=0), dy.sum(axis=0)


def layer_norm(call: Call, x: Array, gamma: Array, beta: Array, *, eps: float) -> tuple[Array, Array, Array]:
    x = x.reshape(-1, gamma.size)
    mean = x.mean(axis=1, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axis=1, keepdims=True) + np.float32(eps))
    return (x - mean) * rstd * gamma.ravel() + beta.ravel(), mean, rstd


def layer_norm_grad(
    call: Call, dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    dy, x = dy.reshape(-1, gamma.size), x.reshape(-1, gamma.size)
    x_hat = (x - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
    g = dy * gamma.ravel()
    dx = rstd.reshape(-1, 1) * (g - g.mean(axis=1, keepdims=True) - x_hat * (g * x_hat).mean(axis=1, keepdims=True))
    return dx, (dy * x_hat).sum(axis=0), dy.sum(axis=0)


KERNELS: dict[str, Kernel] = {
    "BATCH_NORM_TRAIN": batch_norm_train,
    "BATCH_NORM_GRAD": batch_norm_grad,
    "BATCH_NORM_EVAL": batch_norm_eval,
    "BATCH_NORM_EVAL_GRAD": batch_norm_eval_grad,
    "LAYER_NORM": layer_norm,
    "LAYER_NORM_GRAD": layer_norm_grad,
}
