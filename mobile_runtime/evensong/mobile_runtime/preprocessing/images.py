"""Images ``[n, C, H, W]`` of bytes or float32: resized, cropped, flipped."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing.calls import crop2d


class Resizing(nn.Module):
    """To ``height`` x ``width`` in float32, as :func:`torch.nn.functional.interpolate` with ``align_corners=False`` and
    without antialiasing. An image of bytes is not copied to float32 before, on a device.
    """

    def __init__(
        self, height: int, width: int, mode: Literal["nearest", "nearest-exact", "bilinear"] = "bilinear"
    ) -> None:
        super().__init__()
        self.size = (height, width)
        self.mode = mode
        if mode not in ("nearest", "nearest-exact", "bilinear"):
            raise CompileError("Resizing cannot do that", expected="nearest, nearest-exact or bilinear", got=mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(
            x.float(), self.size, mode=self.mode, align_corners=False if self.mode == "bilinear" else None
        )


class CenterCrop(nn.Module):
    """The middle ``height`` x ``width`` of an image that is at least as large."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.size, 0)
        return x if tuple(x.shape[2:]) == self.size else crop2d(x, *self.size, False, 0, 0, False, False)


class RandomCrop(nn.Module):
    """In training ``height`` x ``width`` from anywhere in an image widened by ``padding`` zeros on every side; else
    from its middle. Nothing trainable may stand before it.

    A device draws from Philox with the session's seed, as for dropout; torch from its own generator.
    """

    def __init__(self, height: int, width: int, *, padding: int = 0) -> None:
        super().__init__()
        self.size = (height, width)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.size, self.padding)
        if not self.training and tuple(x.shape[2:]) == self.size:
            return x
        return crop2d(x, *self.size, self.training, self.padding, self.padding, False, False)


class RandomFlip(nn.Module):
    """In training half of the images left to right (``"horizontal"``), top to bottom (``"vertical"``), or either by
    itself (``"both"``). Random numbers and what may stand before it are those of :class:`RandomCrop`.
    """

    def __init__(self, mode: Literal["horizontal", "vertical", "both"] = "horizontal") -> None:
        super().__init__()
        if mode not in ("horizontal", "vertical", "both"):
            raise CompileError("RandomFlip cannot do that", expected="horizontal, vertical or both", got=mode)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return crop2d(x, x.shape[2], x.shape[3], True, 0, 0, self.mode != "vertical", self.mode != "horizontal")


def _check_size(x: Tensor, size: tuple[int, int], padding: int) -> None:
    if any(part > whole + 2 * padding for part, whole in zip(size, x.shape[2:], strict=True)):
        raise CompileError("the crop is larger than the image", expected=f"at most {tuple(x.shape[2:])}", got=size)
