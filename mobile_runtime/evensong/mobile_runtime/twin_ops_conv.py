"""CONV2D and its gradients as matrix products over patches: per group, ``patches [M, K]`` times ``weight [O/g, K]``."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows
from evensong.mobile_runtime.twin_ops_linear import activate
from evensong.mobile_runtime.twin_windows import conv_windows


def conv2d(call: Call, x: Array, w: Array, b: Array | None = None, *, activation: int, **geometry: int) -> Array:
    windows = conv_windows(x.shape, w.shape, call.shapes[0], geometry)
    groups = geometry["groups"]
    y = join_groups(patches(windows.gather(x, 0.0), groups) @ weights(w, groups).swapaxes(1, 2))
    return activate(y if b is None else y + b, activation)


def conv2d_grad_input(call: Call, dy: Array, w: Array, **geometry: int) -> Array:
    windows = conv_windows(call.shapes[0], w.shape, dy.shape, geometry)
    groups = geometry["groups"]
    dpatches = split_groups(rows(dy), groups) @ weights(w, groups)  # [g, M, KH KW I/g]
    kernel_h, kernel_w, inputs = w.shape[1:]
    dwindows = dpatches.reshape(groups, *dy.shape[:3], kernel_h, kernel_w, inputs)
    dwindows = np.moveaxis(dwindows, 0, -2)  # [N, OH, OW, KH, KW, g, I/g]
    return windows.scatter(dwindows.reshape(*dwindows.shape[:-2], groups * inputs))


def conv2d_grad_weight(call: Call, dy: Array, x: Array, **geometry: int) -> tuple[Array, Array]:
    windows = conv_windows(x.shape, call.shapes[0], dy.shape, geometry)
    groups = geometry["groups"]
    dw = split_groups(rows(dy), groups).swapaxes(1, 2) @ patches(windows.gather(x, 0.0), groups)
    return dw, rows(dy).sum(axis=0)


def patches(windows: Array, groups: int) -> Array:
    """``[N, OH, OW, KH, KW, C]`` as ``[g, M, KH * KW * C/g]``."""
    *places, kernel_h, kernel_w, channels = windows.shape
    split = windows.reshape(*places, kernel_h, kernel_w, groups, channels // groups)
    return np.moveaxis(split, -2, 0).reshape(groups, -1, kernel_h * kernel_w * (channels // groups))


def weights(w: Array, groups: int) -> Array:
    """``[O, KH, KW, I/g]`` as ``[g, O/g, K]``."""
    return w.reshape(groups, w.shape[0] // groups, -1)


def split_groups(y: Array, groups: int) -> Array:
    """``[M, O]`` as ``[g, M, O/g]``."""
    return y.reshape(len(y), groups, -1).swapaxes(0, 1)


def join_groups(y: Array) -> Array:
    """``[g, M, O/g]`` as ``[M, O]``."""
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)


KERNELS: dict[str, Kernel] = {
    "CONV2D": conv2d,
    "CONV2D_GRAD_INPUT": conv2d_grad_input,
    "CONV2D_GRAD_WEIGHT": conv2d_grad_weight,
}
