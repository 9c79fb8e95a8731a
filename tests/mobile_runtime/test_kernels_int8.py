"""Quantised operations against exact integer references: every instruction set must give the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere

seeds = st.integers(0, 2**32 - 1)
zero_points = st.sampled_from([-128, -3, 0, 7, 127])
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 130]))
bounds = st.sampled_from([(-128, 127), (-5, 90), (0, 127)])


def requantize(values: np.ndarray, zero_point: int, lo: int = -128, hi: int = 127) -> np.ndarray:
    """clamp(rne(float32) + zero_point, lo, hi); NaN counts as 0."""
    assert values.dtype == np.float32
    rounded = np.rint(np.nan_to_num(values.astype(np.float64), nan=0.0))
    return np.clip(rounded + zero_point, lo, hi)


def product(sums: np.ndarray, bias: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """float32(bias + sums, wrapped at 32 bits) * multiplier, rounded once each."""
    accumulator = (sums.astype(np.int64) + bias).astype(np.int32)
    return accumulator.astype(np.float32) * multiplier


def random_layer(seed: int, outputs: int, depth: int, extreme: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [outputs, depth], bias and multiplier; `extreme` takes only -128 and 127 and a bias that overflows."""
    rng = np.random.default_rng(seed)
    if extreme:
        w = rng.choice(np.array([-128, 127], np.int8), (outputs, depth))
        return w, np.full(outputs, 2**31 - 1, np.int32), np.full(outputs, 2.0**-25, np.float32)
    w = rng.integers(-128, 128, (outputs, depth)).astype(np.int8)
    bias = rng.integers(-5000, 5000, outputs).astype(np.int32)
    return w, bias, (rng.uniform(0.5, 2, outputs) / (40 * depth**0.5)).astype(np.float32)


def int8s(seed: int, shape: tuple[int, ...], extreme: bool) -> np.ndarray:
    rng = np.random.default_rng(seed + 1)
    return (rng.choice([-128, 127], shape) if extreme else rng.integers(-128, 128, shape)).astype(np.int8)


# ---------------------------------------------------------------------------------------------------------- products


@settings(max_examples=80, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 20), st.just(70)),
    depth=st.one_of(sizes, st.just(784)),
    outputs=sizes,
    zero_point=zero_points,
    bound=bounds,
    extreme=st.booleans(),
    seed=seeds,
)
@example(rows=1, depth=784, outputs=128, zero_point=0, bound=(-128, 127), extreme=True, seed=0)
@example(rows=9, depth=3000, outputs=33, zero_point=0, bound=(-128, 127), extreme=False, seed=0)
def test_linear(
    rows: int, depth: int, outputs: int, zero_point: int, bound: tuple[int, int], extreme: bool, seed: int
) -> None:
    w, bias, multiplier = random_layer(seed, outputs, depth, extreme)
    x = int8s(seed, (rows, depth), extreme)
    sums = x.astype(np.int64) @ w.T.astype(np.int64)
    y = requantize(product(sums, bias, multiplier), zero_point, *bound)
    wanted = Wanted((rows, outputs), np.int8, scale=1.0, zero_point=zero_point)
    check_everywhere("QLINEAR", [x, w, bias, multiplier], [wanted], [y], lo=bound[0], hi=bound[1])


@dataclass(frozen=True)
class Convolution:
    n: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]  # top, left
    more: tuple[int, int]  # bottom, right
    dilation: tuple[int, int]
    groups: int
    group_inputs: int
    group_outputs: int

    @property
    def output(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.stride, self.pad, self.more, self.dilation, strict=True)
        return tuple((s + p + m - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, m, d in axes)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5), (5, 5), (2, 3)]))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(r + draw(st.integers(0, 6)) for r in reach)
    pad = tuple(draw(st.integers(0, r)) for r in reach)
    kind = draw(st.sampled_from(["plain", "depthwise", "groups"]))
    channels = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33])))
    groups = {"plain": 1, "depthwise": channels, "groups": draw(st.integers(2, 3))}[kind]
    return Convolution(
        n=draw(st.integers(1, 2)),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        pad=(pad[0], pad[1]),
        more=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=dilation,
        groups=groups,
        group_inputs=1 if kind == "depthwise" else min(channels, 9) if kind == "groups" else channels,
        group_outputs=1 if kind == "depthwise" else draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 64]))),
    )


@pytest.mark.torch
@settings(max_examples=120, deadline=None)
@given(c=convolutions(), zero_point_x=zero_points, zero_point_y=zero_points, extreme=st.booleans(), seed=seeds)
@example(
    # One place, few pixels, but padding on the right: not a matrix product over x as it lies.
    c=Convolution(1, (1, 1), (1, 1), (1, 1), (0, 0), (0, 1), (1, 1), 1, 64, 3),
    zero_point_x=-3,
    zero_point_y=0,
    extreme=False,
    seed=0,
)
def test_convolution(c: Convolution, zero_point_x: int, zero_point_y: int, extreme: bool, seed: int) -> None:
    torch = pytest.importorskip("torch")
    outputs = c.groups * c.group_outputs
    depth = c.kernel[0] * c.kernel[1] * c.group_inputs
    w, bias, multiplier = random_layer(seed, outputs, depth, extreme)
    w = w.reshape(outputs, *c.kernel, c.group_inputs)
    x = int8s(seed, (c.n, *c.size, c.groups * c.group_inputs), extreme)

    around = [(0, 0), *zip(c.pad, c.more, strict=True), (0, 0)]
    padded = np.pad(x.astype(np.float64), around, constant_values=zero_point_x)
    sums = torch.nn.functional.conv2d(  # exact: every sum is far below 2^53
        torch.tensor(padded).permute(0, 3, 1, 2),
        torch.tensor(w.astype(np.float64)).permute(0, 3, 1, 2),
        stride=c.stride,
        dilation=c.dilation,
        groups=c.groups,
    )
    sums = sums.permute(0, 2, 3, 1).numpy()
    y = requantize(product(sums, bias, multiplier), zero_point_y)
    check_everywhere(
        "QCONV2D",
        [Given(x, zero_point=zero_point_x), w, bias, multiplier],
        [Wanted((c.n, *c.output, outputs), np.int8, zero_point=zero_point_y)],
        [y],
        stride_h=c.stride[0],
        stride_w=c.stride[1],
        pad_top=c.pad[0],
        pad_left=c.pad[1],
        dilation_h=c.dilation[0],
        dilation_w=c.dilation[1],
        groups=c.groups,
        lo=-128,
        hi=127,
    )


@pytest.mark.torch
def test_convolution_with_more_weights_than_the_workspace_holds_at_once() -> None:
    torch = pytest.importorskip("torch")
    w, bias, multiplier = random_layer(0, 96, 9 * 200, False)
    w = w.reshape(96, 3, 3, 200)
    x = int8s(0, (1, 7, 7, 200), False)
    sums = torch.nn.functional.conv2d(
        torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2), torch.tensor(w.astype(np.float64)).permute(0, 3, 1, 2)
    )
    y = requantize(product(sums.permute(0, 2, 3, 1).numpy(), bias, multiplier), 0)
    window = {"stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1, "groups": 1}
    wanted = Wanted((1, 5, 5, 96), np.int8)
    check_everywhere("QCONV2D", [x, w, bias, multiplier], [wanted], [y], **window, lo=-128, hi=127)


@pytest.mark.parametrize("multiplier", [np.nan, np.inf, -np.inf, 3e38])
def test_a_hostile_multiplier_gives_bytes_within_the_bounds(multiplier: float) -> None:
    x, w = np.full((1, 5), 3, np.int8), np.array([[1] * 5, [0] * 5, [-1] * 5], np.int8)
    bias, factors = np.zeros(3, np.int32), np.full(3, multiplier, np.float32)
    with np.errstate(all="ignore"):
        y = requantize(product(np.array([[15, 0, -15]]), bias, factors), 2, -100, 100)
    wanted = Wanted((1, 3), np.int8, zero_point=2)
    check_everywhere("QLINEAR", [x, w, bias, factors], [wanted], [y], lo=-100, hi=100)


# ------------------------------------------------------------------------------------------------------ element-wise


@settings(max_examples=40, deadline=None)
@given(size=sizes, zero_point=zero_points, scale=st.sampled_from([0.02, 0.1, 1.0, 3e-5]), seed=seeds)
def test_quantize_and_dequantize(size: int, zero_point: int, scale: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal(size) * 60 * scale).astype(np.float32)
    with np.errstate(all="ignore"):
        y = requantize(x * (np.float32(1) / np.float32(scale)), zero_point)
    wanted = Wanted(x.shape, np.int8, scale=scale, zero_point=zero_point)
    check_everywhere("QUANTIZE", [x], [wanted], [y])
    back = (y - zero_point).astype(np.float32) * np.float32(scale)
    source = Given(y.astype(np.int8), scale=scale, zero_point=zero_point)
    check_everywhere("DEQUANTIZE", [source], [x.shape], [back])


def test_quantize_rounds_ties_to_even_and_survives_every_float() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 4194304.5], np.float32)
    y = [0, 2, 2, 0, -2, 126, 0, 127, -128, 127, -128, 0, 127]
    check_everywhere("QUANTIZE", [x], [Wanted(x.shape, np.int8, scale=1.0)], [y])


@settings(max_examples=40, deadline=None)
@given(size=sizes, zero_points=st.tuples(zero_points, zero_points, zero_points), bound=bounds, seed=seeds)
def test_add(size: int, zero_points: tuple[int, int, int], bound: tuple[int, int], seed: int) -> None:
    a, b = int8s(seed, (2, size), False)
    scale_a, scale_b = np.random.default_rng(seed).uniform(0.1, 2, 2).astype(np.float32)
    zero_a, zero_b, zero_y = zero_points
    left = (a.astype(np.int32) - zero_a).astype(np.float32) * scale_a
    right = (b.astype(np.int32) - zero_b).astype(np.float32) * scale_b
    check_everywhere(
        "QADD",
        [Given(a, zero_point=zero_a), Given(b, zero_point=zero_b)],
        [Wanted(a.shape, np.int8, zero_point=zero_y)],
        [requantize(left + right, zero_y, *bound)],
        scale_a=scale_a,
        scale_b=scale_b,
        lo=bound[0],
        hi=bound[1],
    )


@settings(max_examples=20, deadline=None)
@given(size=sizes, seed=seeds, inplace=st.sampled_from([None, (0, 0)]))
def test_table(size: int, seed: int, inplace: tuple[int, int] | None) -> None:
    x, table = int8s(seed, (size,), False), int8s(seed + 1, (256,), False)
    wanted = Wanted(x.shape, np.int8)
    check_everywhere("QLUT", [x, table], [wanted], [table[x.astype(np.int32) + 128]], inplace=inplace)


# ---------------------------------------------------------------------------------------------------------- pooling


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    channels=sizes,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    count_include_pad=st.booleans(),
    zero_points=st.tuples(zero_points, zero_points),
    seed=seeds,
)
def test_pooling(
    size: tuple[int, int],
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: bool,
    count_include_pad: bool,
    zero_points: tuple[int, int],
    seed: int,
) -> None:
    zero_x, zero_y = zero_points
    pad = tuple(k // 2 if padded else 0 for k in kernel)
    x = int8s(seed, (2, *size, channels), False)
    shape = tuple((s + 2 * p - k) // st_ + 1 for s, p, k, st_ in zip(size, pad, kernel, stride, strict=True))
    largest, mean = np.empty((2, 2, *shape, channels))
    ratio = np.float32(0.7)
    for h, w in np.ndindex(shape):
        top, left = h * stride[0] - pad[0], w * stride[1] - pad[1]
        window = x[:, max(top, 0) : top + kernel[0], max(left, 0) : left + kernel[1]].astype(np.int32)
        count = kernel[0] * kernel[1] if count_include_pad else window.shape[1] * window.shape[2]
        largest[:, h, w] = window.max(axis=(1, 2))
        sums = (window - zero_x).sum(axis=(1, 2)).astype(np.float32)
        mean[:, h, w] = requantize(sums * (ratio / np.float32(count)), zero_y)
    attributes = {
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "stride_h": stride[0],
        "stride_w": stride[1],
        "pad_top": pad[0],
        "pad_left": pad[1],
    }
    source = Given(x, zero_point=zero_x)
    check_everywhere("QMAX_POOL2D", [source], [Wanted(largest.shape, np.int8)], [largest], **attributes)
    wanted = Wanted(mean.shape, np.int8, zero_point=zero_y)
    options = {"count_include_pad": count_include_pad, "ratio": ratio}
    check_everywhere("QAVG_POOL2D", [source], [wanted], [mean], **attributes, **options)
