"""Pooling over channels-last images, forward and backward."""

from __future__ import annotations

import numpy as np

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.twin_call import Array, Call, Kernel
from evensong.mobile_runtime.twin_windows import Windows, pool_windows


def max_pool2d(call: Call, x: Array, **geometry: int) -> tuple[Array, Array]:
    windows = flat(pool_windows(x.shape, call.shapes[0], geometry).gather(x, -np.inf))
    return windows.max(axis=3), windows.argmax(axis=3)  # argmax takes the first of equals


def max_pool2d_grad(call: Call, dy: Array, index: Array, **geometry: int) -> Array:
    windows = pool_windows(call.shapes[0], dy.shape, geometry)
    places = np.arange(windows.kernel[0] * windows.kernel[1])[:, None]
    chosen = index[:, :, :, None, :] == places  # [N, OH, OW, KH KW, C]
    if not np.array_equal((chosen & flat(windows.real())).sum(axis=3), np.ones(dy.shape)):
        raise ExampleError("a pooling index points outside its window")
    spread = np.where(chosen, dy[:, :, :, None, :], np.float32(0))
    return windows.scatter(spread.reshape(*dy.shape[:3], *windows.kernel, dy.shape[3]))


def avg_pool2d(call: Call, x: Array, *, count_include_pad: int, **geometry: int) -> Array:
    windows = pool_windows(x.shape, call.shapes[0], geometry)
    return flat(windows.gather(x, 0.0)).sum(axis=3) / counts(windows, count_include_pad)


def avg_pool2d_grad(call: Call, dy: Array, *, count_include_pad: int, **geometry: int) -> Array:
    windows = pool_windows(call.shapes[0], dy.shape, geometry)
    share = (dy / counts(windows, count_include_pad))[:, :, :, None, None, :]
    return windows.scatter(np.broadcast_to(share, (*dy.shape[:3], *windows.kernel, dy.shape[3])))


def counts(windows: Windows, include_pad: int) -> Array:
    """How many places each mean divides by, float32 ``[1, OH, OW, 1]``."""
    real = flat(windows.real())
    count = np.full_like(real, True).sum(axis=3) if include_pad else real.sum(axis=3)
    return count.astype(np.float32)


def flat(windows: Array) -> Array:
    """``[N, OH, OW, KH, KW, C]`` as ``[N, OH, OW, KH * KW, C]``."""
    n, out_h, out_w, kernel_h, kernel_w, channels = windows.shape
    return windows.reshape(n, out_h, out_w, kernel_h * kernel_w, channels)


KERNELS: dict[str, Kernel] = {
    "MAX_POOL2D": max_pool2d,
    "MAX_POOL2D_GRAD": max_pool2d_grad,
    "AVG_POOL2D": avg_pool2d,
    "AVG_POOL2D_GRAD": avg_pool2d_grad,
}
