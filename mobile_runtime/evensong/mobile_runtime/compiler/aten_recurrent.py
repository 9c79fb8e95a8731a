"""ATen calls of recurrent layers: GRU and LSTM over whole sequences, several layers, one direction or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evensong.mobile_runtime.compiler.aten_layers import dropout as dropped
from evensong.mobile_runtime.compiler.builder import Builder, require
from evensong.mobile_runtime.compiler.ir import Value, constant
from evensong.mobile_runtime.compiler.layout import PROBE_BATCH, View
from evensong.wire.program import Activation


def gru(b: Builder, x: View, state: View, *arguments: Any) -> list[View]:
    """``aten.gru.input``: the states of the last layer, and the last states of all layers."""
    _check_starts_at_zero(state)
    return list(_layers(b, "GRU", x, *arguments))


def lstm(b: Builder, x: View, states: Sequence[View], *arguments: Any) -> list[View | str]:
    """``aten.lstm.input``: as :func:`gru`; the last cell states are not available."""
    for state in states:
        _check_starts_at_zero(state)
    return [*_layers(b, "LSTM", x, *arguments), "the last cell states of an LSTM"]


def _layers(
    b: Builder,
    op: str,
    x: View,
    weights: Sequence[View],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[View, View]:
    """``weights`` are those of torch: w_ih, w_hh and, with biases, b_ih, b_hh for each layer and direction in turn."""
    time = 1 if batch_first else 0
    require(len(x.shape) == 3 and x.batch_axis == 1 - time, f"{op} over something but a batch of sequences")
    require(len(weights) == num_layers * (1 + bidirectional) * (4 if has_biases else 2), f"{op} with projections")
    order = (1 - time, time, 2)
    value = b.arrange(x, order)
    parameters = iter(weights)
    last: list[Value] = []
    for layer in range(num_layers):
        if layer:
            value = dropped(b, View(value, x.shape, order), dropout, train).value
        directions = []
        for reverse in range(1 + bidirectional):
            given = [next(parameters) for _ in range(4 if has_biases else 2)]
            directions.append(_layer(b, op, value, given, reverse))
            last.append(_step(b, directions[-1], 0 if reverse else x.shape[time] - 1))
        value = directions[0] if len(directions) == 1 else _joined(b, directions, 2)
    states = _joined(b, last, 1)
    output = View(value, (*x.shape[:2], value.dims[2]), order)
    return output, View(states, (states.dims[1], PROBE_BATCH, states.dims[2]), (1, 0, 2))


def _layer(b: Builder, op: str, x: Value, parameters: Sequence[View], reverse: int) -> Value:
    """All states of one layer in one direction, ``[n, steps, hidden]``."""
    w_ih, w_hh = (b.arrange(weight, (0, 1)) for weight in parameters[:2])
    gates, hidden = w_hh.dims
    b_ih, b_hh = [b.arrange(bias, (0,)) for bias in parameters[2:]] or [constant(np.zeros(gates, np.float32))] * 2
    rows, steps, _ = x.dims
    gx = b.emit("LINEAR", [x, w_ih, b_ih], (rows, steps, gates), activation=Activation.NONE)
    _, y = b.emit_all(op, [gx, w_hh, b_hh], [(rows, steps, gates), (rows, steps, hidden)], reverse=reverse)
    return y


def _step(b: Builder, states: Value, at: int) -> Value:
    rows, _, hidden = states.dims
    return b.emit("SLICE", [states], (rows, 1, hidden), axis=1, start=at)


def _joined(b: Builder, parts: Sequence[Value], axis: int) -> Value:
    dims = list(parts[0].dims)
    dims[axis] = sum(part.dims[axis] for part in parts)
    return parts[0] if len(parts) == 1 else b.emit("CONCAT", parts, dims, axis=axis)


def _check_starts_at_zero(state: View) -> None:
    data = state.value.root.data
    require(
        data is not None and not data.any() and not state.value.batched,
        "a recurrent layer that starts from a given state",
        expected="no initial state: it is zero",
    )


TABLE: dict[str, Callable[..., Any]] = {"aten.gru.input": gru, "aten.lstm.input": lstm}
