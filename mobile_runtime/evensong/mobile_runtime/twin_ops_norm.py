"""Normalisation: ``x_hat = (x - mean) * rstd``, ``rstd = 1 / sqrt(biased variance + eps)``; RMS norm has no mean."""

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


def group_norm(call: Call, x: Array, gamma: Array, beta: Array, *, eps: float) -> tuple[Array, Array, Array]:
    groups = _grouped(x, call.shapes[1][1])
    mean = groups.mean(axis=(1, 3), keepdims=True)
    rstd = 1 / np.sqrt(groups.var(axis=(1, 3), keepdims=True) + np.float32(eps))
    return ((groups - mean) * rstd).reshape(x.shape) * gamma + beta, mean, rstd


def group_norm_grad(
    call: Call, dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    count = mean.shape[1]
    mean, rstd = (statistic.reshape(len(x), 1, count, 1) for statistic in (mean, rstd))
    x_hat, g = (_grouped(x, count) - mean) * rstd, _grouped(dy * gamma, count)
    g_mean, product_mean = (v.mean(axis=(1, 3), keepdims=True) for v in (g, g * x_hat))
    dgamma = rows(dy * x_hat.reshape(x.shape)).sum(axis=0)
    return rstd * (g - g_mean - x_hat * product_mean), dgamma, rows(dy).sum(axis=0)


def _grouped(x: Array, groups: int) -> Array:
    """``[N, L, C]`` as ``[N, L, G, C / G]``."""
    return x.reshape(*x.shape[:2], groups, -1)


def rms_norm(call: Call, x: Array, gamma: Array, *, eps: float) -> tuple[Array, Array]:
    x = x.reshape(-1, gamma.size)
    rstd = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(eps))
    return x * rstd * gamma.ravel(), rstd


def rms_norm_grad(call: Call, dy: Array, x: Array, gamma: Array, rstd: Array) -> tuple[Array, Array]:
    dy, x_hat = dy.reshape(-1, gamma.size), x.reshape(-1, gamma.size) * rstd.reshape(-1, 1)
    g = dy * gamma.ravel()
    dx = rstd.reshape(-1, 1) * (g - x_hat * (g * x_hat).mean(axis=1, keepdims=True))
    return dx, (dy * x_hat).sum(axis=0)


KERNELS: dict[str, Kernel] = {
    "BATCH_NORM_TRAIN": batch_norm_train,
    "BATCH_NORM_GRAD": batch_norm_grad,
    "BATCH_NORM_EVAL": batch_norm_eval,
    "BATCH_NORM_EVAL_GRAD": batch_norm_eval_grad,
    "LAYER_NORM": layer_norm,
    "LAYER_NORM_GRAD": layer_norm_grad,
    "GROUP_NORM": group_norm,
    "GROUP_NORM_GRAD": group_norm_grad,
    "RMS_NORM": rms_norm,
    "RMS_NORM_GRAD": rms_norm_grad,
}
