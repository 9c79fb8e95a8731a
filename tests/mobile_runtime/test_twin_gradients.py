"""Every gradient operation of the twin against finite differences of its forward operation, in float64.

For a random direction ``d`` and cotangent ``c``: ``(f(x + h d) - f(x - h d)) / 2h . c`` equals ``grad(c) . d``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.mobile_runtime.twin import KERNELS
from evensong.mobile_runtime.twin_call import Call, Clock
from evensong.wire.program import Activation

Array = npt.NDArray[Any]


def call(*shapes: tuple[int, ...]) -> Call:
    return Call(shapes, (), (), Clock(0.0, 1, 0))


def assert_gradient(f: Callable[[Array], Array], x: Array, gradient: Callable[[Array], Array]) -> None:
    """``gradient`` maps a cotangent of ``f(x)`` to the cotangent of ``x``."""
    rng = np.random.default_rng(0)
    direction, cotangent = rng.normal(size=x.shape), rng.normal(size=f(x).shape)
    step = 1e-6
    numeric = np.vdot((f(x + step * direction) - f(x - step * direction)) / (2 * step), cotangent)
    exact = np.vdot(gradient(cotangent).reshape(x.shape), direction)
    assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-5)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


@few
@given(seeds)
def test_linear(seed: int) -> None:
    x, w = normal(seed, 5, 3), normal(seed + 1, 4, 3)
    forward = KERNELS["LINEAR"]
    assert_gradient(
        lambda v: forward(call(), v, w, activation=0), x, lambda dy: KERNELS["LINEAR_GRAD_INPUT"](call(), dy, w)
    )
    assert_gradient(
        lambda v: forward(call(), x, v, activation=0), w, lambda dy: KERNELS["LINEAR_GRAD_WEIGHT"](call(), dy, x)[0]
    )
    assert_gradient(
        lambda v: forward(call(), x, w, v, activation=0),
        normal(seed + 2, 4),
        lambda dy: KERNELS["LINEAR_GRAD_WEIGHT"](call(), dy, x)[1],
    )


@few
@given(
    seeds,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
)
def test_convolution(
    seed: int, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int], dilation: int, groups: int
) -> None:
    geometry = {
        "stride_h": stride[0],
        "stride_w": stride[1],
        "pad_top": pad[0],
        "pad_left": pad[1],
        "dilation_h": dilation,
        "dilation_w": dilation,
        "groups": groups,
    }
    x, w = normal(seed, 2, 6, 7, 4), normal(seed + 1, 8, *kernel, 4 // groups)
    out = (
        2,
        *(
            (s + 2 * p - (k - 1) * dilation - 1) // t + 1
            for s, p, k, t in zip((6, 7), pad, kernel, stride, strict=True)
        ),
        8,
    )

    def forward(x: Array, w: Array) -> Array:
        return KERNELS["CONV2D"](call(out), x, w, activation=0, **geometry).reshape(out)

    assert_gradient(
        lambda v: forward(v, w), x, lambda dy: KERNELS["CONV2D_GRAD_INPUT"](call(x.shape), dy, w, **geometry)
    )
    assert_gradient(
        lambda v: forward(x, v), w, lambda dy: KERNELS["CONV2D_GRAD_WEIGHT"](call(w.shape), dy, x, **geometry)[0]
    )


@few
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_pooling(seed: int, kernel: int, stride: int, padded: bool, include: bool) -> None:
    pad = kernel // 2 if padded else 0
    geometry = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    geometry |= {"pad_top": pad, "pad_left": pad}
    x = normal(seed, 2, 6, 5, 3)
    out = (2, (6 + 2 * pad - kernel) // stride + 1, (5 + 2 * pad - kernel) // stride + 1, 3)
    index = KERNELS["MAX_POOL2D"](call(out), x, **geometry)[1]
    assert_gradient(
        lambda v: KERNELS["MAX_POOL2D"](call(out), v, **geometry)[0],
        x,
        lambda dy: KERNELS["MAX_POOL2D_GRAD"](call(x.shape), dy, index, **geometry),
    )
    more = {**geometry, "count_include_pad": int(include)}
    assert_gradient(
        lambda v: KERNELS["AVG_POOL2D"](call(out), v, **more),
        x,
        lambda dy: KERNELS["AVG_POOL2D_GRAD"](call(x.shape), dy, **more),
    )


@few
@given(seeds)
def test_batch_norm(seed: int) -> None:
    x, gamma, beta = normal(seed, 7, 3), normal(seed + 1, 3), normal(seed + 2, 3)

    def forward(x: Array, gamma: Array, beta: Array) -> tuple[Array, Array, Array]:
        return KERNELS["BATCH_NORM_TRAIN"](call(), x, gamma, beta, np.zeros(3), np.ones(3), eps=1e-3, momentum=0.1)

    _, mean, rstd = forward(x, gamma, beta)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        return KERNELS["BATCH_NORM_GRAD"](call(), dy, x, gamma, mean, rstd)

    assert_gradient(lambda v: forward(v, gamma, beta)[0], x, lambda dy: backward(dy)[0])
    assert_gradient(lambda v: forward(x, v, beta)[0], gamma, lambda dy: backward(dy)[1])
    assert_gradient(lambda v: forward(x, gamma, v)[0], beta, lambda dy: backward(dy)[2])

    var = np.abs(normal(seed + 3, 3)) + 0.5

    def frozen(x: Array, gamma: Array, beta: Array) -> Array:
        return KERNELS["BATCH_NORM_EVAL"](call(), x, gamma, beta, mean, var, eps=1e-3)

    def frozen_backward(dy: Array) -> tuple[Array, Array, Array]:
        return KERNELS["BATCH_NORM_EVAL_GRAD"](call(), dy, x, gamma, mean, var, eps=1e-3)

    assert_gradient(lambda v: frozen(v, gamma, beta), x, lambda dy: frozen_backward(dy)[0])
    assert_gradient(lambda v: frozen(x, v, beta), gamma, lambda dy: frozen_backward(dy)[1])
    assert_gradient(lambda v: frozen(x, gamma, v), beta, lambda dy: frozen_backward(dy)[2])


@few
@given(seeds)
def test_layer_norm(seed: int) -> None:
    x, gamma, beta = normal(seed, 4, 6), normal(seed + 1, 6), normal(seed + 2, 6)

    def forward(x: Array, gamma: Array, beta: Array) -> tuple[Array, Array, Array]:
        return KERNELS["LAYER_NORM"](call(), x, gamma, beta, eps=1e-3)

    _, mean, rstd = forward(x, gamma, beta)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        return KERNELS["LAYER_NORM_GRAD"](call(), dy, x, gamma, mean, rstd)

    assert_gradient(lambda v: forward(v, gamma, beta)[0], x, lambda dy: backward(dy)[0])
    assert_gradient(lambda v: forward(x, v, beta)[0], gamma, lambda dy: backward(dy)[1])
    assert_gradient(lambda v: forward(x, gamma, v)[0], beta, lambda dy: backward(dy)[2])


@few
@given(seeds, st.integers(0, 1), st.integers(1, 5))
def test_attention(seed: int, causal: int, keys: int) -> None:
    q, k, v = normal(seed, 2, 4, 2, 3), normal(seed + 1, 2, keys, 2, 3), normal(seed + 2, 2, keys, 2, 5)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return KERNELS["ATTENTION"](call(), q, k, v, causal=causal, scale=0.7)

    y, lse = forward(q, k, v)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        return KERNELS["ATTENTION_GRAD"](call(), dy.reshape(y.shape), q, k, v, lse, causal=causal, scale=0.7)

    assert_gradient(lambda u: forward(u, k, v)[0], q, lambda dy: backward(dy)[0])
    assert_gradient(lambda u: forward(q, u, v)[0], k, lambda dy: backward(dy)[1])
    assert_gradient(lambda u: forward(q, k, u)[0], v, lambda dy: backward(dy)[2])


@few
@given(seeds, st.sampled_from([1, 2, 6]))
def test_group_norm(seed: int, groups: int) -> None:
    x, gamma, beta = normal(seed, 2, 4, 6), normal(seed + 1, 6), normal(seed + 2, 6)
    shapes = (x.shape, (2, groups), (2, groups))

    def forward(x: Array, gamma: Array, beta: Array) -> tuple[Array, Array, Array]:
        return KERNELS["GROUP_NORM"](call(*shapes), x, gamma, beta, eps=1e-3)

    _, mean, rstd = forward(x, gamma, beta)
    mean, rstd = mean.reshape(2, groups), rstd.reshape(2, groups)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        return KERNELS["GROUP_NORM_GRAD"](call(), dy.reshape(x.shape), x, gamma, mean, rstd)

    assert_gradient(lambda v: forward(v, gamma, beta)[0], x, lambda dy: backward(dy)[0])
    assert_gradient(lambda v: forward(x, v, beta)[0], gamma, lambda dy: backward(dy)[1])
    assert_gradient(lambda v: forward(x, gamma, v)[0], beta, lambda dy: backward(dy)[2])


@few
@given(seeds)
def test_rms_norm(seed: int) -> None:
    x, gamma = normal(seed, 4, 6), normal(seed + 1, 6)

    def forward(x: Array, gamma: Array) -> tuple[Array, Array]:
        return KERNELS["RMS_NORM"](call(), x, gamma, eps=1e-3)

    def backward(dy: Array) -> tuple[Array, Array]:
        return KERNELS["RMS_NORM_GRAD"](call(), dy, x, gamma, forward(x, gamma)[1])

    assert_gradient(lambda v: forward(v, gamma)[0], x, lambda dy: backward(dy)[0])
    assert_gradient(lambda v: forward(x, v)[0], gamma, lambda dy: backward(dy)[1])


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
@few
@given(seeds, st.integers(1, 4), st.integers(0, 1))
def test_recurrent(name: str, seed: int, steps: int, reverse: int) -> None:
    hidden = 3
    gates = hidden * (3 if name == "GRU" else 4)
    gx, w, b = normal(seed, 2, steps, gates), normal(seed + 1, gates, hidden), normal(seed + 2, gates)

    def forward(gx: Array, w: Array, b: Array) -> tuple[Array, Array]:
        return KERNELS[name](call(), gx, w, b, reverse=reverse)

    saved = (*forward(gx, w, b), w, b)[: 4 if name == "GRU" else 3]

    def backward(dy: Array) -> list[Array]:
        results = KERNELS[f"{name}_GRAD"](call(), dy.reshape(2, steps, hidden), *saved, reverse=reverse)
        return [results[0], *results[2:]]

    assert_gradient(lambda v: forward(v, w, b)[1], gx, lambda dy: backward(dy)[0])
    assert_gradient(lambda v: forward(gx, v, b)[1], w, lambda dy: backward(dy)[1])
    assert_gradient(lambda v: forward(gx, w, v)[1], b, lambda dy: backward(dy)[2])


@pytest.mark.parametrize("kind", [kind for kind in Activation if kind != Activation.NONE])
@few
@given(seeds)
def test_unary(kind: Activation, seed: int) -> None:
    x = 3 * normal(seed, 20)
    if kind > Activation.SILU:
        x = np.abs(x) + 0.3
    corners = {Activation.RELU: (0,), Activation.RELU6: (0, 6), Activation.HARDSWISH: (-3, 3)}.get(kind, ())
    for corner in corners:
        x = np.where(np.abs(x - corner) < 1e-3, x + 0.01, x)

    def forward(x: Array) -> Array:
        return KERNELS["UNARY"](call(), x, kind=kind)

    saved = forward(x) if kind.gradient_reads_output else x
    assert_gradient(forward, x, lambda dy: KERNELS["UNARY_GRAD"](call(), dy, saved, kind=kind))


@few
@given(seeds)
def test_reductions_and_movement(seed: int) -> None:
    x = normal(seed, 4, 5, 3)
    sizes = {"axis_size": 5, "inner_size": 3}
    assert_gradient(
        lambda v: KERNELS["REDUCE_MEAN"](call((4, 3)), v, **sizes),
        x,
        lambda dy: KERNELS["REDUCE_MEAN_GRAD"](call(x.shape), dy, **sizes),
    )
    assert_gradient(
        lambda v: KERNELS["SLICE"](call((4, 2, 3)), v, axis=1, start=2),
        x,
        lambda dy: KERNELS["SLICE_GRAD"](call(x.shape), dy.reshape(4, 2, 3), axis=1, start=2),
    )
    table, ids = normal(seed + 1, 6, 2), np.array([[1, 5], [1, 0]])
    np.testing.assert_allclose(  # linear: the adjoint is exact
        np.vdot(KERNELS["EMBEDDING"](call(), ids, table), np.ones((2, 2, 2))),
        np.vdot(KERNELS["EMBEDDING_GRAD"](call(table.shape), np.ones((2, 2, 2)), ids), table),
        rtol=1e-6,
    )


@few
@given(seeds)
def test_softmax(seed: int) -> None:
    x = normal(seed, 4, 6)
    for name in ("SOFTMAX", "LOG_SOFTMAX"):
        y = KERNELS[name](call(), x)

        def backward(dy: Array, name: str = name, y: Array = y) -> Array:
            return KERNELS[f"{name}_GRAD"](call(), dy, y)

        assert_gradient(lambda v, name=name: KERNELS[name](call(), v), x, backward)


@few
@given(seeds)
def test_losses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels, target = normal(seed, 5, 4), rng.integers(0, 4, 5), rng.random((5, 4))
    cases: dict[str, Array] = {"CROSS_ENTROPY": labels, "MSE": target, "BCE_WITH_LOGITS": target}
    for name, wanted in cases.items():
        gradient = KERNELS[name](call(), logits, wanted)[2]
        direction, step = normal(seed + 1, 5, 4), 1e-2  # the loss comes in float32: a coarse step, a loose tolerance
        up, down = (KERNELS[name](call(), logits + sign * step * direction, wanted)[0][0] for sign in (1, -1))
        assert np.vdot(gradient, direction) == pytest.approx((up - down) / (2 * step), rel=1e-2, abs=2e-3), name
