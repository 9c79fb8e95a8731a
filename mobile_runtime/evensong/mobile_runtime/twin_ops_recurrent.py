"""GRU and LSTM over whole sequences: ``gx [N, T, G]`` holds the inputs' part of the gates, the state starts at zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evensong.mobile_runtime.twin_call import Array, Call, Kernel, rows
from evensong.mobile_runtime.twin_ops_elementwise import sigmoid


def gru(call: Call, gx: Array, w: Array, b: Array, *, reverse: int) -> tuple[Array, Array]:
    gates, y = np.empty_like(gx), np.empty((*gx.shape[:2], w.shape[1]), gx.dtype)
    for t, h in _steps(y, reverse):
        x_r, x_z, x_n = _parts(gx[:, t], 3)
        h_r, h_z, h_n = _parts(h @ w.T + b, 3)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * h_n)
        gates[:, t] = np.concatenate([r, z, n], axis=1)
        y[:, t] = (1 - z) * n + z * h
    return gates, y


def gru_grad(
    call: Call, dy: Array, gates: Array, y: Array, w: Array, b: Array, *, reverse: int
) -> tuple[Array, Array, Array, Array]:
    hidden = w.shape[1]
    dgx, dg = np.empty_like(gates), np.empty_like(gates)  # they differ where r stands between the parts of n
    dw, dh_next = np.zeros_like(w), np.zeros_like(dy[:, 0])
    for t, h in reversed(list(_steps(y, reverse))):
        r, z, n = _parts(gates[:, t], 3)
        dh = dy[:, t] + dh_next
        h_n = h @ w[2 * hidden :].T + b[2 * hidden :]
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h - n) * z * (1 - z)
        dr = dn * h_n * r * (1 - r)
        dgx[:, t] = np.concatenate([dr, dz, dn], axis=1)
        dg[:, t] = np.concatenate([dr, dz, dn * r], axis=1)
        dw += dg[:, t].T @ h
        dh_next = dh * z + dg[:, t] @ w
    return dgx, dg[:, :, 2 * hidden :], dw, rows(dg).sum(axis=0)


def lstm(call: Call, gx: Array, w: Array, b: Array, *, reverse: int) -> tuple[Array, Array]:
    gates, y = np.empty_like(gx), np.empty((*gx.shape[:2], w.shape[1]), gx.dtype)
    c = np.zeros_like(y[:, 0])
    for t, h in _steps(y, reverse):
        i, f, g, o = _parts(gx[:, t] + h @ w.T + b, 4)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        gates[:, t] = np.concatenate([i, f, g, o], axis=1)
        c = f * c + i * g
        y[:, t] = o * np.tanh(c)
    return gates, y


def lstm_grad(
    call: Call, dy: Array, gates: Array, y: Array, w: Array, *, reverse: int
) -> tuple[Array, Array, Array, Array]:
    c = np.empty_like(y)
    for t, before in _steps(c, reverse):
        i, f, g, _ = _parts(gates[:, t], 4)
        c[:, t] = f * before + i * g
    dgx, dw = np.empty_like(gates), np.zeros_like(w)
    dh_next, dc = np.zeros_like(dy[:, 0]), np.zeros_like(dy[:, 0])
    for (t, h), (_, c_before) in reversed(list(zip(_steps(y, reverse), _steps(c, reverse), strict=True))):
        i, f, g, o = _parts(gates[:, t], 4)
        dh, tanh_c = dy[:, t] + dh_next, np.tanh(c[:, t])
        dc = dc + dh * o * (1 - tanh_c**2)
        parts = [dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)]
        dgx[:, t] = np.concatenate(parts, axis=1)
        dw += dgx[:, t].T @ h
        dc, dh_next = dc * f, dgx[:, t] @ w
    return dgx, c, dw, rows(dgx).sum(axis=0)


def _steps(states: Array, reverse: int) -> Iterator[tuple[int, Array]]:
    """For each time in the order of computation: the time, and the state before it."""
    order = range(states.shape[1])
    before = np.zeros_like(states[:, 0])
    for t in reversed(order) if reverse else order:
        yield t, before
        before = states[:, t]


def _parts(gates: Array, count: int) -> list[Array]:
    return np.split(gates, count, axis=-1)


KERNELS: dict[str, Kernel] = {"GRU": gru, "GRU_GRAD": gru_grad, "LSTM": lstm, "LSTM_GRAD": lstm_grad}
