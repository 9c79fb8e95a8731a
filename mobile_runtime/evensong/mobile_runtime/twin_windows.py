"""Windows over channels-last images: what convolution and pooling share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evensong.mobile_runtime.twin_call import Array

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Windows:
    """Where the windows of an output ``[N, OH, OW, ...]`` lie over an input ``[N, H, W, C]``.

    The padding at the bottom and at the right follows from the output's size; input that no window reaches is cut off.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]  #: top, left
    dilation: tuple[int, int]
    image: tuple[int, ...]  #: [N, H, W, C]
    out: tuple[int, ...]  #: [N, OH, OW, ...]

    def gather(self, x: Array, fill: float) -> Array:
        """``[N, OH, OW, KH, KW, C]``, with ``fill`` where a window reaches into the padding."""
        windows = np.full((self.image[0], *self.out[1:3], *self.kernel, self.image[3]), fill, x.dtype)
        for kh, kw, place, source in self._places():
            windows[..., kh, kw, :][place] = x[source]
        return windows

    def scatter(self, windows: Array) -> Array:
        """The adjoint of :meth:`gather`: adds ``[N, OH, OW, KH, KW, C]`` up into ``[N, H, W, C]``."""
        x = np.zeros(self.image, windows.dtype)
        for kh, kw, place, source in self._places():
            x[source] += windows[..., kh, kw, :][place]
        return x

    def real(self) -> Array:
        """``[1, OH, OW, KH, KW, 1]``: whether the place lies in the image and not in the padding."""
        one = Windows(self.kernel, self.stride, self.pad, self.dilation, (1, *self.image[1:3], 1), self.out)
        return one.gather(np.ones(one.image, np.bool_), False)

    def _places(self) -> Iterator[tuple[int, int, Slices, Slices]]:
        """For each place of the kernel: the windows in which it meets the image, and what it meets there."""
        for kh in range(self.kernel[0]):
            down, rows = self._meet(0, kh)
            for kw in range(self.kernel[1]):
                across, columns = self._meet(1, kw)
                yield kh, kw, (slice(None), down, across), (slice(None), rows, columns)

    def _meet(self, axis: int, place: int) -> tuple[slice, slice]:
        """Windows ``first`` to ``last`` read position ``window * stride + shift`` of the image along ``axis``."""
        stride, size = self.stride[axis], self.image[1 + axis]
        shift = place * self.dilation[axis] - self.pad[axis]
        first = max(0, -(shift // stride))
        last = min(self.out[1 + axis] - 1, (size - 1 - shift) // stride)
        if last < first:
            return slice(0), slice(0)
        start = first * stride + shift
        return slice(first, last + 1), slice(start, last * stride + shift + 1, stride)


def conv_windows(
    image: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...], geometry: dict[str, int]
) -> Windows:
    """The windows of a convolution with the attributes of CONV2D and a weight ``[O, KH, KW, I / groups]``."""
    return Windows(
        kernel=(weight[1], weight[2]),
        stride=(geometry["stride_h"], geometry["stride_w"]),
        pad=(geometry["pad_top"], geometry["pad_left"]),
        dilation=(geometry["dilation_h"], geometry["dilation_w"]),
        image=image,
        out=out,
    )


def pool_windows(image: tuple[int, ...], out: tuple[int, ...], geometry: dict[str, int]) -> Windows:
    """The windows of a pooling operation."""
    return Windows(
        kernel=(geometry["kernel_h"], geometry["kernel_w"]),
        stride=(geometry["stride_h"], geometry["stride_w"]),
        pad=(geometry["pad_top"], geometry["pad_left"]),
        dilation=(1, 1),
        image=image,
        out=out,
    )
