"""Windows over channels-last images: what convolution and pooling share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from evensong.mobile_runtime.twin_call import Array


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
        padded = np.full(self._padded_shape, fill, x.dtype)
        inside, source = self._overlap()
        padded[inside] = x[source]
        extents = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        (sh, sw), (dh, dw) = self.stride, self.dilation
        windows = sliding_window_view(padded, extents, axis=(1, 2))[:, ::sh, ::sw, :, ::dh, ::dw]
        return np.moveaxis(windows, 3, 5)

    def scatter(self, windows: Array) -> Array:
        """The adjoint of :meth:`gather`: adds ``[N, OH, OW, KH, KW, C]`` up into ``[N, H, W, C]``."""
        padded = np.zeros(self._padded_shape, windows.dtype)
        for kh, kw, place in self._places():
            padded[place] += windows[:, :, :, kh, kw]
        inside, source = self._overlap()
        x = np.zeros(self.image, windows.dtype)
        x[source] = padded[inside]
        return x

    def real(self) -> Array:
        """``[1, OH, OW, KH, KW, 1]``: whether the place is in the image and not in the padding."""
        once = Windows(self.kernel, self.stride, self.pad, self.dilation, (1, *self.image[1:3], 1), self.out)
        return once.gather(np.ones(once.image, np.bool_), False)

    @property
    def _padded_shape(self) -> tuple[int, ...]:
        n, *_, c = self.image
        height, width = (
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(self.out[1:3], self.stride, self.kernel, self.dilation, strict=True)
        )
        return n, height, width, c

    def _overlap(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part that padded image and image share, as slices of each."""
        sizes = [
            max(0, min(size, extent - pad))
            for size, extent, pad in zip(self.image[1:3], self._padded_shape[1:3], self.pad, strict=True)
        ]
        inside = tuple(slice(pad, pad + size) for pad, size in zip(self.pad, sizes, strict=True))
        return (slice(None), *inside), (slice(None), *(slice(size) for size in sizes))

    def _places(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """For each place of the kernel, the positions of the padded image that it meets."""
        for kh in range(self.kernel[0]):
            for kw in range(self.kernel[1]):
                top, left = kh * self.dilation[0], kw * self.dilation[1]
                down = slice(top, top + (self.out[1] - 1) * self.stride[0] + 1, self.stride[0])
                across = slice(left, left + (self.out[2] - 1) * self.stride[1] + 1, self.stride[1])
                yield kh, kw, (slice(None), down, across)


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
