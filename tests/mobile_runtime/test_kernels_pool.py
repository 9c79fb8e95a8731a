"""Pooling against torch in float64, on every instruction set; shapes drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, instruction_sets, native_machine, run_one

from evensong.mobile_runtime.errors import ExampleError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@dataclass(frozen=True)
class Pool:
    """One pooling layer: `x` is [n, height, width, channels]."""

    n: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]

    @property
    def x(self) -> np.ndarray:
        rng = np.random.default_rng(self.height * 31 + self.width)
        return rng.standard_normal((self.n, self.height, self.width, self.channels)).astype(np.float32)

    @property
    def attributes(self) -> dict[str, int]:
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_top, pad_left) = self.kernel, self.stride, self.pad
        return {
            "kernel_h": kernel_h,
            "kernel_w": kernel_w,
            "stride_h": stride_h,
            "stride_w": stride_w,
            "pad_top": pad_top,
            "pad_left": pad_left,
        }

    @property
    def index_dtype(self) -> type[np.generic]:
        return np.uint8 if self.kernel[0] * self.kernel[1] <= 256 else np.int32


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    kernel = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (2, 3), (1, 4), (5, 2), (17, 16)]))
    pad = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    height, width = (max(k - 2 * p, 1) + draw(st.integers(0, 6)) for k, p in zip(kernel, pad, strict=True))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    channels = draw(st.one_of(st.integers(1, 20), st.sampled_from([24, 32, 33, 65])))
    return Pool(draw(st.integers(1, 2)), height, width, channels, kernel, stride, pad)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).contiguous().numpy()


@settings(max_examples=60, deadline=None)
@given(pool=pools())
def test_max_pooling_and_its_gradient(pool: Pool) -> None:
    leaf = nchw(pool.x).requires_grad_()
    y, flat = torch.nn.functional.max_pool2d(leaf, pool.kernel, pool.stride, pool.pad, return_indices=True)
    out_h, out_w = y.shape[2:]
    rows = flat // pool.width - (torch.arange(out_h) * pool.stride[0] - pool.pad[0])[:, None]
    columns = flat % pool.width - (torch.arange(out_w) * pool.stride[1] - pool.pad[1])
    index = nhwc(rows * pool.kernel[1] + columns).astype(pool.index_dtype)
    shape = index.shape
    check_everywhere(
        "MAX_POOL2D", [pool.x], [shape, Wanted(shape, pool.index_dtype)], [nhwc(y), index], **pool.attributes
    )
    check_everywhere("MAX_POOL2D", [pool.x], [shape], [nhwc(y)], **pool.attributes)
    dy = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y.backward(nchw(dy))
    check_everywhere(
        "MAX_POOL2D_GRAD", [dy, index], [pool.x.shape], [nhwc(leaf.grad)], rtol=1e-6, atol=2e-6, **pool.attributes
    )


@settings(max_examples=60, deadline=None)
@given(pool=pools(), count_include_pad=st.booleans())
def test_mean_pooling_and_its_gradient(pool: Pool, count_include_pad: bool) -> None:
    leaf = nchw(pool.x).requires_grad_()
    y = torch.nn.functional.avg_pool2d(leaf, pool.kernel, pool.stride, pool.pad, count_include_pad=count_include_pad)
    shape = nhwc(y).shape
    options = {**pool.attributes, "count_include_pad": count_include_pad, "rtol": 1e-6, "atol": 1e-6}
    check_everywhere("AVG_POOL2D", [pool.x], [shape], [nhwc(y)], **options)
    dy = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y.backward(nchw(dy))
    check_everywhere("AVG_POOL2D_GRAD", [dy], [pool.x.shape], [nhwc(leaf.grad)], **options)


WINDOW = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2}


def test_the_first_maximum_wins_and_nan_is_not_hidden() -> None:
    x = np.zeros((1, 2, 4, 1), np.float32)
    x[0, 1, 2, 0] = np.nan
    for name in instruction_sets():
        y, index = run_one(
            "MAX_POOL2D", [x], [(1, 1, 2, 1), Wanted((1, 1, 2, 1), np.uint8)], machine=native_machine(name), **WINDOW
        )
        assert y[0, 0, 0, 0] == 0 and index[0, 0, 0, 0] == 0
        assert np.isnan(y[0, 0, 1, 0]) and index[0, 0, 1, 0] == 2


@pytest.mark.parametrize("place", [4, 255])
@pytest.mark.parametrize("channels", [1, 16, 19])
def test_an_index_outside_its_window_is_refused(place: int, channels: int) -> None:
    dy = np.ones((1, 1, 1, channels), np.float32)
    index = np.zeros(dy.shape, np.uint8)
    index[..., -1] = place
    for name in instruction_sets():
        with pytest.raises(ExampleError):
            run_one("MAX_POOL2D_GRAD", [dy, index], [(1, 2, 2, channels)], machine=native_machine(name), **WINDOW)


def test_an_index_in_the_padding_is_refused() -> None:
    dy, index = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.uint8)
    attributes = {**WINDOW, "pad_top": 1}
    for name in instruction_sets():
        with pytest.raises(ExampleError):
            run_one("MAX_POOL2D_GRAD", [dy, index], [(1, 1, 2, 1)], machine=native_machine(name), **attributes)


def test_only_live_images_are_pooled() -> None:
    x = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4, 1)
    (y,) = run_one(
        "MAX_POOL2D", [Given(x, batched=True)], [Wanted((2, 2, 2, 1), batched=True)], max_batch=7, batch=2, **WINDOW
    )
    assert (y == x[:, 1::2, 1::2]).all()
